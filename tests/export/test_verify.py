"""verify finds faults in files, in the right layer, and excuses nothing but rounding errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from zoo import build, calibrated

from qframework.export import ExportError, export_onnx_qcdq, export_qonnx, verify
from qframework.export import targets as targets_module
from qframework.layers import QuantIdentity, QuantLinear
from qframework.quantizers import (
    Int8ActPerTensorFixedPoint,
    Int8WeightPerTensorFixedPoint,
    Int32Bias,
)


def changed(proto: onnx.ModelProto, name: str, how: Any) -> onnx.ModelProto:
    """A copy in which one constant is another."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for t in copy.graph.initializer:
        if t.name == name:
            array = numpy_helper.to_array(t).copy()
            t.CopyFrom(numpy_helper.from_array(how(array), name))
            return copy
    raise KeyError(f"{name} is none of {[t.name for t in copy.graph.initializer]}")


def one_more(array: Any) -> Any:
    array.reshape(-1)[-1] += 1 if array.reshape(-1)[-1] <= 0 else -1
    return array


def larger(array: Any) -> Any:
    return (array * 1.01).astype(array.dtype)


#: The constant, what becomes of it, the layer and the tensor.
FAULTS = {
    "weight": ("conv2.weight_quant.codes", one_more, "conv2", "weight"),
    "weight scale": ("conv2.weight_quant.scale", larger, "conv2", "weight"),
    "bias": ("fc.bias_quant.codes", lambda a: a + 3, "fc", "bias"),
    "bias scale": ("conv1.bias_quant.scale", larger, "conv1", "bias"),
    "activation scale": ("relu1.act_quant.scale", larger, "relu1", "act"),
    "zero point": ("image.act_quant.zero_point", lambda a: a + 1, "image", "act"),
    "zero point before rounding": (
        "image.act_quant.zero_point.spread",
        lambda a: a + 1,
        "image",
        "act",
    ),
}


@pytest.fixture(scope="module")
def exported() -> Any:
    model, x = build("LeNet", "shifted")
    return model, x[:8], export_onnx_qcdq(model, x[:8])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_file_is_found_in_its_layer(fault: str, exported: Any) -> None:
    model, x, proto = exported
    name, how, layer, tensor = FAULTS[fault]
    report = verify(model, x, changed(proto, name, how))
    assert not report.exact and not report.explained
    assert report.first is not None
    assert (report.first.layer, report.first.tensor) == (layer, tensor)
    assert not report.first.explained
    assert f"{layer}.{tensor}" in str(report) and "Not the same" in str(report)


def test_a_fault_in_a_float_bias_is_found_in_its_layer() -> None:
    model, x = build("Signs", "powers")
    proto = export_onnx_qcdq(model, x[:4])
    report = verify(model, x[:4], changed(proto, "conv2.bias", larger))
    assert report.first is not None
    assert (report.first.layer, report.first.tensor) == ("conv2", "bias")
    assert not report.explained


def test_a_fault_in_a_qonnx_file_is_found() -> None:
    pytest.importorskip("qonnx")
    model, x = build("LeNet", "powers")
    proto = export_qonnx(model, x[:4])
    report = verify(model, x[:4], changed(proto, "conv2.weight_quant.value", larger))
    assert verify(model, x[:4], proto).exact
    assert report.first is not None and report.first.layer == "conv2"


def test_a_file_by_its_path(tmp_path: Path, exported: Any) -> None:
    model, x, proto = exported
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    report = verify(model, x, tmp_path / "net.onnx")
    assert report.explained and report.targets == ["net.onnx"]
    assert verify(model, x, str(tmp_path / "net.onnx")).explained


def test_files_that_cannot_be_read_or_do_not_fit_are_refused(tmp_path: Path, exported: Any) -> None:
    model, x, proto = exported
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString()[:999])
    with pytest.raises(ExportError) as error:
        verify(model, x, tmp_path / "bad.onnx")
    assert len(str(error.value)) < 1500
    with pytest.raises(ExportError, match="reading"):
        verify(model, x, tmp_path / "absent.onnx")
    other, y = build("Gates")
    with pytest.raises(ExportError):
        verify(other, y[:2], proto)


def test_a_model_changed_after_its_export_is_told_apart(exported: Any) -> None:
    model, x, proto = exported
    weight = model.fc.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0] = weight[0].flip(0)
    report = verify(model, x, proto)
    with torch.no_grad():
        weight.copy_(before)
    assert report.first is not None and (report.first.layer, report.first.tensor) == (
        "fc",
        "weight",
    )


