"""Threads, forks, queues and shared memory: right numbers, and no crash."""

from __future__ import annotations

import copy
import os
import threading
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from qframework.layers import QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import Int8ActPerTensorFloat

SIZE = 96  # fused functions run, and those in C++


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantLinear(SIZE, SIZE, input_quant=Int8ActPerTensorFloat, input_collect_stats_steps=2),
        QuantReLU(collect_stats_steps=2),
        QuantLinear(SIZE, 4, weight_scaling_impl_type="parameter_from_stats"),
    )


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 4, seed: int = 1) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(seed + step)).square().mean().backward()
        optimizer.step()
    return model


def result(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).clone()


def test_threads_that_train_and_evaluate_copies_get_what_one_gets_alone() -> None:
    alone = [result(train(net(), seed=10 * n)) for n in range(4)]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = result(train(models[number], seed=10 * number))

    for _ in range(3):
        models = [copy.deepcopy(net()) for _ in range(4)]
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, expected in enumerate(alone):
            torch.testing.assert_close(found[number], expected, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = train(net(), 6), train(net(), 6)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(result(first), result(second))


def test_threads_share_one_model_in_evaluation() -> None:
    model, found = train(net()).eval(), []
    expected = result(model)

    def work() -> None:
        found.extend(result(model) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(torch.equal(f, expected) for f in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_fork_after_parallel_work_gives_the_same_numbers() -> None:
    model = train(net())
    expected = result(model)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no exception may get out, since pytest would go on in both
        code = 1
        try:
            torch.set_num_threads(1)
            code = 0 if torch.allclose(result(model), expected, atol=1e-6) else 2
            train(model, 1)
        except BaseException:
            code = 3
        finally:
            os._exit(code)
    os.close(read), os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _elsewhere(model: nn.Module, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    layer = QuantIdentity(return_quant_tensor=True, collect_stats_steps=1)
    quantized = layer(inputs())
    results.put((quantized, quantized.int()))
    tasks.get()
    train(model, 2)  # what it shares with the other
    results.put(None)
    tasks.get()


@pytest.mark.slow
def test_quantized_tensors_pass_queues_and_a_second_process_trains_what_is_shared() -> None:
    model = train(net())
    model.share_memory()
    before = result(model)
    model.train()
    context = mp.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    process = context.Process(target=_elsewhere, args=(model, tasks, results))
    process.start()
    try:
        quantized, integers = results.get(timeout=120)
        assert torch.equal(quantized.int(), integers)
        assert torch.equal((quantized + 0.0 * quantized).value, quantized.value)
        tasks.put(True)
        assert results.get(timeout=120) is None
        after = result(model)
        fresh = net()
        fresh.load_state_dict(model.state_dict())
        assert not torch.equal(after, before)
        assert torch.equal(result(fresh), after)
    finally:
        tasks.put(True)
        process.join(60)
    assert process.exitcode == 0
