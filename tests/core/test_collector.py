import copy
import warnings

import pytest
import torch

from qframework.core.function_wrapper import OverBatchOverTensorView, OverTensorView
from qframework.core.scaling import ParameterFromRuntimeStatsScaling, RuntimeStatsScaling
from qframework.core.stats import AbsMax
from qframework.layers import QuantIdentity


def scaling(steps: int = 2, **options) -> ParameterFromRuntimeStatsScaling:
    return ParameterFromRuntimeStatsScaling(steps, AbsMax(), **options)


def feed(module: torch.nn.Module, *numbers: float) -> list[float]:
    return [module(torch.tensor([[n]])).item() for n in numbers]


def test_collects_then_learns() -> None:
    module = scaling()
    assert feed(module, 10, 20) == [10, 20]
    assert module.running_stats.item() == pytest.approx(11)
    assert not module.is_learned
    assert feed(module, 30, 40) == pytest.approx([11, 11])
    assert module.is_learned
    assert module.value.item() == pytest.approx(11)


def test_without_momentum_the_mean_is_plain() -> None:
    module = scaling(5, scaling_stats_momentum=None)
    feed(module, 10, 20, 30)
    assert module.running_stats.item() == pytest.approx(20)


def test_evaluation_uses_the_running_mean_and_changes_nothing() -> None:
    module = scaling()
    feed(module, 10)
    module.eval()
    before = copy.deepcopy(module.state_dict())
    assert feed(module, 99, 99) == [10, 10]
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_statistics_phase_has_the_gradient_of_the_statistic() -> None:
    x = torch.tensor([[1.0, -5.0]], requires_grad=True)
    scaling()(x).sum().backward()
    assert x.grad.tolist() == [[0, -1]]


def test_weight_decay_leaves_what_is_collected_alone() -> None:
    module = scaling(3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=0.5)
    for _ in range(3):
        feed(module, 8)
        module.value.grad = torch.zeros_like(
            module.value
        )  # as zero_grad(set_to_none=False) leaves it
        optimizer.step()
    assert feed(module, 1) == [8]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_batch_is_left_out_and_reported(poison) -> None:
    module = scaling(4)
    with pytest.warns(RuntimeWarning, match="NaN or infinity is left out") as found:
        feed(module, 4, poison, poison, 4)
    assert len(found) == 1
    assert module.running_stats.item() == 4
    feed(module, 1)
    assert module.value.item() == 4


@pytest.mark.parametrize("momentum", [None, 0.1, 0.7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["learned", "running"])
def test_the_mean_is_as_if_a_poisoned_batch_had_not_been(kind, where, bad, momentum) -> None:
    def make() -> torch.nn.Module:
        if kind == "learned":
            return scaling(9, scaling_stats_momentum=momentum)
        return RuntimeStatsScaling(AbsMax(), OverTensorView(), (), scaling_stats_momentum=momentum)

    clean, poisoned = make(), make()
    numbers = [6.0, 3.0, 12.0]
    feed(clean, *numbers)
    with pytest.warns(RuntimeWarning, match="left out"):
        feed(poisoned, *numbers[:where], bad, *numbers[where:])
    assert poisoned.eval()(torch.ones(1, 1)).item() == clean.eval()(torch.ones(1, 1)).item()


def test_one_poisoned_channel_leaves_the_whole_batch_out() -> None:
    module = ParameterFromRuntimeStatsScaling(
        9, AbsMax(stats_reduce_dim=1), OverBatchOverTensorView(), (2,), scaling_stats_momentum=None
    )
    for batch in ([[1.0], [2.0]], [[float("nan")], [50.0]], [[3.0], [4.0]]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(torch.tensor(batch))
    assert module.running_stats.tolist() == [2, 3]


def test_when_every_batch_is_poisoned_the_collection_starts_again() -> None:
    module = scaling(2)
    with pytest.warns(RuntimeWarning, match="NaN or infinity is left out"):
        feed(module, float("nan"), float("nan"))
    assert not module.has_statistics
    assert feed(module, 5) == [5]
    assert not module.is_learned
    assert module.running_stats.item() == 5


def test_an_empty_batch_is_not_counted() -> None:
    module = scaling()
    feed(module, 4)
    assert module(torch.zeros(0, 3)).item() == 4
    assert int(module.collected_steps) == 1


def test_keys_are_fixed_at_construction() -> None:
    module = scaling()
    keys = list(module.state_dict())
    feed(module, 1, 2, 3, 4)
    assert (
        list(module.state_dict())
        == keys
        == [
            "value",
            "running_stats",
            "used_batches",
            "collected_steps",
        ]
    )


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_saving_half_way_and_going_on_gives_the_same(calls) -> None:
    module = scaling(2, scaling_stats_momentum=0.3)
    feed(module, *range(1, calls + 1))
    other = scaling(2, scaling_stats_momentum=0.3)
    other.load_state_dict(module.state_dict())
    assert feed(module, 7, 8, 9) == feed(other, 7, 8, 9)


def test_a_state_dict_with_the_value_alone_is_a_finished_one() -> None:
    module = scaling()
    module.load_state_dict({"value": torch.tensor(3.0)})
    assert module.is_learned
    assert feed(module, 100) == [3]


def test_a_different_number_of_steps_can_load_what_was_collected() -> None:
    module = scaling(300)
    feed(module, *[5] * 10)
    short = scaling(4)
    short.load_state_dict(module.state_dict())
    assert feed(short, 1) == [5]
    assert short.is_learned


def test_running_statistics_go_on_after_loading() -> None:
    def make() -> RuntimeStatsScaling:
        return RuntimeStatsScaling(AbsMax(), OverTensorView(), ())

    module, other = make(), make()
    feed(module, 12.9)
    other.load_state_dict(module.state_dict())
    feed(other, 10)
    assert other.runtime_stats.running_stats.item() == pytest.approx(0.9 * 12.9 + 1)


def test_reading_the_scale_changes_no_statistic() -> None:
    layer = QuantIdentity(collect_stats_steps=2)
    layer(torch.ones(4))
    before = copy.deepcopy(layer.state_dict())
    for _ in range(5):
        assert layer.act_quant.scale().item() == pytest.approx(1 / 128)
        layer.act_quant.zero_point()
        layer.act_quant.bit_width()
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert layer.training
    assert layer.act_quant.tensor_quant.training
