"""What the proxies of weights, biases and activations have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from qframework.changes import changes
from qframework.core.base import CompactModule, assign
from qframework.inject.explanation import Explanation, Row, Rows
from qframework.inject.injector import InjectorType
from qframework.inject.plan import remember, replayed
from qframework.inject.resolver import Resolver
from qframework.proxy.memory import Memory, is_watched
from qframework.quant_tensor import QuantTensor


class ScaleSource:
    """Where a scale comes from: equal only to itself. A copy of a model has sources of its own."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaleSource:
        return memo.setdefault(id(self), ScaleSource())  # type: ignore[no-any-return]


class QuantProxy(CompactModule):
    """The module that a layer holds for one of its tensors.

    It resolves a quantizer class into a tensor quantizer, at construction and whenever it is asked to again, and
    wraps what that computes into a quantized tensor.

    Args:
        layer: the owner.
        quantizer: the declarative class.
        overrides: the layer's keywords for this tensor, without their prefix.
        attribute: name of the proxy in the layer, ``"weight_quant"``.
        prefix: of the layer's keywords for this tensor, ``"weight_"``.
        provided: further names for the quantizer.
    """

    tensor_quant: nn.Module | None
    #: Whether scales belong to groups of elements.
    is_groupwise = False

    def __init__(
        self,
        layer: nn.Module,
        quantizer: InjectorType,
        overrides: Mapping[str, Any] | None = None,
        attribute: str = "",
        prefix: str = "",
        provided: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tracked_module_list: list[nn.Module] = [layer]
        self.quantizer = quantizer
        self.overrides = dict(overrides or {})
        self.attribute, self.prefix = attribute, prefix
        self._provided = dict(provided or {})
        self.disable_quant = False
        self._memory = Memory()
        self.source = ScaleSource()
        self.tensor_quant = None
        self._absent_prefix: str | None = None
        self.init_tensor_quant()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "_values" not in own and ("forward" in own or "_wrap" in own):
            cls._values = QuantProxy._values  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training":
            changes.note()
        assign(self, name, value)

    # ------------------------------------------------------------ resolution

    @property
    def quant_injector(self) -> InjectorType:
        """The quantizer class with the layer's keywords bound in."""
        return self.quantizer.let(**self.overrides) if self.overrides else self.quantizer  # type: ignore[attr-defined, no-any-return]

    def provided_names(self) -> dict[str, Any]:
        """The names that the layer provides to the quantizer."""
        modules = self.tracked_module_list
        return {
            "module": modules[0] if len(modules) == 1 else tuple(modules),
            "proxy_module": self,
            "dtype": None,
            "device": None,
            **self._provided,
        }

    def init_tensor_quant(self) -> None:
        """Build the tensor quantizer anew from its declaration and the present state of the layers.

        Parameters keep their identity, so an optimizer that holds them stays valid.

        Raises:
            QuantizerError: the declaration can't be built; the message says why.
        """
        self._memory.clear()
        resolver: Any = replayed(self.quantizer, self.overrides, self.provided_names(), self.prefix)
        if resolver is None:
            resolver = self._resolver()
        built = resolver.read("tensor_quant")
        self._read_settings(resolver, built)
        resolver.check_names()
        if isinstance(resolver, Resolver):
            remember(resolver)
        old, training = self.tensor_quant, self.training
        if built is not None:
            built.train(training)
            if old is not None:
                _keep_identity(old, built)
        self.tensor_quant = built
        self._versions = (
            {} if built is None else {n: p._version for n, p in built.named_parameters()}
        )
        self._rows = Rows(resolver.rows())
        self._reads_layer = resolver.reads_layer

    def _resolver(self) -> Resolver:
        layer = type(self.tracked_module_list[0]).__name__
        return Resolver(
            self.quantizer,
            self.overrides,
            self.provided_names(),
            subject=f"{layer}.{self.attribute}" if self.attribute else layer,
            prefix=self.prefix,
        )

    def _read_settings(self, resolver: Any, built: nn.Module | None) -> None:
        """For subclasses: read what the proxy itself needs to know."""
        if built is None:
            resolver.used.update(resolver.overrides.keys() & {"quant_type"})
        enabled = built is not None
        self.is_signed = bool(resolver.read("signed", True)) if enabled else None
        self.is_narrow_range = bool(resolver.read("narrow_range", False)) if enabled else None
        zero_point = getattr(built, "zero_point_impl", None)
        self.is_symmetric = zero_point is None or bool(getattr(zero_point, "symmetric", False))
        #: whether 0 is on the grid: the zero point is an integer of the range, and not all integers are -1 or 1
        whole = self.is_symmetric or bool(getattr(zero_point, "quantize_zero_point", False))
        self.has_zero = whole and bool(getattr(built, "has_zero", True))
        rounding = resolver.read("float_to_int_impl_type", None) if enabled else None
        self.rounding_mode = str(rounding).upper() if rounding is not None else None

    def explain(self) -> Explanation:
        """Every name that was resolved, its value and where it came from."""
        where = f"{type(self.tracked_module_list[0]).__name__}.{self.attribute} = {self.quantizer.__name__}"
        rows: tuple[Row, ...] = self._rows if self.tensor_quant is not None else ()
        return Explanation(where, tuple(sorted(rows, key=lambda r: r.name)))

    # ------------------------------------------------------------ sharing

    def add_tracked_module(self, layer: nn.Module) -> None:
        """Let one more layer use this quantizer; what was calibrated or learned stays."""
        if not any(layer is m for m in self.tracked_module_list):
            self.tracked_module_list.append(layer)

    def learned_parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters that were trained or loaded since the quantizer was built."""
        if self.tensor_quant is None:
            return {}
        untouched = {
            f"{n}.value"
            for n, m in self.tensor_quant.named_modules()
            if getattr(m, "pristine", False)
        }
        return {
            n: p.detach().clone()
            for n, p in self.tensor_quant.named_parameters()
            if n not in untouched and p._version != self._versions.get(n)
        }

    @torch.no_grad()
    def restore_parameters(self, learned: Mapping[str, Tensor]) -> None:
        """Write back what :meth:`learned_parameters` gave."""
        assert self.tensor_quant is not None or not learned
        for name, values in learned.items():
            parameter = self.tensor_quant.get_parameter(name)  # type: ignore[union-attr]
            if parameter.shape == values.shape:
                parameter.copy_(values)

    # ------------------------------------------------------------ values alone

    def values(self, x: Any) -> Any:
        """The values of what a call gives, without the record around them; for layers that return plain tensors."""
        if (
            self._forward_hooks  # as is_watched, in one frame: see Memory.recall
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _has_any_global_hook()
        ):
            return plain(self(x))
        return self._values(x)

    def _values(self, x: Any) -> Any:
        """For subclasses that know a shorter way; one that has its own ``forward`` or ``_wrap`` and no such goes this way."""
        return plain(self.forward(x))

    # ------------------------------------------------------------ what is kept

    def release(self) -> None:
        """Free what is kept of earlier calls: quantized parameters, scales."""
        self._memory.clear()

    def train(self, mode: bool = True) -> QuantProxy:
        """Set the mode; a change of it frees what is kept."""
        if mode != self.training:
            self.release()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> QuantProxy:
        self.release()
        super()._apply(fn, recurse)
        return self

    # ------------------------------------------------------------ state

    @property
    def is_quant_enabled(self) -> bool:
        """Whether this proxy quantizes."""
        return self.tensor_quant is not None and not self.disable_quant

    @property
    def is_idle(self) -> bool:
        """Whether a call would return its input, so that it can be left out."""
        parts = self._modules  # looked at directly, since a module's attributes take long
        idle = self.disable_quant or parts.get("tensor_quant") is None
        return idle and parts.get("activation_impl") is None and not is_watched(self)

    def reinitialize(self) -> None:
        """For subclasses: the parameters of the layers were replaced or loaded without this proxy's own state."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        legacy = prefix + "fused_activation_quant_proxy."
        for key in [k for k in state_dict if k.startswith(legacy)]:
            state_dict[prefix + key.removeprefix(legacy)] = state_dict.pop(key)
        for key in [
            k for k in state_dict if k.startswith(prefix) and k.endswith("zero_hw_sentinel")
        ]:
            del state_dict[key]
        self._absent_prefix = None if any(k.startswith(prefix) for k in state_dict) else prefix
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ------------------------------------------------------------ printing

    def summary(self) -> str:
        """One short line: format, bits, granularity, scaling."""
        if self.tensor_quant is None:
            return "float"
        values = {row.name: row.value for row in self._rows}
        learned = ", learned width" if _choice(values, "bit_width_impl_type") == "parameter" else ""
        head = self._format(values)
        if not self.is_symmetric:
            head += ", zero point"
        parts = [head + learned]
        by_product = getattr(self, "requires_input_scale", False)
        if "scaling_per_output_type" in values and not by_product:
            size = f" of {values['group_size']}" if self.is_groupwise else ""
            parts.append(f"per {_choice(values, 'scaling_per_output_type')}{size}")
        scaling = _choice(values, "scaling_impl_type")
        if by_product:
            parts.append("input scale x weight scale")
        elif scaling:
            stat = _choice(values, "scaling_stats_op")
            domain = _choice(values, "restrict_scaling_type")
            parts.append(
                scaling
                + (f" {stat}" if stat else "")
                + (f" {domain}" if domain not in (None, "fp") else "")
            )
        if self.disable_quant:
            parts.append("disabled")
        return ", ".join(parts)

    def _format(self, values: Mapping[str, str]) -> str:
        """The number format, from the resolved names."""
        kind = _choice(values, "quant_type") or "int"
        if kind != "int":
            return kind
        narrow = " narrow" if self.is_narrow_range else ""
        return f"{'' if self.is_signed else 'u'}int{values.get('bit_width', '?')}{narrow}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"


def _choice(values: Mapping[str, str], name: str) -> str | None:
    return values[name].strip("'") if name in values else None


@torch.no_grad()
def _keep_identity(old: nn.Module, new: nn.Module) -> None:
    """Move the values of ``new``'s parameters into those of ``old`` that have the same name and shape."""
    before = dict(old.named_parameters())
    for name, parameter in list(new.named_parameters()):
        kept = before.get(name)
        if kept is not None and kept.shape == parameter.shape and kept.dtype == parameter.dtype:
            kept.data = kept.data.to(parameter.device)
            kept.copy_(parameter)
            path, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(path), leaf, kept)
    for module in new.modules():
        if hasattr(module, "init_from_parameters"):
            module.init_from_parameters()  # type: ignore[operator]


def _after_load(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, QuantProxy)
    prefix = module._absent_prefix
    if prefix is None:
        return
    module._absent_prefix = None
    missing = incompatible.missing_keys
    missing[:] = [k for k in missing if not k.startswith(prefix)]
    module.reinitialize()


#: Of all proxies; torch numbers those that are registered from 0.
QuantProxy._load_state_dict_post_hooks = OrderedDict([(-1, _after_load)])


def plain(x: Any) -> Tensor:
    """The values of a quantized tensor, or the tensor itself."""
    return x.value if isinstance(x, QuantTensor) else x  # type: ignore[no-any-return]
