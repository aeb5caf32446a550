"""Second moments of a layer's inputs, as the quantized and the float model have them."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from qframework.graph.layer_view import LayerView
from qframework.processes import sum_of_processes


class InputStatistics:
    """Sums over samples of ``y y^T`` and ``y x^T``: ``y`` the input in the quantized model, ``x`` that in the float one.

    Args:
        view: of the layer.
        device: where the sums are.
        dtype: of the sums.
        with_float: whether float inputs come too, one after each quantized one.
    """

    def __init__(
        self, view: LayerView, device: torch.device, dtype: torch.dtype, with_float: bool
    ) -> None:
        self.view, self.device, self.dtype = view, device, dtype
        columns = view.channels_of_columns().shape[1]
        size = (view.groups, columns, columns)
        self._hessian = torch.zeros(size, device=device, dtype=dtype)
        self._cross = torch.zeros(size, device=device, dtype=dtype) if with_float else None
        self._energy = torch.zeros(size, device=device, dtype=dtype) if with_float else None
        self._waiting: deque[Tensor] = deque()
        self.samples = 0

    def add(self, x: Tensor, is_float: bool = False) -> None:
        """Take one input of the layer."""
        vectors = self.view.vectors(x.detach()).to(self.device, self.dtype)
        if is_float:
            y = self._waiting.popleft()
            self._cross.baddbmm_(y, vectors.transpose(1, 2))  # type: ignore[union-attr]
            self._energy.baddbmm_(vectors, vectors.transpose(1, 2))  # type: ignore[union-attr]
            return
        self._hessian.baddbmm_(vectors, vectors.transpose(1, 2))
        self.samples += vectors.shape[2]
        if self._cross is not None:
            self._waiting.append(vectors)

    @property
    def hessian(self) -> Tensor:
        """The mean of ``2 y y^T``, ``(groups, columns, columns)``; a new tensor."""
        return sum_of_processes(self._hessian) * (2 / max(self._samples_of_all(), 1))

    @property
    def cross(self) -> Tensor:
        """The mean of ``2 y x^T``; that of ``y y^T`` where no float inputs came."""
        if self._cross is None:
            return self.hessian
        return sum_of_processes(self._cross) * (2 / max(self._samples_of_all(), 1))

    @property
    def float_energy(self) -> Tensor:
        """The mean of ``2 x x^T``; that of ``y y^T`` where no float inputs came."""
        if self._energy is None:
            return self.hessian
        return sum_of_processes(self._energy) * (2 / max(self._samples_of_all(), 1))

    def relative_error(self, original: Tensor, *values: Tensor) -> list[float]:
        """``||original x - values y||^2 / ||original x||^2`` over all samples.

        Args:
            original: the float matrix, ``(groups, columns, rows)``.
            *values: quantized ones.
        """
        hessian, wide = self.hessian, original.to(self.device, self.dtype)
        energy = (wide * (self.float_energy @ wide)).sum().to(torch.float64)
        tiny = torch.finfo(torch.float64).tiny
        found = []
        for value in values:
            q = value.to(self.device, self.dtype)
            if self._cross is None:
                d = wide - q
                error = (d * (hessian @ d)).sum().to(torch.float64)
            else:
                # |Wx - Qy|^2 = |Wx|^2 - 2 <Qy, Wx> + |Qy|^2
                both = (q * (hessian @ q - 2 * (self.cross @ wide))).sum().to(torch.float64)
                error = energy + both
            found.append(float((error / energy.clamp_min(tiny)).clamp_min(0)))
        return found

    def _samples_of_all(self) -> int:
        count = torch.tensor([self.samples], device=self.device, dtype=torch.int64)
        return int(sum_of_processes(count))
