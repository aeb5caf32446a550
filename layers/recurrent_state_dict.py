"""How torch's weights get into recurrent layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

_TORCH_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)_l(\d+)(_reverse)?")


def name_of_params(gate: str) -> str:
    """The attribute that holds the parameters of a gate."""
    return f"{gate}_gate_params" if gate else "gate_params"


class LoadsTorchWeights:
    """Mixin in front of a recurrent layer.

    Attributes:
        hidden_biases: gates whose bias for the state isn't added to that for the input.
    """

    direction_class: ClassVar[Any]
    hidden_biases: ClassVar[tuple[str, ...]] = ()
    num_layers: int
    bidirectional: bool
    layers: nn.ModuleList
    _shares_input_weights: bool

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take torch's weights apart: rows of gates, and two biases that are added.

        Torch reports what doesn't fit by its size. What there is no place for is an unexpected key: rows of a gate that
        is absent, and weights that differ where they are shared.
        """
        theirs = {k: k[len(prefix) :] for k in state_dict if k.startswith(prefix)}
        for key, name in theirs.items():
            match = _TORCH_NAME.fullmatch(name)
            if match is None:
                continue
            kind, which, layer, reverse = match[1], match[2], int(match[3]), bool(match[4])
            if which == "hr" or layer >= self.num_layers or (reverse and not self.bidirectional):
                continue
            place = f"{prefix}layers.{layer}.{int(reverse)}."
            direction: Any = self.layers[layer][int(reverse)]  # type: ignore[index]
            parts = state_dict.pop(key).tensor_split(len(direction.torch_gates))
            for gate, part in zip(direction.torch_gates, parts, strict=True):
                if gate not in direction.gates:
                    unexpected_keys.append(f"{key} (its rows of the {gate} gate)")
                    continue
                ours = f"{place}{name_of_params(gate)}.{self._name_of(kind, which, gate)}"
                before = state_dict.get(ours)
                if kind == "bias" and before is not None:
                    if before.shape != part.shape:
                        error_msgs.append(f"size mismatch for {key}: its two biases differ in size")
                        continue
                    part = part + before
                state_dict[ours] = part
        if self._shares_input_weights:
            unexpected_keys += self._differing(state_dict, prefix)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _name_of(self, kind: str, which: str, gate: str) -> str:
        """Where a gate has a part of torch's parameter."""
        if kind == "weight":
            return "input_weight.weight" if which == "ih" else "hidden_weight.weight"
        return "hidden_bias" if which == "hh" and gate in self.hidden_biases else "bias"

    def _differing(self, state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
        """Weights of the second direction that aren't those of the first."""
        for layer in range(self.num_layers):
            for gate in self.direction_class.gates:
                tail = f"{name_of_params(gate)}.input_weight.weight"
                one, other = (state_dict.get(f"{prefix}layers.{layer}.{i}.{tail}") for i in (0, 1))
                if one is None or other is None or one.is_meta or other.is_meta:
                    continue
                if not torch.equal(one, other.to(one)):
                    yield f"{prefix}layers.{layer}.1.{tail} (differs from layers.{layer}.0, which shares it)"
