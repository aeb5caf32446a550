"""Networks that are measured can be made, and those with copies in place of quantizers compute what their float networks do."""

import pytest
import torch

from benchmarks.copies import CopyingKit
from benchmarks.kit import QuantKit
from benchmarks.rows import MORE, ROWS, FloatKit


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


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.kind)
def test_copies_in_place_of_quantizers_change_nothing(row) -> None:
    plain, copying = row.make(FloatKit(), row.kind), row.make(CopyingKit(), row.kind)
    own = dict(copying.named_parameters())
    for name, p in plain.named_parameters():
        own[_NAMES_OF_THE_ENCODER.get(name, name)].data.copy_(p.data)
    x = torch.randn(2, *row.shape[1:])
    results = [model(x) for model in (plain, copying)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(results[0])
    for result in results:
        (result * weights).sum().backward()
    for name, p in plain.named_parameters():
        found = own[_NAMES_OF_THE_ENCODER.get(name, name)].grad
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))


_PARTS = {
    "self_attn.in_proj_": "projections.",
    "self_attn.out_proj.": "out.",
    "linear1.": "first.",
    "linear2.": "second.",
}
_NAMES_OF_THE_ENCODER = {
    before + kind: after + kind for before, after in _PARTS.items() for kind in ("weight", "bias")
}
