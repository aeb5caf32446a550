"""A number that is collected from activations first and learned afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, is_recomputing, wide_dtype
from qframework.functional.autograd import transforms_active


def running_update(running: Tensor, new: Tensor, used: Tensor, momentum: float | None) -> Tensor:
    """The running mean after one more statistic.

    The first statistic is taken as it is; then ``(1 - m) * running + m * new``, or with ``momentum=None`` the plain
    mean of all so far. A statistic that isn't finite, in any of its elements, leaves the mean alone.

    Args:
        running: the mean, of any shape.
        new: the statistic, of the same shape.
        used: 0-dim integer tensor, of how many statistics ``running`` is the mean.
        momentum: m, None for the plain mean.
    """
    if momentum is None:
        mean = running + (new - running) / (used + 1)
    else:
        mean = torch.where(used == 0, new, running * (1 - momentum) + new * momentum)
    return torch.where(torch.isfinite(new).all(), mean, running)


_LEARNED = -1


class CollectThenLearn(CoreModule):
    """Collects a statistic over the first training steps, then hands it over to a parameter.

    Training calls 1 to N use the statistic of the batch (with its gradient) and update a running mean. Call N+1
    stores the mean in ``value``, from then on an ordinary learned parameter. In evaluation mode the running mean
    stands in until the hand-over. A batch whose statistic isn't finite is left out of the mean;
    the hand-over warns of such batches (not under a compiler, where nothing can be said). Subclasses say what is collected and how it is stored.

    State-dict keys, fixed: ``value``, ``running_stats``, ``collected_steps`` (0 to N while collecting, -1 after),
    ``used_batches`` (how many the mean is made of). A state dict that holds ``value`` alone is one of a finished collection.
    """

    running_stats: Tensor
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
        #: that the hand-over has taken place, where Python knows: a compiler then leaves the collection out
        self.settled = False
        start = torch.full(shape, neutral, dtype=wide_dtype(dtype), device=device)
        self.register_buffer("running_stats", start.clone())
        self.value = nn.Parameter(start)
        # On the CPU wherever the module is, so that reading it costs no synchronisation.
        self.collected_steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self.register_buffer(
            "used_batches", torch.zeros((), dtype=torch.int64, device=self.value.device)
        )

    # ------------------------------------------------------------ for subclasses

    def view_of(self, x: Tensor) -> Tensor:
        """The batch in the shape that the statistic reduces."""
        raise NotImplementedError

    def reduce(self, viewed: Tensor, *context: Tensor) -> Tensor:
        """The statistic of a viewed batch, in the shape of ``value``."""
        raise NotImplementedError

    def reduce_if(self, x: Tensor, wanted: Tensor) -> Tensor | None:
        """The statistic of a batch where ``wanted``, else any number; None where a branch is needed for that."""
        return None

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

    @property
    def unread(self) -> Collection[str]:
        """What was collected counts for nothing once it is handed over."""
        collected = ("running_stats", "collected_steps", "used_batches") if self.settled else ()
        return (*self._constants, *collected)

    @property
    def repeatable(self) -> bool:
        """Training calls are counted."""
        return not self.training

    @property
    def looks_at_input(self) -> bool:
        """Whether the next call collects, or might."""
        return self.training and int(self.collected_steps) >= 0

    @property
    def has_statistics(self) -> bool:
        """Whether anything was collected or learned."""
        return int(self.collected_steps) < 0 or self._batches_used() > 0

    @property
    def is_learned(self) -> bool:
        """Whether the hand-over has taken place."""
        return int(self.collected_steps) < 0

    def _batches_used(self) -> int:
        """How many batches the mean is made of; on the meta device, where nobody knows, all of them."""
        return int(self.collected_steps if self.used_batches.is_meta else self.used_batches)

    @torch.no_grad()
    def finish_collection(self) -> bool:
        """Hand over now what was collected so far; False when there was nothing.

        Where every batch held NaN or infinity there is nothing: the collection starts again, with a warning.
        """
        if self.is_learned:
            return True
        steps, used = int(self.collected_steps), self._batches_used()
        if used < steps:
            then = "they were left out" if used else "the collection starts again"
            warnings.warn(
                f"{steps - used} of the {steps} batches that statistics were collected from held NaN or infinity; "
                f"{then}",
                RuntimeWarning,
                stacklevel=2,
            )
        if not used:
            self.restart_collection()
            return False
        self.value.copy_(self.to_stored(self.running_stats))
        self.collected_steps.fill_(_LEARNED)
        self.settled = True
        return True

    def hand_over_if_due(self) -> int:
        """The first step of a call: hand over after the last call that collects; how many collected, -1 when learned.

        Raises:
            RuntimeError: the call would collect inside a ``torch.func`` transform.
        """
        steps = int(self.collected_steps)
        if steps >= 0 and self.training and transforms_active():
            raise RuntimeError(
                "a quantizer that still collects statistics can't do so inside torch.func.grad, vmap or another "
                "transform, where nothing may be written: run some batches first, in training mode or under "
                "qframework.graph.calibration_mode, or call model.eval()"
            )
        if self.training and steps >= self.collect_stats_steps and not is_recomputing():
            return _LEARNED if self.finish_collection() else 0
        return steps

    @torch.no_grad()
    def restart_collection(self) -> None:
        """Forget what was collected or learned."""
        self.collected_steps.zero_()
        self.used_batches.zero_()
        self.settled = False

    @torch.no_grad()
    def _record(self, statistic: Tensor) -> None:
        used = self.used_batches
        self.running_stats.copy_(running_update(self.running_stats, statistic, used, self.momentum))
        used.add_(torch.isfinite(statistic).all())
        self.collected_steps.add_(1)

    def collect_or_learned(self, x: Tensor, *context: Tensor) -> Tensor:
        """The result for one batch: of its own statistic while collecting, else of the stored number.

        Args:
            x: the batch.
            *context: further tensors for :meth:`from_statistic` and :meth:`from_stored`.
        """
        if torch.compiler.is_compiling():
            return self._traced(x, *context)
        steps, again = self.hand_over_if_due(), is_recomputing()
        if steps < 0:
            return self.from_stored(self.value, *context)
        if not self.training or x.numel() == 0:
            return self.from_stored(self.to_stored(self.running_stats), *context)
        statistic = self.reduce(self.view_of(x), *context)
        if not again:
            self._record(statistic.detach())
        return self.from_statistic(statistic, *context)

    def _traced(self, x: Tensor, *context: Tensor) -> Tensor:
        """The same for compilers: the phase is chosen inside the graph, so that a change of it recompiles nothing.

        Args:
            x: the batch.
            *context: further tensors for :meth:`from_statistic` and :meth:`from_stored`.
        """
        if self.settled:
            return self.from_stored(self.value, *context)
        limit = self.collect_stats_steps
        if not self.training or x.numel() == 0:
            learned = (self.collected_steps < 0).to(self.value.device)
            stored = torch.where(learned, self.value, self.to_stored(self.running_stats))
            return self.from_stored(stored, *context)
        with torch.no_grad():
            hand_over = self.collected_steps >= limit
            here = hand_over.to(self.value.device)
            self.value.copy_(torch.where(here, self.to_stored(self.running_stats), self.value))
            self.collected_steps.masked_fill_(hand_over, _LEARNED)
        collecting = self.collected_steps >= 0
        here = collecting.to(self.value.device)
        # A copy, because a shared quantizer writes to ``value`` again before the backward pass.
        value = self.value.clone()
        result: Tensor
        statistic = self.reduce_if(x, collecting)
        if statistic is not None:
            batch = self.from_statistic(statistic, *context)
            result = torch.where(here, batch, self.from_stored(value, *context))
            statistic = statistic.detach()
        else:
            result, statistic = self._branch(collecting, self.view_of(x), value, *context)
        with torch.no_grad():
            updated = running_update(
                self.running_stats, statistic, self.used_batches, self.momentum
            )
            self.running_stats.copy_(torch.where(here, updated, self.running_stats))
            self.used_batches.add_(here & torch.isfinite(statistic).all())
            self.collected_steps.add_(collecting.to(torch.int64))
        return result

    def _branch(self, collecting: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """Result and statistic, by a branch in the graph."""

        def collect(viewed: Tensor, value: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            statistic = self.reduce(viewed, *context)
            return self.from_statistic(statistic, *context), statistic.detach().clone()

        def use_learned(viewed: Tensor, value: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            return self.from_stored(value, *context).clone(), torch.zeros_like(value)

        return torch.cond(collecting, collect, use_learned, operands)  # type: ignore[arg-type, no-any-return]

    # ------------------------------------------------------------ state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "collected_steps"] = self.collected_steps

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
        value, running, steps, used = (
            prefix + k for k in ("value", "running_stats", "collected_steps", "used_batches")
        )
        legacy = value in state_dict and running not in state_dict and steps not in state_dict
        collected = state_dict.get(steps)
        if legacy:
            state_dict = {**state_dict, running: self.running_stats, used: self.used_batches}
            collected = torch.tensor(_LEARNED)
        if collected is not None:
            self.collected_steps.copy_(collected)
            self.settled = self.is_learned
        elif strict:
            missing_keys.append(steps)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, False, missing_keys, unexpected_keys, error_msgs
        )
        if strict:
            missing_keys.extend(k for k in (value, running, used) if k not in state_dict)
