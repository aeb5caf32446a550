"""Proxies of weights and activations that take the entries of a codebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qframework.functional import join_groups
from qframework.proxy.base import QuantProxy
from qframework.proxy.parameter_quant import WeightQuantProxyFromInjector
from qframework.proxy.resolution import Resolution
from qframework.proxy.runtime_quant import ActQuantProxyFromInjector
from qframework.quant_tensor import CodebookQuantTensor


class CodebookQuantProxy(QuantProxy):
    """What the proxies of codebooks have in common."""

    takes_groups = True
    group_size: int | None = None
    group_dim: int | None = None

    def _read_settings(self, resolution: Resolution, built: nn.Module | None) -> None:
        super()._read_settings(resolution, built)
        if built is not None and resolution.read("scaling_per_output", None) == "group":
            self.group_size, self.group_dim = (
                resolution.read("group_size"),
                resolution.read("group_dim"),
            )

    def codebook(self) -> Tensor | None:
        """The entries, in increasing order; None when quantization is off."""
        return self.tensor_quant.codebook if self.is_quant_enabled else None  # type: ignore[union-attr, return-value]

    def _format(self, values: Mapping[str, str]) -> str:
        return f"codebook of {len(self.tensor_quant.entries)}"  # type: ignore[union-attr, arg-type]

    def _record(self, output: tuple[Any, ...], x: Tensor, source: object) -> CodebookQuantTensor:
        value, scale, zero_point, codebook = output
        if self.group_dim is not None:
            value = join_groups(value, self.group_dim % x.dim(), x.shape)
        entries = self.tensor_quant.entries  # type: ignore[union-attr]
        signed, has_zero = entries[0] < 0, 0.0 in entries  # type: ignore[index, operator]
        how = (signed, self.training, source, True, has_zero, self.group_size, self.group_dim)
        return CodebookQuantTensor.of_fields((value, scale, zero_point, codebook, *how))


class WeightCodebookQuantProxyFromInjector(CodebookQuantProxy, WeightQuantProxyFromInjector):
    """Quantizes a weight to a :class:`~qframework.quant_tensor.CodebookQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], source: object, parameter: Tensor) -> Any:
        return self._record(output, parameter, source)


class ActCodebookQuantProxyFromInjector(CodebookQuantProxy, ActQuantProxyFromInjector):
    """Quantizes activations to a :class:`~qframework.quant_tensor.CodebookQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], x: Tensor) -> Any:
        return self._record(output, x, self.source)
