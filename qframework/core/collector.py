"""A number that is collected from activations first and learned afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated, held_number, number_of, parameter_of
from qframework.core.notice import LeftOut, add_left_out
from qframework.core.stats import SEEING_ALL
from qframework.functional import (
    StatisticRule,
    all_finite,
    compute_dtype,
    defined,
    is_recomputing,
)


def running_update(
    running: Tensor, new: Tensor, used: Tensor, momentum: float | None, counts: Tensor
) -> Tensor:
    """The running mean after one more statistic.

    The first statistic is taken as it is; then ``(1 - m) * running + m * new``, in float64, so that a mean of equal numbers is that
    number; with ``momentum=None`` the plain mean of all so far, ``m = 1 / (used + 1)``. A statistic that doesn't count leaves the
    mean alone.

    Args:
        running: the mean, of any shape.
        new: the statistic, of the same shape.
        used: 0-dim integer tensor, of how many statistics ``running`` is the mean.
        momentum: m, None for the plain mean.
        counts: 0-dim bool tensor, whether the batch counts, see :func:`counts`.
    """
    wide = running.dtype if running.device.type == "mps" else torch.float64
    share = 1 / (used + 1).to(wide) if momentum is None else momentum
    mean = (running.to(wide) * (1 - share) + new.to(wide) * share).to(running.dtype)
    mean = torch.where(used == 0, new, mean)
    return torch.where(counts, mean, running)


def counts(statistic: Tensor, x: Tensor, part: nn.Module) -> Tensor:
    """Whether a batch counts: all of its elements are finite; a 0-dim bool tensor.

    Args:
        statistic: of the batch.
        x: the batch.
        part: the module that computed the statistic; that of one which sees all elements tells by itself.
    """
    finite = torch.isfinite(statistic).all()
    return finite if type(part).forward in SEEING_ALL else finite & all_finite(x)


#: What ``collected_steps`` holds once the number is learned.
LEARNED = -1
#: What ``used_batches`` holds then: so many that an average of both counters over models tells it, too.
MANY = 1 << 40


def is_many(used: Tensor) -> Tensor:
    """Whether ``used_batches`` tells that the number is learned, in an average as well."""
    return used >= 1 << 16


class CollectThenLearn(LeftOut, CoreModule):
    """Collects a statistic over the first training steps, then switches to a learned parameter.

    Training calls 1 to N use the statistic of the batch (with its gradient) and update a running mean, which ``value``
    holds too, as it is to be stored. From call N+1 on ``value`` is an ordinary learned parameter. Evaluation uses ``value``;
    a copy that is given the buffers of the model that it was made of, or averages of them, goes by its statistics as long as that
    model collects, since ``value`` is an average then. A batch that holds NaN or infinity is left out of the mean; one warning, by ``left_out``, tells of the first one (after
    compiled steps, the next call or change of mode in eager mode does). Subclasses say what is collected and how it is stored.

    State-dict keys, fixed: ``value``, ``running_stats``, ``collected_steps`` (0 to N while collecting, -1 after),
    ``used_batches`` (how many the mean is made of; 2^40 after). A state dict that holds ``value`` alone is one of a finished collection.
    """

    running_stats: Tensor
    collected_steps: Tensor
    used_batches: Tensor

    def __init__(
        self,
        collect_stats_steps: int,
        shape: tuple[int, ...],
        momentum: float | None,
        neutral: float,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        if isinstance(collect_stats_steps, bool) or not isinstance(collect_stats_steps, int):
            raise TypeError(f"collect_stats_steps must be an int, got {collect_stats_steps!r}")
        if collect_stats_steps < 1:
            raise ValueError(f"collect_stats_steps must be at least 1, got {collect_stats_steps}")
        self.collect_stats_steps, self.momentum = collect_stats_steps, momentum
        #: that the switch has taken place, for those that can't look at ``collected_steps`` without waiting: a compiler, which
        #: then leaves the collection out of graphs, and devices other than the CPU
        self.switched = False
        #: of how many batches the mean was made when this copy was; None for what isn't a copy
        self.used_when_copied: int | None = None
        start = torch.full(shape, neutral, dtype=compute_dtype(dtype), device=device)
        self.register_buffer("running_stats", start.clone())
        self.shape = tuple(shape)
        self.value = parameter_of(start)
        for name in ("used_batches", "collected_steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=start.device))
        add_left_out(self, start.device)

    # ------------------------------------------------------------ for subclasses

    def counts(self, x: Tensor, statistic: Tensor) -> Tensor:
        """Whether a batch counts, a 0-dim bool tensor; see :func:`counts`."""
        return counts(statistic, x, self.statistic_part())

    def statistic_part(self) -> nn.Module:
        """The module that computes the statistic; the collector itself where there is none."""
        return self

    def statistic(self, x: Tensor, *context: Tensor) -> Tensor:
        """The statistic of a batch, in the shape of ``value``."""
        raise NotImplementedError

    def statistic_rule(self, stated: Stated) -> StatisticRule:
        """Which statistic it is, where it is one of all elements that is only put into shape by :meth:`shaped`."""
        raise NotStated("the statistic")

    def shaped(self, statistic: Tensor) -> Tensor:
        """A statistic of all elements as :meth:`statistic` gives it."""
        return statistic.reshape(self.shape)

    def stored(self) -> Tensor:
        """What is stored, in the shape of the statistic."""
        return number_of(self.value, self.shape)

    def held(self) -> Tensor:
        """:meth:`stored`, see :func:`~qframework.core.base.held_number`."""
        return held_number(self.value, self.shape)

    def to_evaluate(self) -> Tensor:
        """What evaluation goes by: what is stored, or what the statistics say, see the class."""
        stored = self.stored()
        if self.used_when_copied is None or self.training:
            return stored
        used = self.used_batches
        follows = (self.collected_steps >= 0) & (used != self.used_when_copied) & ~is_many(used)
        return torch.where(follows & (used > 0), self.to_stored(self.running_stats), stored)

    def to_stored(self, statistic: Tensor) -> Tensor:
        """The content of ``value`` for a statistic."""
        return statistic

    def from_statistic(self, statistic: Tensor, *context: Tensor) -> Tensor:
        """The result of a call that collects."""
        raise NotImplementedError

    def from_stored(self, stored: Tensor, *context: Tensor) -> Tensor:
        """The result of a call that uses what is stored."""
        raise NotImplementedError

    # ------------------------------------------------------------ phases

    def _steps(self) -> int:
        """The counter; 0 on the meta device, where nobody knows."""
        counter: Any = self._buffers["collected_steps"]  # an attribute of a module takes long
        if counter.is_meta:
            return 0
        steps = int(counter)
        return LEARNED if steps >= 0 and bool(is_many(self.used_batches)) else steps

    @property
    def depends_on_input(self) -> bool:
        """Whether the next call collects, or might."""
        return self.training and self._steps() >= 0

    @property
    def has_data(self) -> bool:
        """Whether any batch counts since the collection began; True on the meta device."""
        return self.used_batches.is_meta or int(self.used_batches) > 0

    @property
    def has_statistics(self) -> bool:
        """Whether anything was collected, learned, or written to ``value``; True on the meta device."""
        if self.has_data or self.is_learned:
            return True
        # A copy of a model may be given parameters, and no buffers, as averages of weights are.
        with torch.no_grad():
            return not torch.equal(self.stored(), self.to_stored(self.running_stats))

    @property
    def is_learned(self) -> bool:
        """Whether the switch has taken place."""
        return self._steps() < 0

    @torch.no_grad()
    def finish_collection(self) -> bool:
        """Switch now, with what was collected so far; False when there was nothing.

        Where every batch held NaN or infinity there is nothing: the collection starts again.
        """
        if self.is_learned:
            return True
        self.tell_left_out()
        if not self.has_data:
            self.restart_collection()
            return False
        self.store_running()
        self.collected_steps.fill_(LEARNED)
        self.used_batches.fill_(MANY)
        self.switched = True
        return True

    def is_collecting(self) -> bool:
        """Whether the present call collects; one after the last call that does switches first.

        Raises:
            RuntimeError: it would collect inside a ``torch.func`` transform.
        """
        if not self.training or (self.switched and not self.collected_steps.is_cpu):
            return False
        steps = self._steps()
        self.switched = steps < 0
        if self.switched:
            return False
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "a quantizer that still collects statistics can't do so inside torch.func.grad, vmap or another "
                "transform, where nothing may be written: run some batches first, in training mode or under "
                "qframework.graph.calibration_mode, or call model.eval()"
            )
        if steps >= self.collect_stats_steps and not is_recomputing():
            return not self.finish_collection()
        return True

    @torch.no_grad()
    def restart_collection(self) -> None:
        """Forget what was collected or learned."""
        self.collected_steps.zero_()
        self.used_batches.zero_()
        self.switched = False

    @torch.no_grad()
    def record(self, statistic: Tensor, finite: Tensor) -> None:
        """Count a statistic, and take it into the mean, where the batch counts.

        Args:
            statistic: of the batch, in the shape of ``value``.
            finite: 0-dim bool tensor, whether all elements of the batch are finite.
        """
        used, finite = self.used_batches, finite & torch.isfinite(statistic).all()
        running = running_update(self.running_stats, statistic, used, self.momentum, finite)
        self.running_stats.copy_(running)
        used.add_(finite)
        self.leave_out(finite)
        self.store_running()
        self.collected_steps.add_(1)

    @torch.no_grad()
    def store_running(self) -> None:
        """Let ``value`` hold the running mean, as it is to be stored."""
        stored, value = self.to_stored(self.running_stats).reshape(self.value.shape), self.value
        if not hasattr(value, "device_mesh"):
            value.data.copy_(stored)
            return
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = value.device_mesh  # this process keeps its part
        whole = DTensor.from_local(stored, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value.to_local().copy_(whole.redistribute(placements=value.placements).to_local())  # type: ignore[operator, attr-defined]

    def collect_or_learned(self, x: Tensor, *context: Tensor) -> Tensor:
        """The result for one batch: of its own statistic while collecting, else of the stored number.

        Args:
            x: the batch.
            *context: further tensors for :meth:`from_statistic` and :meth:`from_stored`.
        """
        return collect_or_learned(self, x, *context)

    # ------------------------------------------------------------ state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        used = self.used_batches
        self.used_when_copied = 0 if used.is_meta else int(used)

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A counter of another kind, or a number that can't be learned or collected."""
        if name in ("used_batches", "collected_steps"):
            least = LEARNED if name == "collected_steps" else 0
            return why_no_count(number, least)
        return super().why_refused(name, number, entries)

    def is_as_collected(self, value: Tensor, entries: Mapping[str, Any]) -> bool:
        """Whether ``value`` is that of statistics, of zeros perhaps, which are still collected."""
        steps, statistics = entries.get("collected_steps"), entries.get("running_stats")
        if not isinstance(steps, Tensor) or not isinstance(statistics, Tensor) or steps.is_meta:
            return False
        if not bool((steps >= 0).all()) or statistics.numel() != value.numel():
            return False
        return torch.equal(value, self.to_stored(statistics.detach()).reshape(value.shape))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = ("running_stats", "collected_steps", "used_batches")
        if prefix + "value" in state_dict and not any(prefix + k in state_dict for k in own):
            learned = torch.full_like(self.collected_steps, LEARNED)
            kept = (self.running_stats, learned, self.used_batches)
            state_dict |= dict(zip((prefix + k for k in own), kept, strict=True))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        steps = self.collected_steps
        if prefix + "collected_steps" not in state_dict:
            return
        self.switched = not steps.is_meta and int(steps) < 0
        if self.switched and local_metadata.get("assign_to_params_buffers", False):
            self.used_batches = torch.full_like(self.used_batches, MANY)
        elif self.switched:
            self.used_batches.fill_(MANY)


