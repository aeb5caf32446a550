"""Faults at every point: an exception raised by any function while building, loading, calibrating or converting changes nothing."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import qframework
from qframework.graph import calibration_mode, quantize_model
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloat


class Fault(Exception):
    """Raised on purpose."""


#: What undoes; whoever fails there can't be helped.
UNDOING = {"__exit__", "restore", "release", "put_back", "undo", "unchanged_on_error", "clear"}


@contextmanager
def fault(at: int) -> Iterator[list[int]]:
    """Raise in the call number ``at`` of our functions; gives the number of calls so far."""
    calls = [0]

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or "qframework" not in frame.f_globals.get("__name__", ""):
            return
        if calls[0] > at >= 0 or code.co_flags & 0x20 or code.co_name in UNDOING:  # or a generator
            return
        calls[0] += 1
        if calls[0] == at + 1:
            raise Fault(f"{code.co_qualname} in {frame.f_globals['__name__']}")

    sys.settrace(trace)
    try:
        yield calls
    finally:
        sys.settrace(None)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=3),
        QuantLinear(8, 6, weight_quant=Int8WeightPerChannelFloatMSE),
        QuantReLU(collect_stats_steps=3),
        QuantLinear(6, 4, weight_scaling_impl_type="parameter_from_stats"),
    )


def float_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).eval()


def build(model: nn.Module) -> None:
    """A layer that shares a quantizer."""
    QuantLinear(8, 6, weight_quant=model[1].weight_quant, input_quant=model[0].act_quant)


def load_layer(model: nn.Module) -> None:
    other = net()
    other(torch.randn(16, 8))
    with torch.no_grad():
        other[1].weight.mul_(2)
    model[1].load_state_dict(other[1].state_dict())


def load(model: nn.Module) -> None:
    other = net()
    other(torch.randn(16, 8))
    qframework.load_state_dict(model, other.state_dict())


def calibrate(model: nn.Module) -> None:
    with calibration_mode(model):
        model(torch.ones(16, 8))


def convert(model: nn.Module) -> None:
    quantize_model(model, example_input=torch.randn(2, 8), functions=True)


def freeze(model: nn.Module) -> None:
    with qframework.frozen(model):
        model(torch.randn(2, 8))


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything that a user can see of a model, by contents and identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (id(module), type(module), module.training)
        for place in (module._parameters, module._buffers):
            found |= {f"{name}|{key}": id(t) for key, t in place.items()}
        found[f"{name} hooks"] = sum(
            len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v
        )
        found[f"{name} forward"] = vars(module).get("forward")
        for key in ("tracked_module_list",):
            found[f"{name} {key}"] = [id(m) for m in vars(module).get(key, ())]
        memory = vars(module).get("_memory")
        found[f"{name} frozen"] = memory is not None and memory.frozen
    return found


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t.detach().clone() for k, t in (*model.named_parameters(), *model.named_buffers())}


WAYS: dict[str, tuple[Callable[[nn.Module], None], Callable[[], nn.Module], bool]] = {
    "build": (build, net, False),
    "load a layer": (load_layer, net, False),
    "load": (load, net, False),
    "calibrate": (calibrate, net, False),
    "convert": (convert, float_net, False),
    "freeze": (freeze, net, True),
}


def run(way: str, at: int) -> tuple[int, bool, str]:
    """How many calls were made, whether there was a fault, and what it left changed."""
    work, make, evaluates = WAYS[way]
    model = make()
    if make is net:
        model(torch.randn(16, 8))
    model.train(not evaluates and make is net)
    before, numbers, grad = picture(model), contents(model), torch.is_grad_enabled()
    raised = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fault(at) as calls:
            try:
                work(model)
            except Exception as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, Fault):
                    cause = cause.__cause__ or cause.__context__
                raised = isinstance(cause, Fault)
                where = str(cause)
    if not raised:
        return calls[0], False, ""
    after, now = picture(model), contents(model)
    changed = [k for k in {*before, *after} if before.get(k) != after.get(k)]
    changed += [k for k, t in numbers.items() if k not in now or not torch.equal(t, now[k])]
    if torch.is_grad_enabled() != grad:
        changed.append("grad mode")
    model(torch.randn(2, 8))
    return calls[0], True, f"{where}: {sorted(changed)}" if changed else ""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_fault_anywhere_leaves_the_model_as_it_was(way, dense) -> None:
    total = run(way, -1)[0]
    assert total > 20
    points = range(0, total, max(1, total // (400 if dense else 25)))
    results = [run(way, at) for at in points]
    assert sum(raised for _, raised, _ in results) >= len(results) // 2
    left = [what for _, _, what in results if what]
    assert not left, f"{len(left)} of {len(results)}: " + "\n".join(left[:5])


def test_a_fault_is_found_where_nothing_is_undone() -> None:
    """The test can fail."""
    model = net()
    before = copy.deepcopy(contents(model))
    model(torch.randn(16, 8))
    assert any(not torch.equal(before[k], t) for k, t in contents(model).items())
