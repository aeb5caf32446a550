"""Every kind of model can be looked at, by every way of looking."""

import pytest
import torch
from torch import nn

import qframework
from qframework.graph import summary
from qframework.inspect import QuantizationLogger, collect_statistics, detect_anomaly, sensitivity
from qframework.layers import (
    QuantEmbedding,
    QuantGRU,
    QuantIdentity,
    QuantLinear,
    QuantLSTM,
    QuantMultiheadAttention,
    TruncQuantAccumulator,
)
from qframework.quantizers import (
    Fp8e4m3OCPActPerTensorFloat,
    Fp8e4m3OCPWeightPerTensorFloat,
    Int8ActPerTensorFloat,
    Int8DynamicActPerTensorFloat,
    Int8WeightPerChannelFloatDecoupled,
    Int32Bias,
    MXFloat4e2m1Weight,
    ShiftedUint8WeightPerTensorFloat,
)

X = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))

MODELS = {
    "lstm": (lambda: QuantLSTM(16, 8, batch_first=True), X),
    "gru": (lambda: QuantGRU(16, 8, batch_first=True), X),
    "attention": (lambda: QuantMultiheadAttention(16, 4, batch_first=True), (X, X, X)),
    "minifloats": (
        lambda: nn.Sequential(
            QuantIdentity(Fp8e4m3OCPActPerTensorFloat, return_quant_tensor=True),
            QuantLinear(16, 8, weight_quant=Fp8e4m3OCPWeightPerTensorFloat),
        ),
        X,
    ),
    "groups": (lambda: QuantLinear(16, 8, weight_quant=MXFloat4e2m1Weight), X),
    "dynamic": (
        lambda: QuantLinear(
            16, 8, input_quant=Int8DynamicActPerTensorFloat, weight_quant=ShiftedUint8WeightPerTensorFloat
        ),
        X,
    ),
    "truncation": (
        lambda: nn.Sequential(
            QuantIdentity(return_quant_tensor=True),
            QuantLinear(16, 8, return_quant_tensor=True, bias_quant=Int32Bias),
            TruncQuantAccumulator(bit_width=24),
        ),
        X,
    ),
    "embedding": (
        lambda: nn.Sequential(QuantEmbedding(10, 16), QuantLinear(16, 8, input_quant=Int8ActPerTensorFloat)),
        torch.arange(5),
    ),
    "decoupled": (lambda: QuantLinear(16, 8, weight_quant=Int8WeightPerChannelFloatDecoupled), X),
    "bfloat16": (
        lambda: nn.Sequential(QuantIdentity(return_quant_tensor=True), QuantLinear(16, 8)).bfloat16(),
        X.bfloat16(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_it_can_be_looked_at_and_gives_the_same_results(kind) -> None:
    make, batch = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    args = batch if isinstance(batch, tuple) else (batch,)
    model.train()
    model(*args)
    model.eval()
    expected = first(model(*args))
    found = collect_statistics(model, [batch])
    assert found.tensors and not found.not_reached
    assert all(t.bit_width is not None and t.sqnr > 0 for t in found.tensors)
    assert sensitivity(model, [batch]).layers
    with detect_anomaly(model, saturation=None, stop=False) as watch:
        assert torch.equal(first(model(*args)), expected)
    assert not {a.kind for a in watch.anomalies} & {"nan", "infinite"}
    with QuantizationLogger(model) as logger:
        model(*args)
        assert logger.step()
    assert str(summary(model))
    with qframework.frozen(model):
        assert len(collect_statistics(model, [batch]).tensors) == len(found.tensors)
    assert torch.equal(first(model(*args)), expected)


def first(result: object) -> torch.Tensor:
    while isinstance(result, tuple):
        result = result[0]
    return getattr(result, "value", result)
