"""Networks that are measured can be made."""

import pytest
import torch

from benchmarks.kit import QuantKit
from benchmarks.rows import MORE, ROWS


@pytest.mark.table(4)
@pytest.mark.parametrize("row", (ROWS | MORE).values(), ids=lambda row: row.kind)
def test_a_quantized_network_trains(row) -> None:
    model = row.make(QuantKit(), row.kind.removeprefix("conv ").split(" x")[0])
    x = torch.randn(2, *row.shape[1:])
    if row.kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    model(x).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
