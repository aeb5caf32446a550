"""What is in a QCDQ file, and what onnxruntime makes of it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn
from zoo import build, calibrated, needs_qonnx

from qframework.export import export_onnx_qcdq, export_qonnx, verify
from qframework.layers import (
    QuantEltwiseAdd,
    QuantIdentity,
    QuantLinear,
    QuantLSTM,
    QuantReLU,
)
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerGroupFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorLSQPlus,
    ShiftedUint8WeightGroupQuantFloat,
)


def run(proto: onnx.ModelProto, *inputs: Tensor) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(),
        options,
        ["CPUExecutionProvider"],
        disabled_optimizers=["DoubleQDQPairsRemover"],
    )
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})  # type: ignore[no-any-return]


def constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in proto.graph.initializer}


def operators(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


def test_the_file_gives_the_integers_of_the_evaluation(tmp_path: Path) -> None:
    model, x = build("LeNet", "powers", 4)
    path = tmp_path / "net.onnx"
    start = time.perf_counter()
    proto = export_onnx_qcdq(model, (x,), str(path))
    assert time.perf_counter() - start < 30  # 5 s on a machine that has nothing else to do
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert onnx.load(path) == proto
    with torch.no_grad():
        assert np.array_equal(run(proto, x)[0], model(x).numpy())


def test_weights_and_biases_are_integers_and_no_float_weight_is_left() -> None:
    model, x = build("LeNet", "channel", 4)
    held = constants(export_onnx_qcdq(model, x))
    for layer in ("conv1", "conv2", "fc"):
        assert held[f"{layer}.weight_quant.codes"].data_type == TensorProto.INT8
        assert held[f"{layer}.bias_quant.codes"].data_type == TensorProto.INT32
        quantized = model.get_submodule(layer).quant_weight()
        codes = onnx.numpy_helper.to_array(held[f"{layer}.weight_quant.codes"])
        assert np.array_equal(codes, quantized.int().numpy())
    floats = [t for t in held.values() if t.data_type == TensorProto.FLOAT]
    assert all(np.prod(t.dims) <= 10 for t in floats)


@pytest.mark.parametrize(
    ("bits", "opset", "dtype", "size"),
    [
        (8, 20, TensorProto.INT8, 262_144),
        (4, 21, TensorProto.INT4, 131_072),
        (2, 25, TensorProto.INT2, 65_536),
    ],
)
def test_a_weight_takes_the_room_of_its_bits(bits: int, opset: int, dtype: int, size: int) -> None:
    layer = QuantLinear(
        512, 512, bias=False, weight_bit_width=bits, input_quant=Int8ActPerTensorFloat
    )
    calibrated(layer, torch.randn(4, 512))
    proto = export_onnx_qcdq(layer, torch.randn(1, 512), opset_version=opset)
    assert proto.ByteSize() <= size * 1.05 + 16_000
    assert constants(proto)["weight_quant.codes"].data_type == dtype
    assert verify(layer, torch.randn(1, 512), proto).explained


#: Each opset, and each width by the first that has integers of it and by the one before; the others are exhaustive.
EACH_TIME = {(20, 8), (20, 4), (21, 4), (23, 2), (25, 2)}


@pytest.mark.parametrize(
    ("opset", "bits"),
    [
        pytest.param(*case, marks=() if case in EACH_TIME else pytest.mark.exhaustive)
        for case in itertools.product([20, 21, 23, 25], [8, 4, 2])
    ],
)
def test_every_opset_gives_the_same(opset: int, bits: int) -> None:
    model, x = build("LeNet", "powers-shifted", bits)
    proto = export_onnx_qcdq(model, x, opset_version=opset)
    assert {o.domain: o.version for o in proto.opset_import} == {"": opset}
    with torch.no_grad():
        assert np.array_equal(run(proto, x)[0], model(x).numpy())


def test_a_linear_layer_over_three_axes_runs_at_opset_21() -> None:
    layer = QuantLinear(8, 6, input_quant=Int8ActPerTensorFloat)
    x = torch.randn(3, 5, 8)
    calibrated(layer, x)
    proto = export_onnx_qcdq(layer, x, opset_version=21)
    quantize = next(n for n in proto.graph.node if n.op_type == "QuantizeLinear")
    assert len(quantize.input) == 2
    assert {a.name: a.i for a in quantize.attribute}["output_dtype"] == TensorProto.INT8
    assert verify(layer, x, proto).explained


def by_default(proto: onnx.ModelProto, x: Tensor) -> Tensor:
    """What onnxruntime gives with its default optimizations."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return torch.from_numpy(session.run(None, {proto.graph.input[0].name: x.numpy()})[0])


