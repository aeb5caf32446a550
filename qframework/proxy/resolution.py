"""From the declaration that a proxy holds to its tensor quantizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qframework.inject.cached_resolution import Resolved, cache, find_cached
from qframework.inject.explanation import Rows
from qframework.inject.resolver import Resolver

if TYPE_CHECKING:
    from qframework.proxy.base import QuantProxy

_MISSING = object()


class Resolution:
    """The names of one proxy's quantizer: read from a resolver, or from what was resolved for another layer before.

    Args:
        names: the source.
    """

    def __init__(self, names: Resolver | Resolved) -> None:
        self._names = names
        self.reads_layer = names.reads_layer

    def read(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a name; ``default`` where nothing binds it."""
        return self._names.read(name) if default is _MISSING else self._names.read(name, default)

    def ignore(self, names: Iterable[str]) -> None:
        """Let keywords of these names pass, though nothing reads them."""
        self._names.used.update(self._names.overrides.keys() & set(names))

    def finish(self) -> Rows:
        """Refuse keywords that nothing has read; the rows that explain the others.

        Raises:
            UnknownNameError: names the keyword and the nearest real one.
        """
        names = self._names
        names.check_names()
        self.reads_layer = names.reads_layer
        rows = Rows(names.rows())
        if isinstance(names, Resolver):
            cache(names, rows)
        return rows


def resolver_of(proxy: QuantProxy) -> Resolver:
    """A resolver of the quantizer of a proxy, for what its layers provide."""
    layer = type(proxy.tracked_module_list[0]).__name__
    return Resolver(
        proxy.quantizer,
        proxy.overrides,
        proxy.provided_names(),
        subject=f"{layer}.{proxy.attribute}" if proxy.attribute else layer,
        prefix=proxy.prefix,
    )


def resolve(proxy: QuantProxy, resolver: Resolver | None) -> Resolution:
    """The names of the quantizer of a proxy.

    Args:
        proxy: with its declaration.
        resolver: that has read nothing that depends on the layer; None for a new one.
    """
    provided = proxy.provided_names()
    found = find_cached(proxy.quantizer, proxy.overrides, provided, proxy.prefix)
    if found is not None:
        return Resolution(found)
    if resolver is None:
        return Resolution(resolver_of(proxy))
    resolver.provided = provided
    return Resolution(resolver)


@torch.no_grad()
def keep_identity(old: nn.Module, new: nn.Module) -> None:
    """Move the values of ``new``'s parameters into those of ``old`` that have the same name and shape."""
    before = dict(old.named_parameters())
    for name, parameter in list(new.named_parameters()):
        kept = before.get(name)
        if kept is None or kept.is_meta is not parameter.is_meta:
            continue
        if kept.shape == parameter.shape and kept.dtype == parameter.dtype:
            kept.data = kept.data.to(parameter.device)
            kept.copy_(parameter)
            path, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(path), leaf, kept)
