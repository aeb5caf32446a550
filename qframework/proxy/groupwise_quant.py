"""Proxies of weights and activations whose groups of neighbours share a scale."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qframework.functional import join_groups
from qframework.kernels.recomputation import keep_origin
from qframework.proxy.base import QuantProxy
from qframework.proxy.codes import know_codes
from qframework.proxy.dynamic_quant import DynamicActQuantProxyFromInjector
from qframework.proxy.float_quant import FloatQuantProxy
from qframework.proxy.parameter_quant import WeightQuantProxyFromInjector
from qframework.proxy.resolution import Resolution
from qframework.quant_tensor import GroupwiseFloatQuantTensor, GroupwiseIntQuantTensor


class GroupwiseQuantProxy(QuantProxy):
    """What the proxies of groups have in common.

    Attributes:
        group_size: elements of a group.
        group_dim: axis that is split into groups.
    """

    is_groupwise = True

    def _read_settings(self, resolution: Resolution, built: nn.Module | None) -> None:
        super()._read_settings(resolution, built)
        if built is not None:
            self.group_size: int = resolution.read("group_size")
            self.group_dim: int = resolution.read("group_dim")

    def _joined(self, value: Tensor, x: Tensor) -> Tensor:
        return keep_origin(join_groups(value, self.group_dim % x.dim(), x.shape), value)

    def _int_groups(
        self, output: tuple[Any, ...], x: Tensor, source: object
    ) -> GroupwiseIntQuantTensor:
        value, scale, zero_point, bit_width = output
        made = GroupwiseIntQuantTensor.of_fields(
            (
                self._joined(value, x),
                scale,
                zero_point,
                bit_width,
                self.group_size,
                self.group_dim,
                bool(self.is_signed),
                self.training,
                source,
                self.is_symmetric,
                self.has_zero,
            )
        )
        return know_codes(made, self.tensor_quant, x, output, lambda t: self._joined(t, x))


class _FloatGroups(FloatQuantProxy, GroupwiseQuantProxy):
    def _float_groups(
        self, output: tuple[Any, ...], x: Tensor, source: object
    ) -> GroupwiseFloatQuantTensor:
        value, *rest = output[:6]
        how = (*self.format_fields(), self.training, source, True, True)
        return GroupwiseFloatQuantTensor.of_fields(
            (self._joined(value, x), *rest, self.group_size, self.group_dim, *how)
        )


class _GroupwiseWeight(GroupwiseQuantProxy, WeightQuantProxyFromInjector):
    def add_tracked_module(self, layer: nn.Module) -> None:
        """Groups are those of one weight.

        Raises:
            ValueError: always, for a layer that isn't tracked yet.
        """
        if any(layer is m for m in self.tracked_module_list):
            return
        raise ValueError(
            f"{type(layer).__name__}.{self.attribute}: {self.quantizer.__name__} has scales for the groups of one "
            "weight; its quantizer can't be shared. Give the class instead"
        )

    def scale_(self) -> Tensor | None:
        """The scales, one for each group, of the grouped shape; None when quantization is off."""
        return self.scale()

    def zero_point_(self) -> Tensor | None:
        """The zero points, one for each group; 0-dim where there are none; None when quantization is off."""
        return self.zero_point()


class GroupwiseWeightQuantProxyFromInjector(_GroupwiseWeight):
    """Quantizes a weight to a :class:`~qframework.quant_tensor.GroupwiseIntQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], source: object, parameter: Tensor) -> Any:
        return self._int_groups(output, parameter, source)


class GroupwiseWeightFloatQuantProxyFromInjector(_FloatGroups, _GroupwiseWeight):
    """Quantizes a weight to a :class:`~qframework.quant_tensor.GroupwiseFloatQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], source: object, parameter: Tensor) -> Any:
        return self._float_groups(output, parameter, source)


class GroupwiseActQuantProxyFromInjector(GroupwiseQuantProxy, DynamicActQuantProxyFromInjector):
    """Quantizes activations to a :class:`~qframework.quant_tensor.GroupwiseIntQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], x: Tensor) -> Any:
        return self._int_groups(output, x, None)


class GroupwiseActFloatQuantProxyFromInjector(_FloatGroups, DynamicActQuantProxyFromInjector):
    """Quantizes activations to a :class:`~qframework.quant_tensor.GroupwiseFloatQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], x: Tensor) -> Any:
        return self._float_groups(output, x, None)
