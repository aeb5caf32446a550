"""What all quantized layers have in common."""

from __future__ import annotations

import inspect
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks as _every_module_has

from qframework.core.snapshot import unchanged_on_error
from qframework.inject import ImmutableQuantizerError, UnknownNameError
from qframework.inject.errors import nearest
from qframework.inject.explanation import Explanation
from qframework.inject.names import is_ours, refuse_setting
from qframework.inject.policy import IGNORED_KEYWORDS, POLICY_NAMES, setting_name
from qframework.kernels.recomputation import forget_origin, knows_origin
from qframework.proxy import QuantProxy
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import QuantTensor, TensorLike

grad_enabled = torch.is_grad_enabled  # named here, since to look it up each time takes long


def route_keywords(
    layer: nn.Module,
    keywords: Mapping[str, object],
    prefixes: Iterable[str],
    default: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Sort a layer's extra keywords by the prefix that says which tensor they are for.

    Args:
        layer: for the message.
        keywords: as the user wrote them.
        prefixes: the layer's.
        default: the prefix whose keywords may go without it.

    Returns:
        For each prefix the keywords without it.

    Raises:
        UnknownNameError: a keyword without a prefix where there is no default.
    """
    routed: dict[str, dict[str, Any]] = {p: {} for p in prefixes}
    for name, value in keywords.items():
        if name in IGNORED_KEYWORDS:
            continue
        prefix = next((p for p in routed if name.startswith(p)), default)
        if prefix is None:
            names = _several(layer, name)
            if names:
                raise UnknownNameError(
                    f"{type(layer).__name__}: unknown keyword {name}={value!r}. Say which tensor: {', '.join(names)}"
                )
            close = _meant(layer, name, list(routed))
            hint = f" Did you mean {close!r}?" if close else ""
            raise UnknownNameError(
                f"{type(layer).__name__}: unknown keyword {name}={value!r}.{hint} Keywords for a quantizer start "
                f"with {', '.join(repr(p) for p in routed)}"
            )
        routed[prefix][name.removeprefix(prefix)] = value
    return routed


def _several(layer: Any, name: str) -> list[str]:
    """The keywords that may be meant by a name for a kind of tensor of which a layer has several."""
    for start, prefixes in getattr(layer, "prefixes_for", {}).items():
        rest = name.removeprefix(start)
        known = nearest(rest, {"quant", *POLICY_NAMES}, cutoff=0.8) if rest != name else None
        if known:
            return [p + known for p in prefixes]
    return []


def _meant(layer: nn.Module, name: str, prefixes: list[str]) -> str | None:
    """The keyword that a name without a prefix was probably meant to be."""
    if name in POLICY_NAMES:
        of_input = name in _OF_ACTIVATIONS and "input_" in prefixes
        return f"{'input_' if of_input else prefixes[0]}{name}"
    parameters = inspect.signature(type(layer).__init__).parameters
    own = [p for p in parameters if p not in ("self", "kwargs")]
    whole = [p + n for p in prefixes for n in POLICY_NAMES]
    bare = nearest(name, POLICY_NAMES, cutoff=0.8)
    close = nearest(name, [*own, *whole] if bare is None else [*own, *whole, bare])
    return _meant(layer, bare, prefixes) if close == bare is not None else close


#: Policy variables that weights and biases have no use for.
_OF_ACTIVATIONS = frozenset({"min_val", "max_val", "collect_stats_steps"})


#: Policy variables after which torch names arguments of its activation functions.
_OF_FUNCTIONS = ("min_val", "max_val")


class QuantLayer(nn.Module):
    """Mixin: the result of a layer, its explanation, its printed form."""

    return_quant_tensor: bool
    accept_quant_tensor = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "return_quant_tensor" and not isinstance(value, bool):
            raise TypeError(
                f"{type(self).__name__}: return_quant_tensor={value!r} must be True or False"
            )
        setting = setting_name(name)
        if setting not in (None, *_OF_FUNCTIONS) and is_ours(type(self).__module__):
            refuse_setting(self, name, value, [p.prefix for p in self._proxies().values()])
        held = self.__dict__.get("_modules", {}).get(name)
        if isinstance(held, QuantProxy) and not isinstance(value, nn.Module):
            raise ImmutableQuantizerError(
                f"{type(self).__name__}.{name} = {value!r}: a layer keeps its quantizers; build it with {name}={value!r}, or leave the "
                f"tensor in floats by layer.{name}.disable_quant = True"
            )
        super().__setattr__(name, value)

    def _pack(self, out: TensorLike, *through: nn.Module) -> Any:
        """The result in the form that the layer was asked for.

        Args:
            out: the result.
            *through: quantizers that it comes from.
        """
        if grad_enabled():
            heed(out, self, *through)
        if isinstance(out, QuantTensor):
            return out if self.return_quant_tensor else out.value
        if self.return_quant_tensor:
            raise RuntimeError(
                f"{qualified_name(self)}: return_quant_tensor=True, but the result is not quantized. "
                f"{self._remedy()}"
            )
        return out

    def _remedy(self) -> str:
        return "Set a quantizer, or return_quant_tensor=False."

    def _proxies(self) -> dict[str, QuantProxy]:
        return {n: m for n, m in self.named_children() if isinstance(m, QuantProxy)}

    def explain(self) -> Explanations:
        """For each tensor of the layer every name of its quantizer, the value and where it came from."""
        return Explanations({n: p.explain() for n, p in self._proxies().items()})

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; where a state dict is refused, everything is as it was."""
        with unchanged_on_error(self):
            return super().load_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The torch layer's own text, with the flag."""
        text = super().extra_repr()
        flag = "return_quant_tensor=True" if self.return_quant_tensor else ""
        return ", ".join(t for t in (text, flag) if t)

    def __repr__(self) -> str:
        parts = [
            f"{name.removesuffix('_quant')}: {proxy.summary()}"
            for name, proxy in self._proxies().items()
            if proxy.tensor_quant is not None
        ]
        lines = [f"{type(self).__name__}({self.extra_repr()})", *parts[:1]]
        if len(parts) > 3:
            lines += ["; ".join(parts[1:3]), *parts[3:]]
        else:
            lines += parts[1:]
        return "\n  ".join(lines)


def may_write(module: nn.Module) -> bool:
    """Whether code of a user's own sees what a module takes or gives, and may write to it by any way: a hook, or a forward of its own."""
    own: Any = type(module).forward
    return bool(
        _every_module_has
        or module.__dict__.get("_forward_hooks")
        or module.__dict__.get("_forward_pre_hooks")
        or "forward" in module.__dict__
        or not is_ours(own.__module__)
    )


def heed(quantized: object, *through: nn.Module) -> None:
    """Where somebody may have written to what modules gave or took, the values aren't made again from those of before.

    Asked where gradients are enabled, since nothing is made again without.
    """
    if knows_origin(quantized) and any(map(may_write, through)):
        forget_origin(quantized)


class Explanations:
    """Explanations of a layer's tensors: a mapping by the name of the proxy; iterated, one after the other, as they are printed."""

    def __init__(self, by_tensor: Mapping[str, Explanation]) -> None:
        self._by_tensor = dict(by_tensor)

    def __getitem__(self, name: str) -> Explanation:
        return self._by_tensor[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_tensor

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self._by_tensor.values())

    def __len__(self) -> int:
        return len(self._by_tensor)

    def keys(self) -> KeysView[str]:
        """Names of the proxies."""
        return self._by_tensor.keys()

    def values(self) -> ValuesView[Explanation]:
        """The explanations."""
        return self._by_tensor.values()

    def items(self) -> ItemsView[str, Explanation]:
        """Names and explanations."""
        return self._by_tensor.items()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


class ArgumentsError(ValueError, RuntimeError):
    """A combination of arguments that can't be."""
