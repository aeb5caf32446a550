"""An export leaves a model as it was, whatever happens."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import build, calibrated

import qframework
from qframework.export import (
    ExportError,
    check_export,
    export_onnx_qcdq,
    export_qonnx,
    export_torch_qcdq,
    integer_model,
    verify,
)
from qframework.export.session import Session
from qframework.export.slots import in_evaluation, slots_of
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU

EXPORTS = {
    "onnx": export_onnx_qcdq,
    "qonnx": export_qonnx,
    "torch": export_torch_qcdq,
    "integer": integer_model,
}


def snapshot(model: nn.Module) -> Any:
    modules = list(model.modules())
    return (
        [m.training for m in modules],
        [id(m) for m in modules],
        {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()},
        [
            sum(
                len(getattr(m, h))
                for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            )
            for m in modules
        ],
        [sorted(vars(m)) for m in modules],
    )


def assert_unchanged(before: Any, after: Any) -> None:
    assert before[0] == after[0] and before[1] == after[1] and before[3:] == after[3:]
    assert before[2].keys() == after[2].keys()
    for name, (identity, value) in before[2].items():
        assert after[2][name][0] == identity
        assert torch.equal(after[2][name][1], value)


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("training", [True, False])
def test_after_an_export_all_is_as_before(kind: str, training: bool) -> None:
    model, x = build("Residual")
    model.train(training)
    model.conv1.register_forward_hook(lambda m, a, out: None)
    model.relu1.eval()
    before = snapshot(model)
    EXPORTS[kind](model, (x[:2],))
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("kind", EXPORTS)
def test_after_a_failure_while_tracing_all_is_as_before(kind: str) -> None:
    class DependsOnValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = QuantIdentity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(x)
            return y if bool(y.sum() > 1e9) else -y

    model = calibrated(DependsOnValues(), torch.randn(4)).train()
    before = snapshot(model)
    with pytest.raises(ExportError) as error:
        EXPORTS[kind](model, torch.randn(4))
    assert len(str(error.value)) < 1500
    assert_unchanged(before, snapshot(model))


def test_after_a_failure_in_the_run_all_is_as_before() -> None:
    model, _ = build("LeNet")
    model.train()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        export_onnx_qcdq(model, (torch.randn(2, 7, 3, 3),))
    assert_unchanged(before, snapshot(model))


def test_a_model_that_is_frozen_stays_frozen() -> None:
    model, x = build("LeNet")
    with qframework.frozen(model):
        export_torch_qcdq(model, (x[:2],))
        assert all(s.proxy.is_frozen for s in slots_of(model))


def test_a_verification_leaves_gradients_and_random_numbers_alone() -> None:
    model, x = build("LeNet")
    state = torch.random.get_rng_state()
    verify(model, x[:2], "integer")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters() if p.dim() > 1)


def test_slots_are_replaced_not_proxies() -> None:
    first = QuantLinear(4, 4, bias=False)
    second = QuantLinear(4, 4, bias=False, weight_quant=first.weight_quant)
    model = calibrated(nn.Sequential(QuantIdentity(), first, second), torch.randn(8, 4))
    session = Session(model, torch.randn(2, 4))
    codes = [session.calls[f"{i}.weight_quant"][0].constants.codes for i in (1, 2)]
    assert codes[0] is not None and codes[1] is not None and not torch.equal(*codes)
    assert verify(model, torch.randn(2, 4), "torch").exact


def test_a_layer_that_runs_twice_has_a_call_for_each() -> None:
    layer = QuantReLU(return_quant_tensor=False)
    model = calibrated(
        nn.Sequential(QuantIdentity(), layer, nn.Hardtanh(), layer), torch.randn(8, 4)
    )
    session = Session(model, torch.randn(2, 4))
    assert [c.name for c in session.order] == ["0.act_quant", "1.act_quant", "1.act_quant#1"]


def test_modes_come_back_after_an_error() -> None:
    model, _ = build("LeNet")
    model.train()
    with pytest.raises(KeyError), in_evaluation(model):
        assert not model.relu1.act_quant.training
        raise KeyError
    assert all(m.training for m in model.modules())


def test_importing_the_library_or_the_package_loads_no_runtime() -> None:
    code = (
        "import sys, qframework, qframework.layers, qframework.export\n"
        "qframework.export.check_export, qframework.export.verify, qframework.export.integer_model\n"
        "qframework.export.export_torch_qcdq\n"
        "names = {m.partition('.')[0] for m in sys.modules}\n"
        "assert not names & {'onnx', 'onnxruntime', 'onnxscript', 'qonnx', 'compressed_tensors'}, names"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_without_onnx_the_extra_is_named() -> None:
    code = (
        "import sys\nsys.modules['onnx'] = None\n"
        "try:\n    from qframework.export import export_onnx_qcdq\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "qframework[export]" in done.stdout


def test_names_that_are_not_there_are_refused() -> None:
    import qframework.export as package

    with pytest.raises(AttributeError):
        package.export_to_paper  # noqa: B018
    assert set(package.__all__) <= set(dir(package))
    assert check_export is package.check_export
