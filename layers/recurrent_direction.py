"""One layer of a recurrent layer in one direction."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qframework.layers.recurrent_parameters import GateParams
from qframework.layers.recurrent_state_dict import name_of_params
from qframework.layers.recurrent_steps import OutputStep
from qframework.proxy import ActQuantProxyFromInjector
from qframework.quant_tensor import TensorLike, dequantize


class RecurrentDirection(nn.Module):
    """One layer in one direction: the parameters of its gates and the quantizers of its cell.

    Attributes:
        gates: names of the gates, in the order of their columns here.
        torch_gates: in the order of torch's rows.
    """

    gates: ClassVar[tuple[str, ...]]
    torch_gates: ClassVar[tuple[str, ...]]
    io_quant: ActQuantProxyFromInjector
    cell: nn.Module

    def parameters_of(self, gate: str) -> GateParams:
        """The parameters of a gate."""
        return getattr(self, name_of_params(gate))  # type: ignore[no-any-return]

    def _projected(self, x: TensorLike) -> tuple[Tensor, Tensor]:
        """Products of the input of all steps with the gates' weights, biases added, and the weights of the state.

        Args:
            x: input of all steps, ``(T, N, features)``, quantized or not.
        """
        inputs, hiddens, biases = [], [], []
        for gate in self.gates:
            own = self.parameters_of(gate)
            weight = own.input_weight.quant_weight(x)
            inputs.append(dequantize(weight))
            hiddens.append(dequantize(own.hidden_weight.quant_weight(x)))
            if own.bias is not None:
                biases.append(dequantize(own.bias_quant(own.bias, x, weight)))
        bias = torch.cat(biases) if biases else None
        products = nn.functional.linear(dequantize(x), torch.cat(inputs), bias)
        return products, torch.cat(hiddens).t()

    def run(
        self, x: TensorLike, states: tuple[Any, ...], reverse: bool
    ) -> tuple[Any, tuple[Any, ...]]:
        """Outputs of all steps and the last states.

        Args:
            x: input of all steps, ``(T, N, features)``, quantized or not.
            states: the first ones, ``(N, hidden)``, or None for zeros.
            reverse: from the last step to the first.
        """
        raise NotImplementedError

    def _collect(self, output: OutputStep, values: list[Tensor], reverse: bool) -> Any:
        if reverse:
            values = values[::-1]
        return output.wrap(torch.stack(values))
