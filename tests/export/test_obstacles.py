"""What stands in the way is told before anything is traced: all of it, by name, with what works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import build, calibrated

from qframework.export import (
    ExportError,
    check_export,
    export_onnx_qcdq,
    export_qonnx,
    export_torch_qcdq,
    integer_model,
    verify,
)
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU, TruncAvgPool2d
from qframework.quantizers import (
    Fp6e3m2OCPWeightPerTensorFloat,
    Int8DynamicActPerTensorFloat,
    Int8WeightPerGroupFloat,
    MXFloat8e4m3Weight,
    NF4WeightPerTensorFloat,
)


def net(*layers: nn.Module) -> nn.Module:
    return calibrated(nn.Sequential(*layers), torch.randn(4, 8))


def linear(**keywords: Any) -> QuantLinear:
    return QuantLinear(8, 8, **keywords)


#: A model, the target, words of the message.
CASES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "codebook": (
        lambda: net(linear(weight_quant=NF4WeightPerTensorFloat)),
        "onnx_qcdq",
        ("0.weight", "NF4WeightPerTensorFloat", "codebook", "torch.export.export"),
    ),
    "16 bits": (
        lambda: net(QuantIdentity(bit_width=16), linear(weight_bit_width=12)),
        "onnx_qcdq",
        ("0.act", "1.weight", "needs opset_version=21"),
    ),
    "20 bits": (lambda: net(QuantIdentity(bit_width=20)), "onnx_qcdq", ("16 at most", "QONNX")),
    "floor": (
        lambda: net(QuantIdentity(float_to_int_impl_type="floor")),
        "onnx_qcdq",
        ("'floor'", "qonnx", "float_to_int_impl_type='round'"),
    ),
    "dpu": (
        lambda: net(QuantIdentity(float_to_int_impl_type="dpu")),
        "qonnx",
        ("'dpu'", "integer have it"),
    ),
    "no data": (lambda: nn.Sequential(QuantReLU()), "qonnx", ("seen no data", "calibrat")),
    "dynamic": (
        lambda: net(linear(input_quant=Int8DynamicActPerTensorFloat)),
        "torch_qcdq",
        ("0.input", "another for each input", "Int8ActPerTensorFloat"),
    ),
    "groups": (
        lambda: net(linear(weight_quant=Int8WeightPerGroupFloat, weight_group_size=4)),
        "onnx_qcdq",
        ("groups", "opset_version=21"),
    ),
    "microscaling": (
        lambda: net(linear(weight_quant=MXFloat8e4m3Weight, weight_group_size=4)),
        "onnx_qcdq",
        ("minifloats in groups", "QONNX"),
    ),
    "other minifloats": (
        lambda: net(linear(weight_quant=Fp6e3m2OCPWeightPerTensorFloat)),
        "onnx_qcdq",
        ("e3m2", "QONNX"),
    ),
    "nothing": (lambda: nn.Linear(8, 8), "integer", ("nothing", "quantize_model")),
    "chance": (
        lambda: net(
            QuantIdentity(float_to_int_impl_type="stochastic_round", deterministic_inference=False)
        ),
        "integer",
        ("by chance", "deterministic_inference=True"),
    ),
}
EXPORTS: dict[str, Any] = {
    "onnx_qcdq": export_onnx_qcdq,
    "qonnx": export_qonnx,
    "torch_qcdq": export_torch_qcdq,
    "integer": integer_model,
}


@pytest.mark.parametrize("case", CASES)
def test_an_obstacle_is_named_with_what_works(case: str) -> None:
    make, target, words = CASES[case]
    model = make()
    found = check_export(model, target)
    assert found
    text = "\n".join(map(str, found))
    assert all(word in text for word in words), text
    with pytest.raises(ExportError) as error:
        EXPORTS[target](model, torch.randn(2, 8))
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message) < 1500
    assert isinstance(error.value, ValueError) and isinstance(error.value, RuntimeError)


def test_a_model_without_obstacles_has_none() -> None:
    model, _ = build("LeNet")
    assert all(check_export(model, target) == [] for target in EXPORTS)


def test_16_bits_and_groups_have_no_obstacle_at_opset_21() -> None:
    model = net(
        QuantIdentity(bit_width=16),
        linear(weight_quant=Int8WeightPerGroupFloat, weight_group_size=4),
    )
    assert len(check_export(model, "onnx_qcdq")) == 2
    assert check_export(model, "onnx_qcdq", 21) == []


def test_all_obstacles_are_told_at_once_and_shortly() -> None:
    layers = [linear(weight_quant=NF4WeightPerTensorFloat) for _ in range(40)]
    model = net(*layers)
    assert [o.layer for o in check_export(model, "qonnx")] == [str(i) for i in range(40)]
    with pytest.raises(ExportError, match="40 obstacles") as error:
        export_qonnx(model, torch.randn(2, 8))
    assert len(str(error.value)) < 1500 and "more, see" in str(error.value)


def test_nothing_is_traced_when_there_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(torch.export, "export", fail)
    model = net(QuantIdentity(bit_width=16))
    with pytest.raises(ExportError):
        export_onnx_qcdq(model, torch.randn(2, 8))


class OwnQuantizer(nn.Module):
    """Not what its scale says."""

    def forward(self, x: Tensor) -> Any:
        one = torch.ones(())
        return torch.round(x) * 0.75, one, torch.zeros(()), one * 8


def test_what_only_a_run_tells_is_told_before_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(QuantIdentity(), linear())
    model[0].act_quant.register_forward_hook(lambda m, a, out: out.replace(value=out.value * 2))

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ExportError, match=r"0\.act.*computes something else"):
        export_torch_qcdq(model, torch.randn(2, 8))


def test_float64_is_refused_for_onnx_and_taken_by_torch() -> None:
    model, x = build("LeNet", "powers")
    model = model.double()
    with pytest.raises(ExportError, match=r"float64.*model\.float\(\)"):
        export_onnx_qcdq(model, x.double())
    assert verify(model, x[:4].double(), "torch").exact


def test_unknown_targets_and_keywords_are_refused() -> None:
    model, x = build("LeNet")
    with pytest.raises(ValueError, match="'onnx_qcdq'"):
        check_export(model, "tensorrt")
    with pytest.raises(ValueError, match="'onnxruntime'"):
        verify(model, x[:2], "tensorrt")
    with pytest.raises(TypeError, match="opset"):
        export_onnx_qcdq(model, x[:2], opset=20)  # type: ignore[call-arg]
    with pytest.raises(ExportError, match="exactly one"):
        export_onnx_qcdq(model)
    with pytest.raises(ExportError, match="opset_version=40"):
        export_onnx_qcdq(model, x[:2], opset_version=40)


def test_a_truncation_rounds_as_it_says_in_qcdq() -> None:
    model = nn.Sequential(
        QuantReLU(return_quant_tensor=True), TruncAvgPool2d(2, float_to_int_impl_type="floor")
    )
    calibrated(model, torch.randn(4, 2, 4, 4))
    assert check_export(model, "onnx_qcdq") == []
    assert verify(model, torch.randn(4, 2, 4, 4), "onnxruntime").exact