def why_no_count(number: Tensor, least: int) -> str | None:
    """Why a number can't be a counter; None where it can.

    Args:
        number: of a state dict.
        least: the smallest count.
    """
    whole = torch.isfinite(number) & (number == number.trunc()) & (number >= least)
    return None if bool(whole.all()) else f"whole numbers from {least} on"


def whole_statistic(stated: Stated, statistic: nn.Module, view: nn.Module) -> StatisticRule:
    """What a statistic states, where it is one of all elements.

    Raises:
        NotStated: it is one of channels.
    """
    rule: StatisticRule = stated(statistic)
    if stated(view).channel_axis is not None or rule.axis is not None:
        raise NotStated("the statistic is one of channels")
    return rule


@defined
def is_shared() -> bool:
    """Whether several processes collect together, see :mod:`qframework.processes`."""
    return False


@defined
def share(collector: nn.Module, number: Tensor) -> Tensor:
    """The number that a collecting call goes on with. Where several processes collect together, what follows is averaged.

    Args:
        collector: whose call it is, before it counts the batch.
        number: of the batch.
    """
    return number


@defined
def collect_or_learned(collector: CollectThenLearn, x: Tensor, *context: Tensor) -> Tensor:
    """The result for one batch: of its own statistic while collecting, else of the stored number.

    Args:
        collector: what is collected, and how it is stored.
        x: the batch.
        *context: for the methods of the collector.
    """
    if not collector.is_collecting():
        return collector.from_stored(collector.to_evaluate(), *context)
    if x.numel() == 0:
        return collector.from_stored(share(collector, collector.stored()), *context)
    statistic = share(collector, collector.statistic(x, *context))
    if not is_recomputing():
        now = statistic.detach()
        collector.record(now, collector.counts(x.detach(), now))
    return collector.from_statistic(statistic, *context)
