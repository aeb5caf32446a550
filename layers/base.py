"""What all quantized layers have in common."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from qframework.core.snapshot import unchanged_on_error
from qframework.inject import UnknownNameError
from qframework.inject.errors import nearest
from qframework.inject.explanation import Explanation
from qframework.inject.policy import POLICY_NAMES
from qframework.proxy import QuantProxy
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import QuantTensor, TensorLike


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
        prefix = next((p for p in routed if name.startswith(p)), default)
        if prefix is None:
            own = [
                p
                for p in inspect.signature(type(layer).__init__).parameters
                if p not in ("self", "kwargs")
            ]
            close = nearest(name, [*own, *(p + n for p in routed for n in POLICY_NAMES)])
            hint = f" Did you mean {close!r}?" if close else ""
            raise UnknownNameError(
                f"{type(layer).__name__}: unknown keyword {name}={value!r}.{hint} Keywords for a quantizer start "
                f"with {', '.join(repr(p) for p in routed)}"
            )
        routed[prefix][name.removeprefix(prefix)] = value
    return routed


class QuantLayer(nn.Module):
    """Mixin: the result of a layer, its explanation, its printed form."""

    return_quant_tensor: bool
    accept_quant_tensor = True

    def _pack(self, out: TensorLike) -> Any:
        """The result in the form that the layer was asked for."""
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

    def explain(self) -> dict[str, Explanation]:
        """For each tensor of the layer every name of its quantizer, the value and where it came from."""
        return _Explanations({n: p.explain() for n, p in self._proxies().items()})

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


class _Explanations(dict[str, Explanation]):
    """Explanations by tensor, printed one after the other."""

    def __str__(self) -> str:
        return "\n".join(str(e) for e in self.values())

    __repr__ = __str__


class ArgumentsError(ValueError, RuntimeError):
    """A combination of arguments that can't be."""
