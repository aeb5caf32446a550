"""What the proxies of weights, biases and activations have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CompactModule, assign
from qframework.core.snapshot import unchanged_on_error
from qframework.inject.explanation import Explanation, Row
from qframework.inject.injector import InjectorType
from qframework.inject.names import is_ours, refuse_setting
from qframework.inject.resolver import Resolver
from qframework.kernels import Plan, prepare
from qframework.proxy.description import describe
from qframework.proxy.freezing import Memory
from qframework.proxy.kept import make_room
from qframework.proxy.own_quantizer import own_output
from qframework.proxy.resolution import Resolution, keep_identity, resolve
from qframework.proxy.state_dict import LOAD_HOOKS, Loading, take_older_keys
from qframework.quant_tensor.source import can_read

_is_compiling = torch.compiler.is_compiling


#: What a quantizer was built with, which a proxy doesn't hold under these names.
_DECLARED = {
    "bit_width",
    "bit_width_impl_type",
    "float_to_int_impl_type",
    "narrow_range",
    "quant_type",
    "restrict_scaling_type",
    "scale",
    "scaling_impl_type",
    "scaling_per_output_channel",
    "scaling_per_output_type",
    "scaling_stats_op",
    "signed",
    "zero_point",
}


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
        resolver: that has read the class of the proxy, and nothing else; None for a new one.
    """

    tensor_quant: nn.Module | None
    _is_own: bool
    _looks_at_own: bool
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
        resolver: Resolver | None = None,
    ) -> None:
        super().__init__()
        self.tracked_module_list: list[nn.Module] = [layer]
        self.quantizer = quantizer
        self.overrides = dict(overrides or {})
        self.attribute, self.prefix = attribute, prefix
        self._provided = dict(provided or {})
        self.disable_quant = False
        self._memory = Memory()
        self._plan: Plan | None = None
        self.source = ScaleSource()
        self.tensor_quant = None
        self._loading: Loading | None = None
        self._build(resolver)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DECLARED and is_ours(type(self).__module__):
            refuse_setting(self, name, value, [self.prefix])
        if name == "tensor_quant":
            own = value is not None and not is_ours(type(value).__module__)
            self.__dict__["_is_own"] = self.__dict__["_looks_at_own"] = own
        assign(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": None, "_loading": None}

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
        self._build(None)

    def build_on(self, device: Any) -> None:
        """Build the tensor quantizer anew, from its declaration alone, where it is on the ``meta`` device and its layer no longer.

        Args:
            device: of its numbers.
        """
        if "device" in self._provided:
            self._provided["device"] = device
        self.tensor_quant = None
        self.init_tensor_quant()

    def _build(self, resolver: Resolver | None) -> None:
        resolution = resolve(self, resolver)
        built = resolution.read("tensor_quant")
        self._read_settings(resolution, built)
        rows = resolution.finish()
        old = self.tensor_quant
        self.release()
        if built is not None:
            built.train(self.training)
            if old is not None:
                keep_identity(old, built)
        self.tensor_quant = built
        self._rows, self._reads_layer = rows, resolution.reads_layer

    def _read_settings(self, resolution: Resolution, built: nn.Module | None) -> None:
        """For subclasses: read what the proxy itself needs to know."""
        if built is None:
            resolution.ignore({"quant_type"})
        enabled = built is not None
        self.is_signed = bool(resolution.read("signed", True)) if enabled else None
        self.is_narrow_range = bool(resolution.read("narrow_range", False)) if enabled else None
        zero_point = getattr(built, "zero_point_impl", None)
        self.is_symmetric = zero_point is None or bool(getattr(zero_point, "symmetric", False))
        #: whether 0 is on the grid: the zero point is an integer of the range, and not all integers are -1 or 1
        whole = self.is_symmetric or bool(getattr(zero_point, "quantize_zero_point", False))
        self.has_zero = whole and bool(getattr(built, "has_zero", True))
        rounding = resolution.read("float_to_int_impl_type", None) if enabled else None
        self.rounding_mode = str(rounding).upper() if rounding is not None else None

    # ------------------------------------------------------------ how it runs

    def _integers(self, output: Any, x: Tensor) -> Any:
        """What a quantizer of a user's own returned, looked at in its first call."""
        look = self._looks_at_own and not _is_compiling() and can_read(x)
        if look:
            self.__dict__["_looks_at_own"] = False
        return own_output(self, output, x, look)

    def _planned(self) -> Plan:
        """How the tensor quantizer runs; looked up anew where one of its parts has changed."""
        parts = self._modules  # looked at directly, since a module's attributes take long
        quantizer, activation = parts.get("tensor_quant"), self._activation()
        if _is_compiling():
            return prepare(quantizer, activation)
        plan = self._plan
        if plan is None or not plan.holds(quantizer, activation):
            plan = self.__dict__["_plan"] = prepare(quantizer, activation)
        return plan

    def _activation(self) -> nn.Module | None:
        """For subclasses: the activation function in front of the quantizer."""
        return None

    def path(self, x: Tensor | None = None) -> str:
        """Which form of the quantizer runs, and why: ``'C++ function'``, ``'fused'``, ``'composed'`` or ``'frozen'``.

        Args:
            x: for these values; None for values of any size.

        Returns:
            A short text such as ``'fused: quantize_by_absmax'`` or ``'composed: MyScaling overrides forward'``; ``'float'`` where
            nothing is quantized.
        """
        if not self.is_quant_enabled:
            return "float"
        return "frozen" if self.is_frozen else self._planned().path(x)

    def explain(self) -> Explanation:
        """Every name that was resolved, its value and where it came from; and which form of the quantizer runs."""
        where = f"{type(self.tracked_module_list[0]).__name__}.{self.attribute} = {self.quantizer.__name__}"
        rows: tuple[Row, ...] = ()
        if self.tensor_quant is not None:
            rows = tuple(sorted(self._rows, key=lambda r: r.name))
        return Explanation(where, rows, f"runs {self.path()}" if rows else "")

    # ------------------------------------------------------------ sharing

    def add_tracked_module(self, layer: nn.Module) -> None:
        """Let one more layer use this quantizer; what was calibrated or learned stays."""
        if not any(layer is m for m in self.tracked_module_list):
            self.tracked_module_list.append(layer)

    @torch.no_grad()
    def learned_parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters that were trained, loaded or written to since the quantizer was built."""
        if self.tensor_quant is None:
            return {}
        following = {
            f"{name}.value"
            for name, m in self.tensor_quant.named_modules()
            if getattr(m, "follows", False) and torch.equal(m.value, m.initial)  # type: ignore[arg-type]
        }
        fresh = dict(resolve(self, None).read("tensor_quant").named_parameters())
        return {
            name: p.detach().clone()
            for name, p in self.tensor_quant.named_parameters()
            if name not in following and not (name in fresh and torch.equal(p, fresh[name].to(p)))
        }

    @torch.no_grad()
    def restore_parameters(self, learned: Mapping[str, Tensor]) -> None:
        """Write back what :meth:`learned_parameters` gave."""
        assert self.tensor_quant is not None or not learned
        for name, values in learned.items():
            parameter = self.tensor_quant.get_parameter(name)  # type: ignore[union-attr]
            if parameter.shape == values.shape:
                parameter.copy_(values)

    # ------------------------------------------------------------ what is frozen

    @property
    def is_frozen(self) -> bool:
        """Whether results are kept until the quantizer is thawed, see :func:`qframework.frozen`."""
        return self._memory.frozen

    def freeze(self) -> None:
        """For subclasses: compute once what doesn't depend on the input."""

    def release(self) -> None:
        """Thaw: free what was computed once, so that it is computed at each call."""
        self._memory.clear()

    def train(self, mode: bool = True) -> QuantProxy:
        """Set the mode; training thaws."""
        if mode:
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
        if parts.get("tensor_quant") is not None and not self.disable_quant:
            return False
        if "activation_impl" in parts and parts["activation_impl"] is not None:
            return False
        return "_forward_hooks" not in self.__dict__ or not has_hooks(self)

    def reinitialize(self) -> None:
        """For subclasses: the parameters of the layers were replaced or loaded without this proxy's own state."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.release()
        take_older_keys(state_dict, prefix)
        self._loading = Loading(self, state_dict, prefix, *args)
        make_room(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; where a state dict is refused, everything is as it was."""
        with unchanged_on_error(self):
            return super().load_state_dict(*args, **kwargs)

    # ------------------------------------------------------------ printing

    def summary(self) -> str:
        """One short line: format, bits, granularity, scaling."""
        return describe(self)

    def _format(self, values: Mapping[str, str]) -> str:
        """The number format, from the resolved names."""
        kind = values.get("quant_type", "'int'").strip("'")
        if kind != "int":
            return kind
        narrow = " narrow" if self.is_narrow_range else ""
        return f"{'' if self.is_signed else 'u'}int{values.get('bit_width', '?')}{narrow}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"


#: Of all proxies: they follow what was loaded into their layers.
QuantProxy._load_state_dict_post_hooks = LOAD_HOOKS


def has_hooks(proxy: QuantProxy) -> bool:
    """Whether hooks have to see each call of a proxy."""
    if "_forward_hooks" not in proxy.__dict__:  # as long as none was registered
        return False
    return bool(
        proxy._forward_hooks
        or proxy._forward_pre_hooks
        or proxy._backward_hooks
        or proxy._backward_pre_hooks
    )
