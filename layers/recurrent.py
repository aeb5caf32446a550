"""Layers that run a cell over a sequence: what those of all kinds take, and how they go through their layers and directions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from qframework.layers.base import ArgumentsError, QuantLayer
from qframework.layers.recurrent_building import DirectionBuilder
from qframework.layers.recurrent_direction import RecurrentDirection
from qframework.layers.recurrent_parameters import as_given, check_prefixes
from qframework.layers.recurrent_state_dict import LoadsTorchWeights
from qframework.layers.recurrent_steps import state_of, with_batch
from qframework.proxy import ActQuantProxyFromInjector, QuantProxy
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import IntQuantTensor, TensorLike, dequantize


class QuantRecurrent(LoadsTorchWeights, QuantLayer, nn.Module):
    """Base of the recurrent layers."""

    direction_class: ClassVar[type[RecurrentDirection]]
    state_names: ClassVar[tuple[str, ...]] = ("hx",)
    #: prefixes of keywords for all quantizers of a kind
    kinds: ClassVar[tuple[str, ...]] = ("weight_", "bias_", "io_", "gate_acc_")
    #: attributes of the cell's quantizers, each with its kind
    cell_quantizers: ClassVar[Mapping[str, str]]

    def _init_recurrent(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        bidirectional: bool,
        quantizers: dict[str, Any],
        shared_input_hidden_weights: bool,
        return_quant_tensor: bool,
        quantize_output_only: bool,
        shared: Mapping[str, bool],
        device: torch.device | None,
        dtype: torch.dtype | None,
        dropout: float,
        keywords: dict[str, Any],
    ) -> None:
        """Build all layers; the last step of a constructor."""
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, **shared}
        flags |= {
            "shared_input_hidden_weights": shared_input_hidden_weights,
            "quantize_output_only": quantize_output_only,
        }
        _check_flags(self, flags)
        if keywords.pop("proj_size", 0):
            raise ArgumentsError(
                f"{type(self).__name__}: proj_size, a projection of the hidden state, has no quantized form; keep it 0, "
                "and put a QuantLinear behind"
            )
        self.dropout = _checked_dropout(self, dropout, num_layers)
        self._shares_input_weights = shared_input_hidden_weights
        if shared_input_hidden_weights and not bidirectional:
            raise ArgumentsError(
                f"{type(self).__name__}: shared_input_hidden_weights=True shares the weights for the input between two "
                "directions; it needs bidirectional=True"
            )
        if num_layers < 1 or hidden_size < 1:
            raise ValueError(f"{num_layers=} and {hidden_size=} must be at least 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.use_bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.return_quant_tensor, self.quantize_output_only = (
            return_quant_tensor,
            quantize_output_only,
        )
        own = [
            f"{gate}_gate_{part}_"
            for gate in self.direction_class.gates
            if gate
            for part in ("weight", "bias")
        ]
        own += [n.removesuffix("quant") for n in self.cell_quantizers]
        check_prefixes(self, keywords, (*self.kinds, *own))
        with as_given(self, keywords, self.kinds, own):
            self._build_layers(DirectionBuilder(self, quantizers, keywords, device, dtype), shared)

    def _build_layers(self, builder: DirectionBuilder, shared: Mapping[str, bool]) -> None:
        io_quant = builder.activation("io_quant", builder.quantizers["io"], "io_")
        if self.return_quant_tensor:
            self._check_returned("io_quant", io_quant, "input and output")
        common: dict[str, Any] = {"io": io_quant}
        self.layers = nn.ModuleList()
        count = 1 + self.bidirectional
        for layer in range(self.num_layers):
            features = self.input_size if layer == 0 else self.hidden_size * count
            directions = nn.ModuleList()
            for _ in range(count):
                twin = directions[0] if len(directions) and self._shares_input_weights else None
                made = builder.direction(features, self.use_bias, common, shared, twin)
                directions.append(made)
            self.layers.append(directions)

    def _check_returned(self, attribute: str, proxy: Any, what: str) -> None:
        """Refuse results that couldn't be returned as one quantized tensor of all steps."""
        lacks = f"{type(self).__name__}: return_quant_tensor=True needs {attribute}, the quantizer of {what}"
        if proxy.tensor_quant is None:
            raise RuntimeError(lacks)
        if getattr(proxy, "is_dynamic", False):
            raise ArgumentsError(
                f"{lacks}, with a scale for all steps; that of {proxy.quantizer.__name__} is another at each step. Give "
                f"{attribute}=Int8ActPerTensorFloat, or return_quant_tensor=False"
            )

    @property
    def io_quant(self) -> ActQuantProxyFromInjector:
        """The quantizer of input and states, of all layers and directions."""
        return self.layers[0][0].io_quant  # type: ignore[index, no-any-return]

    # ------------------------------------------------------------ running

    def _run(self, x: TensorLike, states: list[Any]) -> tuple[Any, list[list[Any]]]:
        """Outputs of the last layer and the last states of all layers and directions, a list for each kind of state.

        Args:
            x: ``(T, N, features)``.
            states: for each kind None, ``(layers * directions, N, hidden)``, or a list of ``(1, N, hidden)``.
        """
        last: list[list[Any]] = [[] for _ in self.state_names]
        for i, directions in enumerate(self.layers):
            outputs = []
            both: Any = directions
            for j, direction in enumerate(both):
                place = i * len(both) + j
                first = tuple(state_of(s, place) for s in states)
                given = x
                if i == 0 and not self.quantize_output_only:
                    given = direction.io_quant(x)
                out, ends = direction.run(given, first, j == 1)
                outputs.append(out)
                for kind, end in zip(last, ends, strict=True):
                    kind.append(end)
            if i == self.num_layers - 1 and not self.return_quant_tensor:
                outputs = [dequantize(out) for out in outputs]  # whose grids may differ
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
            if self.dropout and self.training and i < self.num_layers - 1:
                x = _dropped(x, self.dropout)
        return x, last

    def _forward(self, x: TensorLike, states: list[Any]) -> tuple[Any, list[list[Any]], bool]:
        """Outputs and last states, in the layout of the input; whether the input was one sequence without a batch."""
        if isinstance(x, PackedSequence):
            raise TypeError(
                f"{qualified_name(self)}: a PackedSequence has other batch sizes at other steps, which a quantizer's "
                "statistics would weigh unevenly; pad the sequences (torch.nn.utils.rnn.pad_packed_sequence) and mask "
                "the result"
            )
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"{qualified_name(self)}: needs an input of 2 or 3 axes whose last has input_size={self.input_size} "
                f"elements, got shape {tuple(x.shape)}"
            )
        single, given = x.dim() == 2, tuple(x.shape)
        if single:
            x = x.unsqueeze(1)
            states = [with_batch(s) for s in states]
        elif self.batch_first:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise ValueError(f"{qualified_name(self)}: the sequence has no steps, in shape {given}")
        count = self.num_layers * (1 + self.bidirectional)
        for name, state in zip(self.state_names, states, strict=True):
            if state is None:
                continue
            apart = isinstance(state, (list, tuple))
            wanted = (1 if apart else count, x.shape[1], self.hidden_size)
            shapes = [tuple(s.shape) for s in (state if apart else [state])]
            if any(shape != wanted for shape in shapes) or (apart and len(state) != count):
                listed = (
                    f"a list of {count} states"
                    if apart
                    else "layers times directions, batch, hidden"
                )
                raise ValueError(
                    f"{qualified_name(self)}: {name} has shape {', '.join(map(str, shapes))}; needed is {wanted} "
                    f"({listed})"
                )
        out, last = self._run(x, states)
        if single:
            return out.squeeze(1), last, True
        return out.transpose(0, 1) if self.batch_first else out, last, False

    def _pack_states(self, states: list[Any], single: bool) -> Any:
        parts = (s if self.return_quant_tensor else dequantize(s) for s in states)
        joined = torch.cat([s.unsqueeze(0) for s in parts])
        return self._pack(joined.squeeze(1) if single else joined)

    def _remedy(self) -> str:
        return "Give io_quant=Int8ActPerTensorFloat, or return_quant_tensor=False."

    def extra_repr(self) -> str:
        """Sizes and settings."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"num_layers={self.num_layers}"] if self.num_layers > 1 else []
        parts += [
            f"{n}=True"
            for n in ("batch_first", "bidirectional", "return_quant_tensor")
            if getattr(self, n)
        ]
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(parts)

    def __repr__(self) -> str:
        direction: Any = self.layers[0][0]  # type: ignore[index]
        gate = direction.parameters_of(direction.gates[0])
        shown = {
            "weight": gate.input_weight.weight_quant,
            "bias": gate.bias_quant,
            "io": direction.io_quant,
        }
        shown |= {
            n.removesuffix("_quant"): p
            for n, p in direction.cell._modules.items()
            if n != "output_quant"
        }
        lines = [f"{n}: {p.summary()}" for n, p in shown.items() if p.tensor_quant is not None]
        return "\n  ".join([f"{type(self).__name__}({self.extra_repr()})", *lines])

    def _proxies(self) -> dict[str, Any]:
        return {n: m for n, m in self.named_modules() if isinstance(m, QuantProxy)}


def _dropped(x: TensorLike, p: float) -> TensorLike:
    """Elements become 0 with a probability ``p``, others are divided by ``1 - p``: their scale is."""
    value = nn.functional.dropout(dequantize(x), p)
    if not isinstance(x, IntQuantTensor):
        return value
    return x.set(value=value, scale=x.scale / (1 - p) if p < 1 else x.scale)


def _check_flags(layer: nn.Module, flags: Mapping[str, object]) -> None:
    """Refuse what isn't True or False, such as a dropout probability in the place of ``bidirectional``."""
    for name, given in flags.items():
        if not isinstance(given, bool):
            raise TypeError(
                f"{type(layer).__name__}: {name}={given!r} must be True or False; arguments behind batch_first are best "
                "given by name"
            )


def _checked_dropout(layer: nn.Module, dropout: float, num_layers: int) -> float:
    name = type(layer).__name__
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"{name}: dropout={dropout!r} must be a probability, a number from 0 to 1")
    if dropout and num_layers == 1:
        warnings.warn(
            f"{name}: dropout={dropout} is applied between layers, and num_layers=1 has none behind its only one",
            UserWarning,
            stacklevel=4,
        )
    return float(dropout)
