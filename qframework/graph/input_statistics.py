"""Second moments of a layer's inputs, as the quantized and the float model have them."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from qframework.graph.in_place import mirror_, strips
from qframework.graph.layer_view import LayerView
from qframework.graph.weight_grid import WeightGrid
from qframework.processes import sum_of_processes


class InputStatistics:
    """Sums over samples of ``y y^T`` and ``y x^T``: ``y`` the input in the quantized model, ``x`` that in the float one.

    They become means when they are first looked at, where they are; nothing can be added from then on.

    Args:
        view: of the layer, whose weight is the float one.
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
        self._energy = torch.zeros((), device=device, dtype=torch.float64)
        self._waiting: deque[Tensor] = deque()
        self._are_means = False
        self.samples = 0

    def add(self, x: Tensor, is_float: bool = False) -> None:
        """Take one input of the layer."""
        if self._are_means:
            raise RuntimeError(
                "InputStatistics: the means have been looked at; nothing can be added"
            )
        vectors = self.view.vectors(x.detach()).to(self.device, self.dtype)
        if is_float:
            y = self._waiting.popleft()
            self._cross.baddbmm_(y, vectors.transpose(1, 2))  # type: ignore[union-attr]
            self._energy += self._energy_of(vectors)
            return
        self._hessian.baddbmm_(vectors, vectors.transpose(1, 2))
        self.samples += vectors.shape[2]
        if self._cross is not None:
            self._waiting.append(vectors)

    def _energy_of(self, vectors: Tensor) -> Tensor:
        """That of the float layer's outputs."""
        weight: Tensor = self.view.layer._parameters["weight"].detach()
        matrix = self.view.to_matrix(weight).to(self.device, self.dtype).transpose(1, 2)
        found = torch.zeros((), device=self.device, dtype=torch.float64)
        for part in strips(vectors.shape[2], matrix.shape[0] * matrix.shape[1], 64):
            found += (matrix @ vectors[:, :, part]).square_().sum(dtype=torch.float64)
        return found

    def _to_means(self) -> None:
        if self._are_means:
            return
        count = torch.tensor([self.samples], device=self.device, dtype=torch.int64)
        factor = 2 / max(int(sum_of_processes(count)), 1)
        self._hessian = mirror_(sum_of_processes(self._hessian).mul_(factor), from_upper=True)
        if self._cross is not None:
            self._cross = sum_of_processes(self._cross).mul_(factor)
            self._energy = sum_of_processes(self._energy).mul_(factor)
        self._are_means = True

    @property
    def hessian(self) -> Tensor:
        """The mean of ``2 y y^T``, ``(groups, columns, columns)``, symmetric; not a copy."""
        self._to_means()
        return self._hessian

    @property
    def cross(self) -> Tensor:
        """The mean of ``2 y x^T``; that of ``y y^T`` where no float inputs came. Not a copy."""
        self._to_means()
        return self._hessian if self._cross is None else self._cross

    def relative_error(self, original: Tensor, values: Tensor | WeightGrid) -> float:
        """``||original x - values y||^2 / ||original x||^2`` over all samples.

        Args:
            original: the float matrix, ``(groups, columns, rows)``.
            values: the quantized one; a grid for its values nearest to the float matrix.
        """
        hessian, cross = self.hessian, self.cross
        energy = self._energy.clone()
        error = torch.zeros_like(energy)
        for part in strips(original.shape[2], original.shape[0] * original.shape[1], 64):
            wide = original[:, :, part].to(self.device, self.dtype)
            if isinstance(values, WeightGrid):
                q = values.of_rows(part).nearest(wide)
            else:
                q = values[:, :, part].to(self.device, self.dtype)
            if self._cross is None:
                energy += _sum_of_products(wide, hessian @ wide)
                d = wide - q
                error += _sum_of_products(d, hessian @ d)
            else:
                # |Wx - Qy|^2 = |Wx|^2 - 2 <Qy, Wx> + |Qy|^2
                error += _sum_of_products(q, torch.baddbmm(hessian @ q, cross, wide, alpha=-2))
        if self._cross is not None:
            error += energy
        tiny = torch.finfo(torch.float64).tiny
        return float((error / energy.clamp_min(tiny)).clamp_min(0))


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Of all elements; ``b`` is overwritten."""
    return b.mul_(a).sum().to(torch.float64)