def test_ties_of_rounding_errors_are_explained_and_others_are_not() -> None:
    model, _ = build("LeNet", "channel", 8)
    torch.manual_seed(3)
    x = torch.randn(1500, 1, 12, 12)
    report = verify(model, x, "integer")
    assert not report.exact and report.explained
    assert all(r.largest < 1.01 for r in report.rows if r.differing and r.tensor != "output")
    assert report.first is not None and "tie" in report.first.cause


def test_one_target_several_and_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("Depthwise", "powers")
    assert verify(model, x[:2], ["integer", "torch"]).targets == ["integer", "torch"]
    monkeypatch.setitem(targets_module.NEEDS, "qonnx", "a_package_that_is_not_there")
    report = verify(model, x[:2])
    assert report.targets == ["integer", "torch", "onnxruntime"]
    assert "not installed" in report.skipped["qonnx"] and "qonnx skipped" in str(report)


def test_what_a_target_cannot_hold_is_skipped_unless_it_is_asked_for() -> None:
    model, x = build("Depthwise", "powers")
    model.last = QuantIdentity(
        float_to_int_impl_type="floor", scaling_impl_type="const", scaling_init=2.0
    )
    report = verify(model.eval(), x[:2])
    assert "onnxruntime" in report.skipped and report.exact
    with pytest.raises(ExportError, match="floor"):
        verify(model, x[:2], "onnxruntime")


def test_the_defaults_of_onnxruntime_are_rows_apart() -> None:
    model, x = build("Residual")
    report = verify(model, x, "onnxruntime")
    assert {r.target for r in report.apart} == {"onnxruntime (defaults)"}
    assert all("defaults" not in r.target for r in report.rows)
    assert "onnxruntime (defaults)" in str(report)


def test_the_report_is_a_table_and_a_sentence() -> None:
    model, x = build("Depthwise", "powers")
    report = verify(model, x[:4], "torch")
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "target",
        "layer",
        "tensor",
        "elements",
        "differing",
        "largest",
        "cause",
    ]
    assert lines[-1].startswith("Exact: all ") and report.first is None
    assert {(r.layer, r.tensor) for r in report.rows} >= {("conv1", "weight"), ("relu1", "act")}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bias_quant": Int32Bias}])
def test_a_layer_by_itself(options: dict[str, Any]) -> None:
    layer = QuantLinear(
        4,
        3,
        weight_quant=Int8WeightPerTensorFixedPoint,
        input_quant=Int8ActPerTensorFixedPoint,
        **options,
    )
    x = torch.randn(8, 4)
    nn.Sequential(layer)(x)
    report = verify(layer.eval(), x)
    assert report.exact and report.first is None


class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = QuantIdentity(return_quant_tensor=True)
        self.fc = QuantLinear(8, 4, return_quant_tensor=True, bias_quant=Int32Bias)

    def forward(self, x: Tensor) -> Any:
        y = self.act(x)
        return y, None, {"scores": self.fc(y), "largest": torch.argmax(y, -1)}


def test_quantized_nested_and_missing_outputs() -> None:
    x = torch.randn(4, 8)
    model = calibrated(ManyOutputs(), x)
    report = verify(model, x, ["integer", "torch", "onnxruntime"])
    outputs = [r for r in report.rows if r.tensor.startswith("output")]
    assert report.exact and len(outputs) == 9, report


class OneScale(nn.Module):
    """Sums of tensors whose quantizers have equal scales."""

    def __init__(self) -> None:
        super().__init__()
        options: Any = {
            "scaling_impl_type": "const",
            "scaling_init": 4.0,
            "return_quant_tensor": True,
        }
        self.a, self.b = QuantIdentity(**options), QuantIdentity(**options)
        self.fc = QuantLinear(8, 4, bias_quant=Int32Bias, return_quant_tensor=True)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.a(x) + self.b(-2 * x))


def test_equal_scales_of_several_quantizers_can_be_added() -> None:
    assert verify(OneScale().eval(), torch.randn(4, 8), ["torch", "onnxruntime"]).exact


def test_a_graph_that_lost_a_quantizer_or_an_output_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qframework.export import onnx_file

    model, x = build("Depthwise", "powers")
    found = onnx_file.live_calls
    monkeypatch.setattr(
        onnx_file, "live_calls", lambda program: [*found(program), "lost.act_quant"]
    )
    with pytest.raises(ExportError, match=r"lost 1 of 8 quantizers, such as lost\.act_quant"):
        export_onnx_qcdq(model, x[:2])
