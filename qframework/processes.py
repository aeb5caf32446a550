"""Statistics that several processes collect together: ``torch.distributed``.

Each process collects from its own batches. When a backward pass ends in which something was collected, the running means of all
quantizers are averaged over the processes by one all-reduce, weighted by how many batches each is made of; counters go on
alike. So all processes store the same scales after every step, and switch to learned ones in the same step. Once all scales are
learned nothing is exchanged.

Who takes part is told by torch's own engines: inside the forward of a ``DistributedDataParallel`` its process group, and for
parameters that ``fully_shard`` has sharded the mesh that they are on. ``settings.reduce_statistics`` changes that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import Function

from qframework.configuration import settings
from qframework.core.collector import CollectThenLearn, is_shared, share
from qframework.core.scaling.runtime import RuntimeStats
from qframework.functional import add_kernel, is_recomputing

Collector = CollectThenLearn | RuntimeStats


def is_distributed() -> bool:
    """Whether this process belongs to a group, if only of one, as under ``torchrun --nproc-per-node 1``."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def several_processes() -> bool:
    """Whether this process is one of several."""
    return is_distributed() and torch.distributed.get_world_size() > 1


def sum_of_processes(numbers: Tensor) -> Tensor:
    """The sum of a tensor over all processes, a new tensor; the tensor itself where there is one process, or sharing is off.

    Args:
        numbers: of the same shape in all processes.
    """
    if not several_processes() or settings.reduce_statistics == "never":
        return numbers
    total = numbers.detach().clone()
    torch.distributed.all_reduce(total)
    return total


# Of one process, too: its DistributedDataParallel asks for a gradient of each parameter as well.
@add_kernel(is_shared, "several processes", is_distributed)
def _is_shared() -> bool:
    return settings.reduce_statistics != "never"


# ------------------------------------------------------------ what was collected since the last exchange


class _Waiting:
    """A collector that has collected since the last exchange, and its counters before that."""

    def __init__(self, collector: Collector) -> None:
        self.collector = weakref.ref(collector)
        engine = _data_parallel()
        self.engine = None if engine is None else weakref.ref(engine)
        self.counters = [c.clone() for c in _counters(collector)]


def _data_parallel() -> Any:
    """The ``DistributedDataParallel`` whose forward runs; None outside of one."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


#: By the ids of collectors, in the order of their first calls; and the backward pass that will exchange it.
_waiting: dict[int, _Waiting] = {}
_scheduled = -1


class _TakePart(Function):
    """A number as it is; a learned one that isn't used yet gets a gradient of 0, and the end of the backward pass exchanges."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, learned: Tensor) -> Tensor:  # type: ignore[override]
        ctx.like = (learned.shape, learned.dtype)
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        _exchange_at_the_end()
        shape, dtype = ctx.like
        unused = grad.new_zeros(shape, dtype=dtype) if ctx.needs_input_grad[1] else None
        return grad, unused


def _sharing(collector: Collector, number: Tensor) -> bool:
    return bool(is_shared())


