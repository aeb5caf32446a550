"""Logs of training, in loops and to loggers of several kinds."""

from types import SimpleNamespace

import pytest
import torch
from digits import loss, networks, pairs

from qframework.inspect import QuantizationLogger


class Recorder:
    def __init__(self, name: str) -> None:
        self.seen: list[tuple] = []
        setattr(self, name, self.take)

    def take(self, *args: object, **kwargs: object) -> None:
        self.seen.append((args, kwargs))


def train(logger: QuantizationLogger, model: torch.nn.Module, steps: int = 3) -> None:
    for _ in range(steps):
        loss(model, pairs()[0]).backward()
        logger.step()


def test_scales_widths_and_clipping_are_logged_each_so_many_steps() -> None:
    _, model = networks()
    model.train()
    with QuantizationLogger(model, every=2) as logger:
        train(logger, model)
    assert [r["step"] for r in logger.records] == [0, 2]
    last = logger.records[-1]
    assert last["1.act/scale"] == pytest.approx(model[1].act_quant.scale().item())
    assert last["0.weight/bit_width"] == 4 and 0 <= last["0.input/clipped"] < 0.2
    assert last["0.weight/scale_min"] <= last["0.weight/scale"] <= last["0.weight/scale_max"]
    assert last["1.act/scale_gradient"] > 0
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["log", "log_metrics"])
def test_loggers_of_values_and_step(name) -> None:
    _, model = networks()
    to = Recorder(name)
    train(QuantizationLogger(model, to, prefix="q/"), model, 1)
    (values,), keywords = to.seen[0]
    assert keywords == {"step": 0} and "q/0.weight/scale" in values


def test_tensorboard_gets_scalars_and_functions_and_lists_records() -> None:
    _, model = networks()
    to, records, seen = Recorder("add_scalar"), [], []
    train(QuantizationLogger(model, to), model, 1)
    assert ("0.weight/bit_width", 4.0, 0) in [a for a, _ in to.seen]
    train(QuantizationLogger(model, records), model, 1)
    train(QuantizationLogger(model, lambda values, step: seen.append(step)), model, 2)
    assert records[0]["0.weight/bit_width"] == 4 and seen == [0, 1]
    with pytest.raises(TypeError, match="add_scalar"):
        QuantizationLogger(model, 3)
    with pytest.raises(ValueError, match="every"):
        QuantizationLogger(model, every=0)


def test_a_trainer_calls_it_as_a_callback() -> None:
    _, model = networks()
    to = Recorder("log_metrics")
    trainer = SimpleNamespace(global_step=7, logger=to)
    callback = QuantizationLogger()
    callback.setup(trainer, model, stage="fit")
    callback.on_train_start(trainer, model)
    loss(model, pairs()[0]).backward()
    callback.on_train_batch_end(trainer, model, None, None, 0)
    callback.on_before_zero_grad(trainer, model, None)
    callback.on_train_end(trainer, model)
    assert to.seen[0][1] == {"step": 7} and callback.records[0]["step"] == 7
    with pytest.raises(AttributeError):
        _ = callback.nonsense
