"""What is no model is refused by the function that was called; arguments that can't be, by what is allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qframework
from qframework import export, graph, inspect
from qframework.graph.gptq import gptq
from qframework.inject import ImmutableQuantizerError
from qframework.layers import QuantLinear, QuantLSTM
from qframework.quantizers import Int8WeightPerTensorFloat

X = torch.ones(2, 4)


def enter(context: Any) -> None:
    with context:
        pass


CALLS: list[tuple[str, Callable[[Any, Path], Any]]] = [
    ("calibration_mode", lambda m, _: enter(graph.calibration_mode(m))),
    ("bias_correction_mode", lambda m, _: enter(graph.bias_correction_mode(m))),
    ("frozen", lambda m, _: enter(qframework.frozen(m))),
    ("ptq", lambda m, _: graph.ptq(m, [X], "w8a8")),
    ("gptq_mode", lambda m, _: gptq(m, [X])),
    ("search_bit_widths", lambda m, _: graph.search_bit_widths(m, [X])),
    ("summary", lambda m, _: graph.summary(m)),
    ("sensitivity", lambda m, _: inspect.sensitivity(m, [X])),
    ("collect_statistics", lambda m, _: inspect.collect_statistics(m, [X])),
    ("compare", lambda m, _: inspect.compare(nn.Linear(4, 4), m, [X])),
    ("report", lambda m, _: inspect.report(m, [X])),
    ("detect_anomaly", lambda m, _: enter(inspect.detect_anomaly(m))),
    ("integers", lambda m, _: inspect.integers(m)),
    ("QuantizationLogger", lambda m, _: inspect.QuantizationLogger(m)),
    ("check_export", lambda m, _: export.check_export(m)),
    ("verify", lambda m, _: export.verify(m, X)),
    ("export_onnx_qcdq", lambda m, _: export.export_onnx_qcdq(m, X)),
    ("export_qonnx", lambda m, _: export.export_qonnx(m, X)),
    ("export_torch_qcdq", lambda m, _: export.export_torch_qcdq(m, X)),
    ("integer_model", lambda m, _: export.integer_model(m, X)),
    ("save_quantized", lambda m, folder: export.save_quantized(m, folder)),
    ("load_quantized", lambda m, folder: export.load_quantized(folder, m)),
]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[n for n, _ in CALLS])
def test_a_model_and_its_report_are_no_model(
    name: str, call: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    both = (nn.Linear(4, 4), "a report")
    with pytest.raises(TypeError, match=rf"^{name}: .* got a tuple; quantize_model and ptq"):
        call(both, tmp_path)
    with pytest.raises(TypeError, match="got a type; make an instance"):
        call(nn.Linear, tmp_path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m: graph.quantize_model(m, rules=graph.Rule("0", keep_float=True)),
            r"\[Rule\(...\)\]",
        ),
        (lambda m: graph.search_bit_widths(m, [X], budget=4), "mean_bits.* got 4"),
        (lambda m: export.export_onnx_qcdq(m, X, opset=13), "Did you mean 'opset_version'"),
        (
            lambda m: export.export_onnx_qcdq(m, X, opset_version="21"),
            "'21' is a str; .*whole numbers 20 to",
        ),
        (lambda m: QuantLSTM(4, 3, proj_size=2), "proj_size.*QuantLinear behind"),
    ],
)
def test_arguments_that_cannot_be_say_what_can(
    call: Callable[[nn.Module], Any], words: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call(nn.Sequential(QuantLinear(4, 4)).eval())


def test_a_projection_of_size_0_is_none() -> None:
    assert QuantLSTM(4, 3, proj_size=0)(torch.ones(2, 1, 4))[0].shape == (2, 1, 3)


@pytest.mark.parametrize("given", [None, Int8WeightPerTensorFloat])
def test_a_quantizer_is_not_taken_away_by_assignment(given: Any) -> None:
    layer = QuantLinear(4, 4)
    with pytest.raises(ImmutableQuantizerError, match=r"QuantLinear.weight_quant.*disable_quant"):
        layer.weight_quant = given
    layer.weight_quant.disable_quant = True
    torch.testing.assert_close(layer(X), nn.functional.linear(X, layer.weight, layer.bias))
