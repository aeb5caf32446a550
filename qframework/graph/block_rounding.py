"""Learned rounding of several layers at once, by what comes out of the block that they are in."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.batches import Batches
from qframework.graph.block_plan import block_names as parts_of
from qframework.graph.layer_by_layer import LayerByLayer
from qframework.graph.layer_inputs import Call, Reached
from qframework.graph.layer_store import LayerStore
from qframework.graph.quantizers_off import quantizers_off, with_weights
from qframework.graph.soft_rounding import METHODS
from qframework.graph.weight_grid import NoGrid, grid_of
from qframework.graph.weight_writing import own_parameter, write_weight
from qframework.quant_tensor import dequantize


class BlockRounding(LayerByLayer):
    """What learned rounding by block did: ``updated``, ``failed``, ``kept`` and ``errors``, the latter two by names of blocks."""

    def note_of(self, layer: nn.Module, block: str) -> dict[str, Any]:
        """What is kept of a layer beside its weight."""
        name = self._names[layer]
        return {
            "updated": name in self.updated,
            "kept": block in self.kept,
            "failed": self.failed.get(name, ""),
            "errors": list(self.errors[block]),
        }


def block_names(model: nn.Module, blocks: Sequence[str] | str) -> list[str]:
    """The names of blocks.

    Raises:
        ValueError: one that the model doesn't have, or one within another.
    """
    known = dict(model.named_modules())
    if isinstance(blocks, str):
        if blocks != "auto":
            raise ValueError(f"learned_round: blocks={blocks!r}; allowed: 'auto', names, None")
        names = parts_of(model)
        return names or [n for n, _ in model.named_children()]
    for name in blocks:
        if name not in known:
            raise ValueError(f"learned_round: blocks names {name!r}, which the model doesn't have")
        if any(other != name and name.startswith(other + ".") for other in blocks):
            raise ValueError(f"learned_round: the block {name!r} is within another one")
    return list(blocks)


def round_blocks(
    model: nn.Module,
    batches: Batches,
    blocks: Sequence[str] | str,
    method: str,
    steps: int,
    lr: float | None,
    batch_size: int,
    seed: int,
    store: LayerStore | None = None,
) -> BlockRounding:
    """Learn the rounding of all layers of each block, blocks in the order in which the model calls them."""
    report = BlockRounding(model)
    report.store = store
    with unchanged_on_error(model), report:
        names = {model.get_submodule(n): n for n in block_names(model, blocks)}
        inside = set(report.remaining)
        originals: dict[nn.Parameter, Tensor] = {}
        waiting = {b for b in names if any(m in inside for m in b.modules())}
        while waiting:
            block, quantized = _next_calls(model, batches, waiting, {}, True)
            if block is None:
                break
            waiting.discard(block)
            _, exact = _next_calls(model, batches, {block}, originals, False)
            layers = [m for m in block.modules() if m in inside]
            how = (method, steps, lr, batch_size)
            _round_block(
                report, block, names[block], layers, quantized, exact, originals, how, seed
            )
            for layer in layers:
                report._remaining.remove(layer)
        for layer in report.remaining:
            report.failed[report._names[layer]] = "it is in no block, or no batch reached it"
    return report


def _next_calls(
    model: nn.Module,
    batches: Batches,
    blocks: set[nn.Module],
    originals: dict[nn.Parameter, Tensor],
    quantized: bool,
) -> tuple[nn.Module | None, list[Call]]:
    """The first of some blocks that the model calls, and its calls."""
    first: list[nn.Module] = []
    calls: list[Call] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not first:
            first.append(module)
        if module is first[0]:
            calls.append(Call(args, kwargs))
            raise Reached

    handles = [b.register_forward_pre_hook(see, with_kwargs=True) for b in blocks]

    def to_block(*args: Any, **kwargs: Any) -> None:
        with suppress(Reached):
            model(*args, **kwargs)

    try:
        with torch.no_grad():
            if quantized:
                batches.run(to_block)
            else:
                with quantizers_off(model), with_weights(originals):
                    batches.run(to_block)
    finally:
        for handle in handles:
            handle.remove()
    return (first[0] if first else None), calls


def _round_block(
    report: BlockRounding,
    block: nn.Module,
    name: str,
    layers: list[nn.Module],
    quantized: list[Call],
    exact: list[Call],
    originals: dict[nn.Parameter, Tensor],
    how: tuple[str, int, float | None, int],
    seed: int,
) -> None:
    method, steps, lr, batch_size = how
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    names = {m: n for n, m in block.named_modules()}
    parts: dict[nn.Module, tuple[Any, Any]] = {}
    with torch.no_grad(), quantizers_off(block), with_weights(originals):
        wanted = [_tensor(block(*c.args, **c.kwargs)) for c in exact]
    for layer in layers:
        held: Any = layer
        try:
            grid = grid_of(held.weight_quant, held.weight)
        except NoGrid as reason:
            report.failed[report._names[layer]] = str(reason)
            continue
        whole = held.weight.detach()
        originals.setdefault(own_parameter(layer), whole)
        whole = whole.to(torch.float32)
        parts[layer] = grid, METHODS[method](whole, *grid.neighbours(whole))
    before: dict[nn.Module, Any] = {m: m._parameters["weight"] for m in parts}
    if not parts or _taken_from_store(report, name, list(parts)):
        return

    def output(weights: dict[str, Tensor], call: Call) -> Tensor:
        with quantizers_off(block, weights=True, biases=True, activations=False):
            found = functional_call(block, weights, call.args, call.kwargs, strict=False)
        return _tensor(found)

    def weights_of(soft: bool) -> dict[str, Tensor]:
        found = {}
        for layer, (_, rounding) in parts.items():
            w = rounding.soft() if soft else rounding.hard()
            prefix = f"{names[layer]}." if names[layer] else ""
            found[prefix + "weight"] = w.to(originals[before[layer]].dtype)
        return found

    @torch.no_grad()
    def error(weights: dict[str, Tensor]) -> float:
        total, energy = 0.0, 0.0
        for call, target in zip(quantized, wanted, strict=True):
            total += float((output(weights, call) - target).square().sum())
            energy += float(target.square().sum())
        return total / max(energy, 1e-30)

    nearest = {}
    for layer, (grid, _) in parts.items():
        weight = originals[before[layer]]
        prefix = f"{names[layer]}." if names[layer] else ""
        nearest[prefix + "weight"] = grid.nearest(weight.to(torch.float32)).to(weight.dtype)
    start = error(nearest)
    best, least = nearest, start
    optimizers = [r.optimizer(lr, steps) for _, r in parts.values()]
    level = max(start, 1e-30)
    for step in range(steps):
        place = int(torch.randint(len(quantized), (1,), generator=generator))
        call, target = _some(quantized[place], wanted[place], batch_size, generator)
        with torch.enable_grad():
            difference = output(weights_of(True), call) - target
            loss = difference.square().sum() / target.square().sum().clamp_min(1e-30) / level
            count = sum(w.numel() for w in nearest.values())
            for _, rounding in parts.values():
                loss = loss + rounding.penalty(step / steps) / count
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, (_, rounding) in zip(optimizers, parts.values(), strict=True):
            optimizer.step()
            rounding.bound()
        if (step + 1) % max(steps // 8, 1) == 0 or step + 1 == steps:
            now = weights_of(False)
            found = error(now)
            if found < least:
                best, least = now, found
    report.errors[name] = (start, least)
    if best is nearest:
        report.kept.append(name)
    else:
        for layer, (grid, _) in parts.items():
            prefix = f"{names[layer]}." if names[layer] else ""
            values = best[prefix + "weight"].to(torch.float32)
            if write_weight(layer, values, grid):
                report.updated.append(report._names[layer])
            else:
                report.failed[report._names[layer]] = "its quantizer can't be given these values"
    if report.store is not None:
        for layer in parts:
            report.store.save(report._names[layer], layer, report.note_of(layer, name))


def _taken_from_store(report: BlockRounding, name: str, layers: list[nn.Module]) -> bool:
    """Whether a block was finished before; its layers are then as they were kept."""
    if report.store is None or not all(report.store.has(report._names[m]) for m in layers):
        return False
    for layer in layers:
        note = report.store.load(report._names[layer], layer)
        assert note is not None
        if note["kept"] and name not in report.kept:
            report.kept.append(name)
        if note["updated"]:
            report.updated.append(report._names[layer])
        if note["failed"]:
            report.failed[report._names[layer]] = note["failed"]
        report.errors[name] = (note["errors"][0], note["errors"][1])
    return True


def round_one_block(
    report: BlockRounding,
    block: nn.Module,
    name: str,
    calls: list[list[Call]],
    how: tuple[str, int, float | None, int],
    seed: int,
) -> None:
    """Learn the rounding of all layers of one block.

    Args:
        report: entered; of the block.
        block: a part of a model.
        name: in the model.
        calls: of the block in the quantized model, and in the float one.
        how: method, steps, step size and batch size.
        seed: of the choice of samples.
    """
    layers = report.remaining
    quantized, exact = calls
    _round_block(report, block, name, layers, quantized, exact, report.weight_orig, how, seed)
    report._remaining = []


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) else output
    return dequantize(found)  # type: ignore[no-any-return]


def _some(
    call: Call, target: Tensor, count: int, generator: torch.Generator
) -> tuple[Call, Tensor]:
    """Some samples of a call, where all of its tensors have as many as the result."""
    size = target.shape[0] if target.dim() else 0
    given = [*call.args, *call.kwargs.values()]
    tensors = [x for x in given if isinstance(x, Tensor)]
    plain = all(isinstance(x, Tensor) or not hasattr(x, "value") for x in given)
    if size <= count or not plain or any(x.dim() == 0 or x.shape[0] != size for x in tensors):
        return call, target
    chosen = torch.randperm(size, generator=generator)[:count].to(target.device)

    def cut(x: Any) -> Any:
        return x[chosen] if isinstance(x, Tensor) else x

    kwargs = {k: cut(v) for k, v in call.kwargs.items()}
    return Call(tuple(map(cut, call.args)), kwargs), target[chosen]
