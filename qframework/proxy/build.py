"""From what a user gives a layer as a quantizer to the proxy that the layer holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from qframework.core.snapshot import unchanged_on_error
from qframework.inject.errors import PolicyTypeError, UnknownNameError
from qframework.inject.injector import InjectorType
from qframework.inject.names import report_unused
from qframework.inject.policy import POLICY_NAMES
from qframework.inject.resolver import Resolver
from qframework.proxy.base import QuantProxy

#: What a layer takes as the quantizer of a tensor: a quantizer class, another layer's quantizer to share, or None.
Quantizer = InjectorType | QuantProxy | None
#: The same, by the names that annotations of layers of one's own use.
WeightQuantType = BiasQuantType = ActQuantType = TruncQuantType = Quantizer


#: Tensors that layers don't quantize unless they are told to.
_OFF_BY_DEFAULT = ("input_", "output_", "bias_")


@contextmanager
def sharing(quantizers: Iterable[object]) -> Iterator[None]:
    """Let the quantizers among these that other layers have be as they were, where a layer that is to share them isn't built."""
    shared = [q for q in quantizers if isinstance(q, QuantProxy)]
    layers = [list(q.tracked_module_list) for q in shared]
    try:
        with ExitStack() as stack:
            for quantizer in shared:
                stack.enter_context(unchanged_on_error(quantizer))
            yield
    except BaseException:
        for quantizer, before in zip(shared, layers, strict=True):
            quantizer.tracked_module_list[:] = before
        raise


def build_proxy(
    layer: nn.Module,
    attribute: str,
    quantizer: Quantizer,
    none_quantizer: InjectorType,
    overrides: Mapping[str, Any],
    prefix: str,
    kind: type[QuantProxy],
    provided: Mapping[str, Any] | None = None,
) -> QuantProxy:
    """The proxy of one tensor of a layer.

    Args:
        layer: the owner.
        attribute: name of the proxy in the layer, ``"weight_quant"``.
        quantizer: None, a quantizer class, or the proxy of another layer, which is then shared.
        none_quantizer: the class that stands for None.
        overrides: the layer's keywords for this tensor, without their prefix.
        prefix: of those keywords.
        kind: what the proxy has to be.
        provided: further names for the quantizer.

    Raises:
        PolicyTypeError: anything else, or a quantizer for another kind of tensor.
        UnknownNameError: keywords that nothing reads, or for a quantizer that is shared.
    """
    where = f"{type(layer).__name__}.{attribute}"
    if isinstance(quantizer, QuantProxy):
        if not isinstance(quantizer, kind):
            raise PolicyTypeError(
                f"{where}: can't share a {type(quantizer).__name__}; needed is a {kind.__name__}"
            )
        if overrides:
            first = prefix + next(iter(overrides))
            raise UnknownNameError(
                f"{where}: {first} has no effect, the quantizer is shared and already built; "
                f"give it to the layer that the quantizer comes from"
            )
        quantizer.add_tracked_module(layer)
        return quantizer
    if quantizer is None:
        quantizer = none_quantizer
        if prefix.endswith(_OFF_BY_DEFAULT):
            _tell_of_none(where, attribute, overrides, prefix)
    if not isinstance(quantizer, InjectorType):
        hint = (
            " (the class itself, not an instance)"
            if isinstance(type(quantizer), InjectorType)
            else ""
        )
        raise PolicyTypeError(
            f"{where} must be None, a quantizer class or another layer's proxy to share{hint}; "
            f"got {quantizer!r} of type {type(quantizer).__name__}"
        )
    resolver = Resolver(quantizer, overrides, subject=where, prefix=prefix)
    proxy_class = resolver.read("proxy_class")
    if not issubclass(proxy_class, kind):
        raise PolicyTypeError(
            f"{where}: {quantizer.__name__} is a quantizer of another kind of tensor (proxy_class "
            f"{proxy_class.__name__}); needed is one whose proxy_class is a {kind.__name__}"
        )
    given = (layer, quantizer, overrides, attribute, prefix, provided, resolver)
    return proxy_class(*given)  # type: ignore[no-any-return]


def _tell_of_none(where: str, attribute: str, overrides: Mapping[str, Any], prefix: str) -> None:
    """Keywords for a tensor that is not quantized."""
    known = [name for name in overrides if name in POLICY_NAMES]
    if not known or len(known) < len(overrides):  # one that is misspelled is refused
        return
    shown = ", ".join(f"{prefix}{n}={overrides[n]!r}" for n in known)
    report_unused(
        f"{where}: {shown} has no effect: this tensor is not quantized; give a quantizer, {attribute}=..."
    )