@add_kernel(share, "several processes", _sharing)
def _share(collector: Collector, number: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _share_outside_of_graphs(collector, number)
    return _take_part(collector, number)


def _take_part(collector: Collector, number: Tensor) -> Tensor:
    if not is_recomputing() and id(collector) not in _waiting:
        _waiting[id(collector)] = _Waiting(collector)
    learned = collector.value if isinstance(collector, CollectThenLearn) else number.detach()
    return _TakePart.apply(number, learned)  # type: ignore[no-any-return, no-untyped-call]


# As torch.compiler.disable, which would import the compiler.
_share_outside_of_graphs = _disable_dynamo(_take_part)


def _exchange_at_the_end() -> None:
    global _scheduled
    task = torch._C._current_graph_task_id()
    if task != _scheduled:
        _scheduled = task
        torch.autograd.Variable._execution_engine.queue_callback(_exchange)  # type: ignore[attr-defined]


def _exchange() -> None:
    """Average what all collectors have collected since the last exchange."""
    entries = list(_waiting.values())
    _waiting.clear()
    if not several_processes():
        return
    by_engine: dict[int, tuple[Any, list[_Waiting]]] = {}
    for entry in entries:
        engine = None if entry.engine is None else entry.engine()
        by_engine.setdefault(id(engine), (engine, []))[1].append(entry)
    for engine, own in by_engine.values():
        if engine is None:
            collectors = [c for c in (entry.collector() for entry in own) if c is not None]
            groups = _groups(collectors)
        else:  # all of the model, as another process may have left some out
            collectors, groups = collectors_of(engine.module), [engine.process_group]
        if groups:
            average(collectors, groups, own)


def _groups(collectors: Iterable[Collector]) -> Sequence[Any]:
    """The process groups that the parameters of collectors are sharded over."""
    for collector in collectors:
        mesh = getattr(getattr(collector, "value", None), "device_mesh", None)
        if mesh is not None:
            return mesh.get_all_groups()  # type: ignore[no-any-return]
    return [None] if settings.reduce_statistics == "always" else []


def collectors_of(model: nn.Module) -> list[Collector]:
    """Those that still collect, in the order of the model.

    Args:
        model: anything with quantized layers.
    """
    return [
        m
        for m in model.modules()
        if isinstance(m, RuntimeStats) or (isinstance(m, CollectThenLearn) and not m.is_learned)
    ]


# ------------------------------------------------------------ the average


def _counters(collector: Collector) -> tuple[Tensor, ...]:
    if isinstance(collector, RuntimeStats):
        return (collector.collected_steps,)
    return collector.used_batches, collector.collected_steps


@torch.no_grad()
def average(
    collectors: Sequence[Collector],
    groups: Sequence[Any],
    waiting: Iterable[_Waiting] = (),
) -> None:
    """Average running means over processes, weighted by batches; one all-reduce for a group. All processes have to call it.

    Args:
        collectors: the same ones, in the same order, in all processes.
        groups: process groups, one after the other; None for all processes.
        waiting: what was collected since the last exchange; a collector without an entry has collected nothing.
    """
    if not collectors:
        return
    before = {id(entry.collector()): entry.counters for entry in waiting}
    device = collectors[0].running_stats.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    parts: list[Tensor] = []
    for collector in collectors:
        now = _counters(collector)
        then = before.get(id(collector), now)
        more = torch.stack([a - b for a, b in zip(now, then, strict=True)]).to(device, dtype)
        # how much was collected, and by how many processes
        parts += [collector.running_stats.to(device, dtype).flatten() * more[0], more, more > 0]
    sizes = [p.numel() for p in parts]
    together = torch.cat([p.to(dtype) for p in parts])
    for group in groups:
        torch.distributed.all_reduce(together, group=group)
    found = iter(together.split(sizes))
    for collector in collectors:
        total, more, processes = next(found), next(found), next(found)
        mean = (total / more[0].clamp(min=1)).reshape(collector.running_stats.shape)
        running = collector.running_stats
        running.copy_(torch.where(more[0] > 0, mean.to(running), running))
        now = _counters(collector)
        steps = (more / processes.clamp(min=1)).ceil().to(now[0])
        for counter, start, step in zip(now, before.get(id(collector), now), steps, strict=True):
            counter.copy_(start + step)
        if isinstance(collector, CollectThenLearn):
            collector.store_running()


def average_of_model(collectors: Sequence[Collector]) -> None:
    """Average what was collected since a collection began, over all processes.

    Args:
        collectors: the same ones, in the same order, in all processes.
    """
    if not several_processes():
        return
    entries = []
    for collector in collectors:
        entry = _Waiting(collector)
        entry.counters = [torch.zeros_like(c) for c in entry.counters]
        entries.append(entry)
    average(collectors, [None], entries)
