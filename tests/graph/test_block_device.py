"""Blocks that are on another device for their turn."""

import pytest
import torch
from torch import nn

from qframework.graph import ptq, solvers
from qframework.graph.block_device import on_device
from qframework.graph.block_plan import Unit
from tests.graph.block_network import batches, blocks
from tests.graph.fake_device import THERE, FakeDevice
from tests.graph.test_by_block import IN_BLOCKS, recipe, same

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model left layers")
UNITS = ["embedding", "layers.0", "layers.1", "layers.2", "head"]


@pytest.fixture
def moves(monkeypatch) -> list[tuple[nn.Module, torch.device]]:
    found: list[tuple[nn.Module, torch.device]] = []
    real = nn.Module.to

    def to(self, *args, **kwargs):
        found.append((self, torch.device(*args)))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    return found


def away(*steps) -> dict:
    return {**recipe(*steps), "device": str(THERE)}


@pytest.mark.parametrize(
    "step",
    ["gptq", {"step": "qronos", "act_order": True}, {"step": "learned_round", "steps": 2}, {**IN_BLOCKS, "steps": 2}, "bias_correction"],
    ids=["gptq", "qronos", "adaround", "blocks", "bias"],
)  # fmt: skip
def test_each_block_has_its_turn_on_the_device_and_comes_back(step, moves) -> None:
    net = blocks()
    before = {n: (p, p.data_ptr(), p.clone()) for n, p in net.named_parameters()}
    wanted, _ = ptq(net, batches(), recipe(step), by_block=True)
    assert not moves
    with FakeDevice() as device:
        model, report = ptq(net, batches(), away(step), by_block=True)
    names = {m: n for n, m in model.named_modules()}
    assert [(names[m], d) for m, d in moves] == [
        (n, d) for n in UNITS for d in (THERE, torch.device("cpu"))
    ]
    assert not device.holds(model)
    assert same(wanted, model)
    assert report.sqnr > 10
    for name, p in net.named_parameters():
        assert p is before[name][0]
        assert p.data_ptr() == before[name][1]
        assert torch.equal(p, before[name][2])
        assert not device.has(p)
    assert model.embedding.weight is net.embedding.weight  # unchanged, so the same


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_block_comes_back_when_something_is_raised(error, moves, monkeypatch) -> None:
    net = blocks()
    pointers = [p.data_ptr() for p in net.parameters()]
    real, count = solvers.gptq, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 6:
            raise error("stopped")
        return real(*args)

    monkeypatch.setattr(solvers, "gptq", interrupted)
    with FakeDevice() as device, pytest.raises(error):
        ptq(net, batches(), away("gptq"), by_block=True)
    assert [d for _, d in moves] == [THERE, torch.device("cpu")] * 3  # the embedding, two blocks
    assert not any(device.holds(m) for m, _ in moves)
    assert [p.data_ptr() for p in net.parameters()] == pointers


def test_weights_that_are_read_and_offloaded_go_there_and_back(moves, tmp_path) -> None:
    state = blocks().state_dict()
    with torch.device("meta"):
        empty = blocks()
    wanted, _ = ptq(blocks(), batches(), recipe("gptq"), by_block=True)
    with FakeDevice() as device:
        model, _ = ptq(empty, batches(), away("gptq"), weights=state, offload=tmp_path)
    assert len(moves) == 2 * len(UNITS)
    assert not device.holds(model)
    assert same(wanted, model)


def test_only_one_block_is_there_at_a_time(monkeypatch) -> None:
    seen = []
    with FakeDevice() as device:
        real = nn.Module.to

        def to(self, target):
            found = real(self, target)
            there = [m for m in {*known, self} if device.holds(m)]
            known.add(self)
            seen.append(len(there))
            return found

        known: set[nn.Module] = set()
        monkeypatch.setattr(nn.Module, "to", to)
        ptq(blocks(), batches(), away("gpfq"), by_block=True)
    assert seen == [1, 0] * len(UNITS)


def test_a_module_put_in_the_place_of_the_block_comes_back_too() -> None:
    layer = nn.Linear(3, 3)
    unit = Unit("layer", layer)
    with FakeDevice() as device:
        with on_device(unit, THERE):
            assert device.holds(layer)
            layer.bias = nn.Parameter(torch.ones_like(layer.bias))
            unit.module = nn.Sequential(layer, nn.BatchNorm1d(3).to(THERE))
        assert not device.holds(unit.module)
    assert torch.equal(layer.bias, torch.ones(3))


def test_a_device_that_there_is_not_is_refused_before_any_work() -> None:
    seen = []
    for name in ("privateuseone:7", "nonsense"):
        with pytest.raises(ValueError, match=f"device='{name}' of the recipe can't be used here"):
            ptq(blocks(), lambda m: seen.append(m), {**recipe(), "device": name}, by_block=True)
    assert not seen
