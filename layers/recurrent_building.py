"""How the directions of a recurrent layer are built: which quantizer is whose, by the keywords for a kind and for one alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qframework.inject import PolicyTypeError, UnknownNameError
from qframework.layers.recurrent_direction import RecurrentDirection
from qframework.layers.recurrent_parameters import GateParams, GateWeight, overrides_for
from qframework.layers.recurrent_state_dict import name_of_params
from qframework.proxy import ActQuantProxyFromInjector, Quantizer, build_proxy
from qframework.quantizers.none import NoneActQuant


class DirectionBuilder:
    """Builds the directions of one recurrent layer.

    Args:
        layer: whose directions they are.
        quantizers: for each kind, as the constructor was given them.
        keywords: as the constructor was given them.
        device: of parameters and quantizers.
        dtype: of the parameters.
    """

    def __init__(
        self,
        layer: Any,
        quantizers: Mapping[str, Any],
        keywords: Mapping[str, Any],
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.layer, self.quantizers, self.keywords = layer, quantizers, keywords
        self.device, self.dtype = device, dtype

    def activation(self, attribute: str, quantizer: Quantizer, *prefixes: str) -> Any:
        """The proxy of an activation."""
        if attribute in self.keywords:
            quantizer = self.keywords[attribute]
            if quantizer is None:  # what is said of all of a kind isn't meant for it
                prefixes = prefixes[-1:]
        like = {"device": self.device, "dtype": self.dtype}
        overrides = overrides_for(self.keywords, *prefixes)
        proxy: Any = build_proxy(
            self.layer,
            attribute,
            quantizer,
            NoneActQuant,
            overrides,
            prefixes[-1],
            ActQuantProxyFromInjector,
            like,
        )
        if proxy.activation_impl is not None:
            raise PolicyTypeError(
                f"{type(self.layer).__name__}.{attribute}: the quantizer to share applies "
                f"{type(proxy.activation_impl).__name__} first; share that of a QuantIdentity"
            )
        return proxy

    def _refuse_own(self, prefix: str, of_all: str, sharing: str) -> None:
        """Refuse keywords for one gate where all gates share a quantizer."""
        own = next((k for k in self.keywords if k.startswith(prefix)), None)
        if own is not None:
            raise UnknownNameError(
                f"{type(self.layer).__name__}: {own} is for one gate, but {sharing}=True gives all gates one quantizer; "
                f"did you mean {of_all + own.removeprefix(prefix)!r}?"
            )

    def direction(
        self,
        features: int,
        bias: bool,
        common: dict[str, Any],
        shared: Mapping[str, bool],
        twin: nn.Module | None,
    ) -> RecurrentDirection:
        """One layer in one direction.

        Args:
            features: of its input.
            bias: whether gates have one.
            common: quantizers that all layers share, filled here.
            shared: which quantizers are shared within a layer (``weight``, ``gate_acc``) or by all (``cell_state``).
            twin: the other direction, whose weights for the input are taken over.
        """
        direction: RecurrentDirection = self.layer.direction_class()
        direction.io_quant = common["io"]
        weight_quant = None
        for gate in direction.gates:
            prefix = f"{gate}_gate_weight_" if gate else "weight_"
            quantizer = self.keywords.get(f"{prefix}quant", self.quantizers["weight"])
            overrides = overrides_for(self.keywords, "weight_", prefix)
            if shared.get("weight") and gate:
                self._refuse_own(prefix, "weight_", "shared_intra_layer_weight_quant")
                if weight_quant is not None:
                    quantizer, overrides = weight_quant, {}
            like = self.device, self.dtype
            if twin is None:
                first = GateWeight(
                    features, self.layer.hidden_size, quantizer, overrides, prefix, *like
                )
            else:
                first = twin.parameters_of(gate).input_weight  # type: ignore[operator]
            quantizer = weight_quant = first.weight_quant
            overrides = {}
            if weight_quant.is_groupwise or _has_groups(
                weight_quant
            ):  # groups are those of one weight
                quantizer, overrides = weight_quant.quantizer, weight_quant.overrides
            second = GateWeight(
                self.layer.hidden_size, self.layer.hidden_size, quantizer, overrides, prefix, *like
            )
            prefix = f"{gate}_gate_bias_" if gate else "bias_"
            params = GateParams(
                first,
                second,
                bias,
                self.keywords.get(f"{prefix}quant", self.quantizers["bias"]),
                overrides_for(self.keywords, "bias_", prefix),
                prefix,
                gate in self.layer.hidden_biases,
                self.device,
                self.dtype,
            )
            direction.add_module(name_of_params(gate), params)
        cell = nn.Module()
        for name, kind in self.layer.cell_quantizers.items():
            cell.add_module(name, self._cell_quantizer(name, kind, common, shared, cell))
        direction.cell = cell
        return direction

    def _cell_quantizer(
        self,
        name: str,
        kind: str,
        common: dict[str, Any],
        shared: Mapping[str, bool],
        cell: nn.Module,
    ) -> Any:
        if kind == "io":
            return common["io"]
        if kind in common:
            return common[kind]
        if kind == "gate_acc" and shared.get("gate_acc"):
            own = name.removesuffix("quant")
            self._refuse_own(own, "gate_acc_", "shared_intra_layer_gate_acc_quant")
            for other, its in self.layer.cell_quantizers.items():
                if its == kind and other in cell._modules:
                    return cell._modules[other]
        proxy = self.activation(name, self.quantizers[kind], f"{kind}_", name.removesuffix("quant"))
        if shared.get(kind) and kind != "gate_acc":
            common[kind] = proxy
        return proxy


def _has_groups(proxy: Any) -> bool:
    """Whether a codebook's scales are those of groups."""
    return getattr(proxy, "group_size", None) is not None
