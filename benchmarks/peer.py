"""Measures Brevitas, in the environment that it is installed in: python -m benchmarks.peer [rounds]."""

from __future__ import annotations

import json
import sys
import warnings

from torch import nn

from benchmarks.measure import compare, ratio
from benchmarks.network import Network, float_network


def main() -> None:
    """Print the measures as one line of JSON."""
    warnings.simplefilter("ignore")
    import brevitas
    import brevitas.nn as qnn
    import torch

    def network(steps: int) -> Network:
        return Network(
            lambda *a, **k: qnn.QuantConv2d(*a, weight_bit_width=8, **k),
            lambda: qnn.QuantReLU(bit_width=8, collect_stats_steps=steps),
            lambda i, o: qnn.QuantLinear(i, o, bias=True),
        )

    out = compare(float_network, network, int(sys.argv[1]))
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
