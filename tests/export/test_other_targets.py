"""QONNX, torch's own programs, and integers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import NETS, build, calibrated, data

from qframework.export import (
    ExportError,
    export_qonnx,
    export_torch_qcdq,
    integer_model,
    verify,
)
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU, QuantRMSNorm
from qframework.quantizers import (
    Fp6e3m2OCPActPerTensorFloat,
    Fp6e3m2OCPWeightPerChannelFloat,
    MXFloat8e4m3Weight,
)


def nodes(proto: Any, domain: str = "qonnx.custom_op.general") -> list[Any]:
    return [n for n in proto.graph.node if n.domain == domain]


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: a.s.decode() if a.s else a.i for a in node.attribute}


def constant(proto: Any, name: str) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


# ------------------------------------------------------------ QONNX


def test_a_quant_node_has_all_that_qonnx_wants() -> None:
    model, x = build("LeNet", "channel", 4)
    proto = export_qonnx(model, x)
    assert {o.domain: o.version for o in proto.opset_import}["qonnx.custom_op.general"] == 2
    weight = next(n for n in nodes(proto) if n.output[0] == "conv1.weight_quant")
    assert weight.op_type == "Quant"
    assert attributes(weight) == {"signed": 1, "narrow": 1, "rounding_mode": "ROUND"}
    value, scale, zero_point, bits = (constant(proto, i) for i in weight.input)
    assert scale.shape == (6, 1, 1, 1) and zero_point == 0 and bits == 4
    assert np.array_equal(value, model.conv1.quant_weight().value.detach().numpy())
    act = next(n for n in nodes(proto) if n.output[0] == "relu1.act_quant")
    assert attributes(act) == {"signed": 0, "narrow": 0, "rounding_mode": "ROUND"}


def test_roundings_binary_ternary_truncations_and_minifloats_have_their_nodes() -> None:
    model, x = build("Signs", "powers")
    assert {n.op_type for n in nodes(export_qonnx(model, x[:2]))} == {"Quant", "BipolarQuant"}
    model, x = build("Truncated", "powers")
    trunc = next(n for n in nodes(export_qonnx(model, x[:2])) if n.op_type == "Trunc")
    assert attributes(trunc) == {"signed": 0, "narrow": 0, "rounding_mode": "ROUND"}
    assert len(trunc.input) == 6
    model, x = build("Float8", "powers")
    floats = [n for n in nodes(export_qonnx(model, x[:2])) if n.op_type == "FloatQuant"]
    assert len(floats) == 3
    assert attributes(floats[0]) == {
        "has_inf": 0,
        "has_nan": 1,
        "has_subnormal": 1,
        "saturation": 1,
        "rounding_mode": "ROUND",
    }
    for rounding, name in (("floor", "FLOOR"), ("ceil", "CEIL"), ("round_to_zero", "DOWN")):
        layer = calibrated(QuantIdentity(float_to_int_impl_type=rounding), torch.randn(8))
        y = torch.randn(64)
        assert attributes(nodes(export_qonnx(layer, y))[0])["rounding_mode"] == name
        pytest.importorskip("qonnx")
        assert verify(layer, y, "qonnx").explained


def test_the_qonnx_package_cleans_and_executes_a_file(tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    model, x = build("LeNet", "powers", 4)
    export_qonnx(model, (x,), tmp_path / "net.onnx")
    cleaned = cleanup_model(ModelWrapper(str(tmp_path / "net.onnx")))
    name = cleaned.graph.input[0].name
    out = execute_onnx(cleaned, {name: x.numpy()})[cleaned.graph.output[0].name]
    with torch.no_grad():
        assert np.array_equal(out, model(x).numpy())


def test_other_minifloats_and_those_in_groups() -> None:
    pytest.importorskip("qonnx")
    model = nn.Sequential(
        QuantIdentity(Fp6e3m2OCPActPerTensorFloat),
        QuantLinear(16, 8, weight_quant=Fp6e3m2OCPWeightPerChannelFloat),
        QuantLinear(8, 4, weight_quant=MXFloat8e4m3Weight, weight_group_size=4),
    )
    x = torch.randn(16, 16)
    calibrated(model, x)
    assert verify(model, x, "qonnx").explained
    assert verify(model, x, "torch").explained


# ------------------------------------------------------------ torch


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # a GRU is unrolled in the same way as an LSTM, in half the time
    [pytest.param(n, marks=pytest.mark.exhaustive if n == "LSTM" else ()) for n in NETS],
)
def test_plain_torch_export_takes_every_kind_of_network(name: str) -> None:
    model, x = build(name, "channel", 4)
    program = torch.export.export(model, (x[:4],), strict=False)
    with torch.no_grad():
        expected = model(x[:4])
    torch.testing.assert_close(program.module()(x[:4]), expected, rtol=1e-4, atol=1e-4)


def test_a_program_has_the_operators_of_pt2e_and_no_float_weights(tmp_path: Path) -> None:
    model, x = build("LeNet", "channel", 4)
    batch = torch.export.Dim.DYNAMIC
    path = tmp_path / "net.pt2"
    program = export_torch_qcdq(model, (x,), path, dynamic_shapes=({0: batch},))
    targets = {str(n.target).removesuffix(".default") for n in program.graph.nodes}
    assert {
        "quantized_decomposed.quantize_per_tensor",
        "quantized_decomposed.dequantize_per_tensor",
        "quantized_decomposed.dequantize_per_channel",
    } <= targets
    held = program.state_dict
    assert held["conv1.weight_quant.codes"].dtype is torch.int8
    assert held["conv1.bias_quant.codes"].dtype is torch.int32
    assert all(t.numel() <= 10 for t in held.values() if t.is_floating_point())
    with torch.no_grad():
        expected = model(x[:3])
        assert torch.equal(torch.export.load(path).module()(x[:3]), expected)


# ------------------------------------------------------------ integers


def test_an_integer_model_gives_the_outputs_in_float64_and_its_integers() -> None:
    model, x = build("LeNet", "powers", 4)
    integers = integer_model(model, x)
    for rows in (32, 3):
        y = integers(x[:rows])
        assert y.dtype is torch.float64
        with torch.no_grad():
            assert torch.equal(y.float(), model(x[:rows]))
    assert integers.functions == []
    assert {t.dtype for t in integers.trace.values()} == {torch.int64}
    assert torch.equal(
        integers.trace["conv1.weight_quant"], model.conv1.quant_weight().int().long()
    )
    assert integers.trace["conv1.accumulator"].shape == (3, 6, 10, 10)
    relu = integers.trace["relu1.act_quant"]
    assert int(relu.min()) >= 0 and int(relu.max()) <= 15


def test_accumulators_are_sums_of_products_of_codes() -> None:
    layer = QuantLinear(6, 4, bias=False, weight_bit_width=4)
    model = nn.Sequential(QuantIdentity(return_quant_tensor=True), layer, QuantReLU())
    x = torch.randn(16, 6)
    calibrated(model, x)
    integers = integer_model(model, x)
    integers(x)
    codes, weight = integers.trace["0.act_quant"], integers.trace["1.weight_quant"]
    assert torch.equal(integers.trace["1.accumulator"], codes @ weight.t())


def test_functions_are_listed_with_their_layers() -> None:
    model, x = build("Gates")
    integers = integer_model(model, x)
    integers(x)
    assert len(integers.functions) == 1 and integers.functions[0].startswith("sigmoid in sigmoid")
    model, x = build("Words")
    integers = integer_model(model, x)
    integers(x)
    assert integers.functions == ["layer_norm in norm"]


def test_golden_vectors_reproduce_a_layer(tmp_path: Path) -> None:
    model, x = build("Depthwise", "powers", 4)
    integers = integer_model(model, x[:2])
    with pytest.raises(ExportError, match="call the integer model first"):
        integers.write_golden(tmp_path)
    integers(x[:2])
    manifest = json.loads(integers.write_golden(tmp_path / "golden", c_header=True).read_text())
    entries = {e["name"]: e for e in manifest["tensors"]}
    held = {n: np.load(tmp_path / "golden" / e["file"]) for n, e in entries.items()}
    roles = {"input", "weight", "bias", "accumulator", "activation", "output"}
    assert {e["role"] for e in entries.values()} == roles
    for name, entry in entries.items():
        assert list(held[name].shape) == entry["shape"] and str(held[name].dtype) == entry["dtype"]
    relu, acc = entries["relu1.act_quant"], entries["conv1.accumulator"]
    assert (relu["bits"], relu["signed"], relu["low"], relu["high"]) == (4, False, 0, 15)
    ratio = np.asarray(acc["scale"]) / relu["scale"]
    codes = np.clip(np.rint(held["conv1.accumulator"] * ratio), 0, 15)
    assert np.array_equal(codes, held["relu1.act_quant"])
    header = tmp_path / "golden" / "golden.h"
    assert "static const uint8_t relu1_act_quant" in header.read_text()
    compiler = shutil.which("cc")
    if compiler:
        subprocess.run([compiler, "-fsyntax-only", "-x", "c", str(header)], check=True)


@pytest.mark.parametrize("name", ["Truncated", "Joined", "Transposed", "LSTM"])
def test_integers_of_other_layers(name: str) -> None:
    model, _ = build(name, "powers", 4)
    report = verify(model, data(NETS[name], 16), "integer")
    assert report.exact, report


def test_a_root_mean_square_has_the_least_number_of_the_models_dtype() -> None:
    model = nn.Sequential(QuantIdentity(), QuantRMSNorm(6))
    x = torch.randn(8, 6) * 1e-3  # so small that it counts
    calibrated(model, x)
    integers = integer_model(model, x)
    with torch.no_grad():
        torch.testing.assert_close(integers(x).float(), model(x), rtol=1e-5, atol=1e-6)
    assert verify(model, x, "integer").explained