@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_over_three_axes_run_with_the_defaults_of_onnxruntime(opset, bits) -> None:
    layer = QuantLinear(
        8, 6, input_quant=Int8ActPerTensorFloat, input_bit_width=bits, weight_bit_width=bits
    )
    x = torch.randn(3, 5, 8)
    calibrated(layer, x)
    found = by_default(export_onnx_qcdq(layer, x, opset_version=opset), x)
    torch.testing.assert_close(found, layer(x).detach(), atol=1e-5, rtol=0)


def test_the_defaults_of_onnxruntime_keep_two_quantizers_in_a_row() -> None:
    net = nn.Sequential(QuantIdentity(), QuantIdentity(bit_width=4), QuantLinear(8, 6))
    x = torch.randn(64, 8)
    calibrated(net, x)
    found = by_default(export_onnx_qcdq(net, x), x)
    torch.testing.assert_close(found, net(x).detach(), atol=1e-5, rtol=0)


def odd_zero_point() -> tuple[nn.Module, Tensor]:
    """Half of the data are ties."""
    model = QuantIdentity(ShiftedUint8ActPerTensorFixedPoint, bit_width=4)
    x = torch.tensor([[-0.875, 1.0]])
    calibrated(model, x)
    scale = float(model.act_quant.scale().detach())
    zero_point = float(model.act_quant.zero_point().detach())
    assert zero_point % 2 == 1, zero_point
    return model, (torch.arange(-16, 16).float() / 2 * scale)[None]


def test_ties_of_odd_zero_points_are_ours_and_standard_has_the_plain_pair() -> None:
    model, x = odd_zero_point()
    with torch.no_grad():
        expected = model(x).numpy()
    exact, plain = (export_onnx_qcdq(model, x, standard=s) for s in (False, True))
    assert np.array_equal(run(exact, x)[0], expected)
    assert not np.array_equal(run(plain, x)[0], expected)
    assert {"Div", "Add"} <= set(operators(exact)) and "Div" not in operators(plain)
    report = verify(model, x, plain)
    assert not report.exact


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add = QuantEltwiseAdd(return_quant_tensor=True)
        self.fc = QuantLinear(8, 4, bias_quant=Int32Bias)

    def forward(self, left: Tensor, right: Tensor, *, scale: Tensor | None = None) -> Any:
        right = right if scale is None else right * scale
        return {"scores": self.fc(self.add(left, right)), "twice": left * 2}


@pytest.mark.parametrize(
    "export", [export_onnx_qcdq, pytest.param(export_qonnx, marks=needs_qonnx)]
)
def test_several_inputs_names_and_a_batch_of_any_size(export: Any) -> None:
    model = Two()
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    calibrated(model, a, b)
    proto = export(
        model,
        (a, b),
        input_names=["first", "second"],
        output_names=["scores", "twice"],
        dynamic_axes={"first": {0: "batch"}, "second": {0: "batch"}},
    )
    assert [i.name for i in proto.graph.input] == ["first", "second"]
    assert [o.name for o in proto.graph.output] == ["scores", "twice"]
    for rows in (1, 5):
        assert verify(model, (a[:rows], b[:rows]), proto).explained


def test_dynamic_shapes_by_the_names_of_forward_and_keyword_arguments() -> None:
    model = Two()
    a, b, s = torch.randn(6, 8), torch.randn(6, 8), torch.rand(8)
    calibrated(model, a, b)
    batch = torch.export.Dim("batch")
    proto = export_onnx_qcdq(
        model,
        (a, b),
        kwargs={"scale": s},
        dynamic_shapes={"left": {0: batch}, "right": {0: batch}, "scale": None},
    )
    assert len(proto.graph.input) == 3
    assert verify(model, (a[:2], b[:2]), proto, kwargs={"scale": s}).explained


