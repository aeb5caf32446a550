"""DistributedDataParallel in real processes: ranks have the same scales at every step."""

import contextlib

import torch
from several import Processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qframework
from qframework.graph import calibration_mode
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloatBatchQuant1d,
    ShiftedUint8ActPerTensorFloat,
    Uint8ActPerTensorLSQ,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=3),
        QuantLinear(8, 6, weight_scaling_impl_type="parameter_from_stats"),
        QuantReLU(collect_stats_steps=3),
        QuantLinear(6, 4),
        QuantIdentity(act_quant=Uint8ActPerTensorLSQ),
    )


def state(model: nn.Module) -> list[list[float]]:
    return [t.double().flatten().tolist() for t in model.state_dict().values()]


def train(model: nn.Module, rank: int, steps: int = 6, empty_on: int = -1, sync_every: int = 1):
    """The state after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(100 + rank)
    states = []
    for step in range(steps):
        x = torch.randn(0 if step == 1 and rank == empty_on else 16, 8) * (1 + 3 * rank)
        wait = step % sync_every != sync_every - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            model(x).square().sum().backward()
        if not wait:
            optimizer.step()
            optimizer.zero_grad()
        states.append(state(getattr(model, "module", model)))
    return states


def _train(rank: int, size: int, options: dict, how: dict):
    return train(DistributedDataParallel(net(), **options), rank, **how)


def test_ranks_are_alike_at_every_step_with_the_defaults_of_ddp(three: Processes) -> None:
    first, *others = three(_train, {}, {})
    assert all(other == first for other in others)


def test_ranks_are_alike_without_broadcasts_and_with_an_empty_batch_on_one(two: Processes) -> None:
    first, second = two(_train, {"broadcast_buffers": False}, {"empty_on": 0})
    assert first == second
    first, second = two(_train, {"broadcast_buffers": False}, {"empty_on": 1})
    assert first == second


def test_ranks_are_alike_when_gradients_are_accumulated(two: Processes) -> None:
    first, second = two(_train, {}, {"sync_every": 2})
    assert first[-1] == second[-1]
    assert first[1] == second[1]


def _count(rank: int, size: int):
    calls = []
    plain = torch.distributed.all_reduce

    def counting(*args, **kwargs):
        calls.append(len(calls))
        return plain(*args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        model = DistributedDataParallel(net()[:4])
        counts = []
        for _ in range(5):
            before = len(calls)
            model(torch.randn(16, 8)).sum().backward()
            counts.append(len(calls) - before)
        return counts
    finally:
        torch.distributed.all_reduce = plain


def test_one_all_reduce_a_step_and_none_once_scales_are_learned(two: Processes) -> None:
    assert two(_count) == [[1, 1, 1, 0, 0]] * 2


def _without(rank: int, size: int):
    with qframework.settings.use(reduce_statistics="never"):
        model = DistributedDataParallel(net(), broadcast_buffers=False, find_unused_parameters=True)
        return train(model, rank, steps=2)[-1]


def test_the_setting_turns_the_reduction_off(two: Processes) -> None:
    first, second = two(_without)
    assert first != second


def _running(rank: int, size: int):
    act = QuantIdentity(act_quant=Int8ActPerTensorFloatBatchQuant1d)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), act), broadcast_buffers=False)
    torch.manual_seed(rank)
    scales = []
    for _ in range(3):
        model(torch.randn(4, 5, 3) * (1 + rank)).sum().backward()
        scales.append(act.act_quant.scale().tolist())
    return scales


def test_running_statistics_are_reduced_too(two: Processes) -> None:
    first, second = two(_running)
    assert first == second


def batches() -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(8, 8) * (1 + i) for i in range(7)]


def _calibrate(rank: int, size: int):
    model = net().eval()
    mine = batches()[rank::size] if rank < size - 1 or size < 3 else []
    with torch.no_grad(), calibration_mode(model):
        for x in mine:
            model(x)
    return [model[i].act_quant.scale().item() for i in (0, 2, 4)], mine


def test_calibration_on_shards_gives_the_scales_of_one_process_over_all_data(two, three) -> None:
    for processes in (two, three):  # the last of three has no data
        results = processes(_calibrate)
        assert all(scales == results[0][0] for scales, _ in results)
        model = net().eval()
        with torch.no_grad(), calibration_mode(model):
            for _, mine in results:
                for x in mine:
                    model(x)
        expected = [model[i].act_quant.scale().item() for i in (0, 2, 4)]
        assert torch.allclose(torch.tensor(results[0][0]), torch.tensor(expected), rtol=1e-6)


def _one_loads(rank: int, size: int):
    model = net()
    if rank == 0:  # alone, and nobody waits for the others
        for _ in range(5):
            model(torch.rand(16, 8))
    return train(DistributedDataParallel(model), rank, steps=3)


def test_what_rank_0_has_learned_alone_is_what_all_go_on_with(two: Processes) -> None:
    first, second = two(_one_loads)
    assert first == second


def test_one_process_alone_finds_all_parameters_used(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        states = train(DistributedDataParallel(net()), 0, 6)
    finally:
        torch.distributed.destroy_process_group()
    alone = train(net(), 0, 6)
    assert states == alone
