"""What a gate of a recurrent layer learns: weights for input and state, a bias, and their quantizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qframework.inject import QuantizerError, UnknownNameError
from qframework.inject.errors import nearest
from qframework.inject.policy import IGNORED_KEYWORDS, POLICY_NAMES
from qframework.layers.wbiol import QuantWeightLayer
from qframework.proxy import (
    BiasQuantProxyFromInjector,
    Quantizer,
    WeightQuantProxyFromInjector,
    build_proxy,
)
from qframework.quantizers.none import NoneBiasQuant, NoneWeightQuant


class GateWeight(QuantWeightLayer, nn.Module):
    """A weight ``(hidden, features)`` and its quantizer.

    Args:
        features: of what it multiplies.
        hidden: rows.
        quantizer: a class, or the proxy of another weight to share.
        overrides: names to bind anew in it.
        prefix: of the layer's keywords for it.
        device: of the weight.
        dtype: of the parameters.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        quantizer: Any,
        overrides: Mapping[str, Any],
        prefix: str,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)
        start = torch.empty(hidden, features, device=device, dtype=dtype)
        self.return_quant_tensor = True
        self.weight = nn.Parameter(nn.init.uniform_(start, -bound, bound))
        self.weight_quant = build_proxy(  # type: ignore[assignment]
            self,
            "weight_quant",
            quantizer,
            NoneWeightQuant,
            overrides,
            prefix,
            WeightQuantProxyFromInjector,
        )


class GateParams(nn.Module):
    """Weights for input and state with one quantizer for both, and the bias of a gate.

    Args:
        input_weight: for the input.
        hidden_weight: for the state.
        bias: whether there is one, the sum of the two that torch has.
        bias_quant: its quantizer.
        overrides: names to bind anew in that.
        hidden_bias: whether the state has a bias of its own, ``hidden_bias``, left in floats.
        device: of the bias.
        dtype: of the parameters.
    """

    bias_quant: BiasQuantProxyFromInjector

    def __init__(
        self,
        input_weight: GateWeight,
        hidden_weight: GateWeight,
        bias: bool,
        bias_quant: Quantizer,
        overrides: Mapping[str, Any],
        prefix: str,
        hidden_bias: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.input_weight, self.hidden_weight = input_weight, hidden_weight
        self.out_channels = input_weight.weight.shape[0]
        for name, wanted in (("bias", bias), ("hidden_bias", bias and hidden_bias)):
            self.register_parameter(name, self._start_of_bias(device, dtype) if wanted else None)
        self.bias_quant = build_proxy(  # type: ignore[assignment]
            self,
            "bias_quant",
            bias_quant,
            NoneBiasQuant,
            overrides,
            prefix,
            BiasQuantProxyFromInjector,
        )

    def _start_of_bias(self, device: Any, dtype: Any) -> nn.Parameter:
        bound = 1 / math.sqrt(self.out_channels)
        start = torch.empty(self.out_channels, device=device, dtype=dtype)
        return nn.Parameter(nn.init.uniform_(start, -bound, bound))

    @property
    def weight(self) -> Tensor:
        """The weight for the input, whose device and dtype are those of the gate."""
        return self.input_weight.weight  # type: ignore[no-any-return]


def overrides_for(keywords: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    """The keywords that begin with one of the prefixes, without it; later prefixes win."""
    found: dict[str, Any] = {}
    for prefix in prefixes:
        found |= {
            _without(prefix, k): v
            for k, v in keywords.items()
            if k.startswith(prefix) and k != f"{prefix}quant"
        }
    return found


def _without(prefix: str, keyword: str) -> str:
    name = keyword.removeprefix(prefix)
    return name if name in POLICY_NAMES else name.removeprefix("quant_")


def check_prefixes(layer: nn.Module, keywords: Iterable[str], prefixes: Iterable[str]) -> None:
    """Refuse keywords that no part of a layer is named by.

    Raises:
        UnknownNameError: names the nearest.
    """
    prefixes = sorted(set(prefixes))
    for name in keywords:
        if name not in IGNORED_KEYWORDS and not any(name.startswith(p) for p in prefixes):
            close = nearest(
                name, [p + "bit_width" for p in prefixes] + [p + "quant" for p in prefixes]
            )
            hint = f" Did you mean {close!r}?" if close else ""
            raise UnknownNameError(
                f"{type(layer).__name__}: unknown keyword {name}.{hint} Keywords for a quantizer start with "
                f"{', '.join(repr(p) for p in prefixes)}"
            )


@contextmanager
def as_given(
    layer: nn.Module, keywords: Mapping[str, Any], kinds: Iterable[str], own: Iterable[str]
) -> Iterator[None]:
    """Let errors in building name the layer and the keyword as the user wrote it, not those of a gate that it went to.

    Args:
        layer: that is built.
        keywords: the user's.
        kinds: prefixes that are for several tensors.
        own: those of single ones.
    """
    try:
        yield
    except QuantizerError as error:
        text = str(error).replace(f"{GateWeight.__name__}.", f"{type(layer).__name__}.")
        for keyword in keywords:
            kind = next((p for p in kinds if keyword.startswith(p)), None)
            single = any(keyword.startswith(p) for p in own)
            if kind is not None and not single:
                bare = keyword.removeprefix(kind)
                for prefix in own:
                    if f"{prefix}{bare}=" in text and prefix + bare not in keywords:
                        text = text.replace(prefix, kind)
        if text == str(error):
            raise
        raise type(error)(text) from error