@pytest.mark.parametrize("quantizer", [Int8WeightPerGroupFloat, ShiftedUint8WeightGroupQuantFloat])
def test_groups_have_blocks_of_four_bits(quantizer: Any) -> None:
    layer = QuantLinear(64, 16, weight_quant=quantizer, weight_group_size=16, weight_bit_width=4)
    calibrated(layer, torch.randn(4, 64))
    x = torch.randn(8, 64)
    proto = export_onnx_qcdq(layer, x, opset_version=21)
    node = next(n for n in proto.graph.node if n.output[0] == "weight_quant")
    assert {a.name: a.i for a in node.attribute} == {"axis": 1, "block_size": 16}
    assert verify(layer, x, proto).exact


def test_16_and_12_bits_at_opset_21() -> None:
    model = nn.Sequential(
        QuantIdentity(bit_width=16), QuantLinear(8, 4, weight_bit_width=12), QuantReLU(bit_width=12)
    )
    x = torch.randn(16, 8)
    calibrated(model, x)
    proto = export_onnx_qcdq(model, x, opset_version=21)
    assert constants(proto)["1.weight_quant.codes"].data_type == TensorProto.INT16
    assert verify(model, x, proto).explained


@pytest.mark.parametrize(
    "export", [export_onnx_qcdq, pytest.param(export_qonnx, marks=needs_qonnx)]
)
def test_half_precision_has_casts_around(export: Any) -> None:
    model, x = build("LeNet", "shifted", 4)
    model, x = model.half(), x[:4].half()
    proto = export(model, x)
    assert proto.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert "Cast" in operators(proto)
    assert verify(model, x, proto).explained


def test_minifloats_are_float8_in_the_file() -> None:
    model, x = build("Float8")
    held = constants(export_onnx_qcdq(model, x[:2]))
    assert held["conv1.weight_quant.codes"].data_type == TensorProto.FLOAT8E4M3FN


@pytest.mark.slow
def test_an_lstm_of_20_steps_is_written_in_a_minute_at_most() -> None:
    model = QuantLSTM(16, 32)
    x = torch.randn(20, 2, 16)
    calibrated(model, x)
    start = time.process_time()
    proto = export_onnx_qcdq(model, x)
    assert time.process_time() - start < 40  # 10 s on a machine that has nothing else to do
    assert verify(model, x, proto).explained


@pytest.mark.parametrize("export", [export_onnx_qcdq, export_qonnx])
def test_calls_of_the_reference_library_run_as_they_are(export: Any, tmp_path: Path) -> None:
    model, x = build("LeNet", "powers", 4)
    path = str(tmp_path / "net.onnx")
    export(model, args=x, export_path=path, opset_version=13)
    export(model, input_t=x, export_path=path, disable_warnings=True)
    export(
        model,
        input_shape=(1, 1, 12, 12),
        export_path=path,
        keep_initializers_as_inputs=True,
        do_constant_folding=True,
        input_names=["x"],
        output_names=["y"],
        dynamo=True,
    )
    assert Path(path).exists()


@pytest.mark.parametrize("bits", (3, 8, 10))
@pytest.mark.parametrize("standard", (False, True))
def test_activations_whose_zero_point_lies_between_integers(standard: bool, bits: int) -> None:
    torch.manual_seed(0)
    quantizer = ShiftedUint8ActPerTensorLSQPlus
    act = QuantIdentity(act_quant=quantizer, bit_width=bits, collect_stats_steps=1)
    model, x = nn.Sequential(act, QuantLinear(32, 8, bias=False)), torch.randn(6, 32)
    for _ in range(2):
        model(x)
    model.eval()
    assert act.act_quant.zero_point().item() % 1 != 0
    proto = export_onnx_qcdq(model, x, standard=standard, opset_version=21)
    assert verify(model, x, proto).exact
