"""Measures Brevitas, in the environment that it is installed in.

python -m benchmarks.peer network ROUNDS   or   python -m benchmarks.peer rows ROUNDS NAMES
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from torch import nn

from benchmarks.measure import compare, ratio
from benchmarks.network import Network, float_network
from benchmarks.rows import measure


class PeerKit:
    """Layers of Brevitas for the networks of :mod:`benchmarks.rows`; a ``KeyError`` for what it hasn't."""

    def _linear_quantizers(self, kind: str) -> dict[str, Any]:
        from brevitas.quant import (
            Int8ActPerTensorFloat,
            Int8WeightPerChannelFloat,
            ShiftedUint8ActPerTensorFloat,
            ShiftedUint8WeightPerTensorFloat,
        )
        from brevitas.quant.experimental.float_quant_ocp import (
            Fp8e4m3OCPActPerTensorFloat,
            Fp8e4m3OCPWeightPerTensorFloat,
        )
        from brevitas.quant.experimental.mx_quant_ocp import MXFloat8e4m3Act, MXFloat8e4m3Weight

        kinds: dict[str, dict[str, Any]] = {
            "int8": {
                "weight_quant": Int8WeightPerChannelFloat,
                "input_quant": Int8ActPerTensorFloat,
            },
            "weights4": {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4},
            "fp8": {
                "weight_quant": Fp8e4m3OCPWeightPerTensorFloat,
                "input_quant": Fp8e4m3OCPActPerTensorFloat,
            },
            "mxfp8": {"weight_quant": MXFloat8e4m3Weight, "input_quant": MXFloat8e4m3Act},
            "shifted": {
                "weight_quant": ShiftedUint8WeightPerTensorFloat,
                "input_quant": ShiftedUint8ActPerTensorFloat,
            },
        }
        found = kinds[kind]
        if "input_quant" in found and kind != "mxfp8":
            found["input_collect_stats_steps"] = 2
        return found

    def linear(self, i: int, o: int, kind: str) -> nn.Module:
        """A linear layer."""
        import brevitas.nn as qnn

        if kind == "small":
            layer: nn.Module = qnn.QuantLinear(i, o, bias=True, return_quant_tensor=True)
            return layer
        layer = qnn.QuantLinear(i, o, bias=True, **self._linear_quantizers(kind))
        return layer

    def conv(self, i: int, o: int, size: int, kind: str, **how: Any) -> nn.Module:
        """A convolution without bias."""
        import brevitas.nn as qnn
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

        keywords: dict[str, Any] = {
            "depthwise": {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4},
            "small": {"return_quant_tensor": True},
        }[kind]
        if kind == "small" and i == 3:
            keywords |= {"input_quant": Int8ActPerTensorFloat, "input_collect_stats_steps": 2}
        layer: nn.Module = qnn.QuantConv2d(i, o, size, bias=False, **keywords, **how)
        return layer

    def relu(self, kind: str) -> nn.Module:
        """A quantized ReLU."""
        import brevitas.nn as qnn

        bits = {"depthwise": 4, "small": 8}[kind]
        layer: nn.Module = qnn.QuantReLU(
            bit_width=bits, return_quant_tensor=kind == "small", collect_stats_steps=2
        )
        return layer

    def add(self, kind: str) -> nn.Module:
        """A sum of quantized operands."""
        import brevitas.nn as qnn
        from brevitas.quant import Int8ActPerTensorFloat

        layer: nn.Module = qnn.QuantEltwiseAdd(
            input_quant=Int8ActPerTensorFloat,
            input_collect_stats_steps=2,
            output_quant=None,
            return_quant_tensor=True,
        )
        return layer

    def encoder(self) -> nn.Module:
        """There is none."""
        raise KeyError("encoder")


def main() -> None:
    """Print the measures as one line of JSON."""
    warnings.simplefilter("ignore")
    import brevitas

    if sys.argv[1] == "rows":
        found = measure(PeerKit(), int(sys.argv[2]), None, sys.argv[3].split(","))
        print(json.dumps({"name": f"Brevitas {brevitas.__version__}", "measures": found}))
        return
    import brevitas.nn as qnn
    import torch

    def network(steps: int) -> Network:
        return Network(
            lambda *a, **k: qnn.QuantConv2d(*a, weight_bit_width=8, **k),
            lambda: qnn.QuantReLU(bit_width=8, collect_stats_steps=steps),
            lambda i, o: qnn.QuantLinear(i, o, bias=True),
        )

    out = compare(float_network, network, int(sys.argv[2]))
    layer, plain, x = (
        qnn.QuantLinear(64, 64, bias=True).eval(),
        nn.Linear(64, 64),
        torch.randn(1, 64),
    )
    with torch.no_grad():
        out["small_layer"] = ratio(lambda: plain(x), lambda: layer(x), 500, 50)
    out["modules_per_layer"] = sum(1 for _ in layer.modules())
    print(json.dumps({"name": f"Brevitas {brevitas.__version__}", "measures": out}))


if __name__ == "__main__":
    main()
