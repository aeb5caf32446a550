"""What happens to each quantized tensor over some batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.graph.evaluating import evaluating
from qframework.graph.table import Table, Tabled
from qframework.inspect.batches import Loss, runs
from qframework.inspect.float_inputs import FloatInputs
from qframework.inspect.grid import Grid, grid_of
from qframework.inspect.histogram import GrowingHistogram, Histogram
from qframework.inspect.places import Place, named, places
from qframework.quant_tensor import QuantTensor


class TensorStatistics(BaseModel):
    """One quantized tensor.

    Shares are between 0 and 1. Weights and biases are looked at once, in the first batch; activations in every one.

    Attributes:
        layer: name of the layer in the model.
        tensor: ``weight``, ``bias``, ``input``, ``output``, ``act`` and so on.
        quantizer: name of its class.
        is_parameter: whether it is a weight or a bias.
        bit_width: bits of an element.
        sampled: values that were looked at.
        histogram: of the values before quantization, behind the activation function.
        grid: the numbers that values are rounded to, by the last scale; None where there are several scales or over 256 numbers.
        lowest: the smallest such number, of all scales; None for an unknown format.
        highest: the largest.
        clipped_low: share of values below the grid by more than half a step.
        clipped_high: share of values above it.
        saturated: share of values beyond it by more than a whole step, which the largest of a calibrated range isn't.
        zeros: share of values that are 0 after quantization.
        codes: how many codes the format has; None over 16 bits and for an unknown format.
        codes_used: how many of them occur; None where ``codes`` is.
        mean_squared_error: of the quantized values.
        sqnr: signal to quantization noise, ``10 log10(sum x^2 / sum (x - y)^2)`` in dB; infinite without an error.
        not_finite: share of values that are NaN or infinite.
        scale: the mean scale of each batch.
        zero_point: the mean zero point of each batch.
        scale_gradient: the norm of the gradient of the learned scale in each batch; None without a loss, or where none is learned.
        calibrated: False where the quantizer collects statistics and has seen no data.
    """

    layer: str
    tensor: str
    quantizer: str
    is_parameter: bool
    bit_width: float | None
    sampled: int
    histogram: Histogram
    grid: list[float] | None
    lowest: float | None
    highest: float | None
    clipped_low: float
    clipped_high: float
    saturated: float
    zeros: float
    codes: int | None
    codes_used: int | None
    mean_squared_error: float
    sqnr: float
    not_finite: float
    scale: list[float]
    zero_point: list[float]
    scale_gradient: list[float] | None
    calibrated: bool

    @property
    def name(self) -> str:
        """Layer and tensor, ``"conv1.weight"``."""
        return f"{self.layer}.{self.tensor}"

    @property
    def clipped(self) -> float:
        """Share of values that are clipped at either end."""
        return self.clipped_low + self.clipped_high

    @property
    def share_of_codes(self) -> float | None:
        """Share of codes that are used; None where they aren't told apart."""
        if self.codes is None or self.codes_used is None:
            return None
        return self.codes_used / self.codes


class ModelStatistics(Tabled):
    """All quantized tensors of a model; ``print`` and rich show a table.

    Attributes:
        tensors: in the order of the model's modules; those that no batch reached are in ``not_reached``.
        not_reached: names of tensors whose quantizers weren't called.
        batches: how many there were.
        float_inputs: layers that quantize their weight, and whose input came past every quantizer: most of its values differ.
    """

    tensors: list[TensorStatistics]
    not_reached: list[str]
    batches: int
    float_inputs: list[str] = []

    def __getitem__(self, name: str) -> TensorStatistics:
        """A tensor by its name, ``"conv1.weight"``.

        Raises:
            KeyError: there is none; the message names the nearest.
        """
        return named({t.name: t for t in self.tensors}, name, "no quantized tensor {name}")

    def table(self) -> Table:
        """One row for each tensor."""
        headings = ["tensor", "quantizer", "bits", "SQNR dB", "clipped", "zeros", "codes", "scale"]
        rows = [
            [
                t.name,
                t.quantizer,
                "" if t.bit_width is None else f"{t.bit_width:g}",
                f"{t.sqnr:.1f}",
                f"{t.clipped:.2%}",
                f"{t.zeros:.1%}",
                "" if t.codes is None else f"{t.codes_used}/{t.codes}",
                f"{t.scale[-1]:.3g}" if t.scale else "",
            ]
            for t in self.tensors
        ]
        return Table("Quantized tensors", headings, rows, text_columns=2)

    def to_csv(self) -> str:
        """A line for each tensor, without histograms and lists."""
        left_out = {"histogram", "grid", "scale", "zero_point", "scale_gradient"}
        names = [n for n in TensorStatistics.model_fields if n not in left_out]
        rows = [[str(getattr(t, n)) for n in names] for t in self.tensors]
        return Table("", names, rows).to_csv()

    def plot(self, name: str, axes: Any = None) -> Any:
        """The histogram of one tensor with its grid, by matplotlib (extra ``plot``).

        Args:
            name: layer and tensor, ``"conv1.weight"``.
            axes: to draw in; new ones when None.

        Returns:
            The axes.
        """
        from qframework.inspect.plots import plot_histogram

        return plot_histogram(self[name], axes)


class Observer:
    """Sums over what one quantizer is given and gives.

    Args:
        place: the quantized tensor.
        sample: how many values of a call are looked at, at most.
    """

    def __init__(self, place: Place, sample: int) -> None:
        self.place, self.sample = place, sample
        self.histogram = GrowingHistogram()
        self.totals = [0.0] * 7
        self.count = 0
        self.used: Tensor | None = None
        self.scales: list[float] = []
        self.zero_points: list[float] = []
        self.gradients: list[float] = []
        self.ends: tuple[float, float] | None = None
        self.grid: Grid | None = None
        self.grid_values: list[float] | None = None
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def see(self, x: Tensor, q: QuantTensor) -> None:
        """Add what a call was given and what it gave."""
        if x.shape != q.value.shape or not x.numel():
            return
        quantized: Any = q
        scale, zero = quantized.scale.detach(), quantized.zero_point.detach()
        grid = grid_of(q, bool(self.place.proxy.is_narrow_range))
        values, got, *steps = self._sampled(x, q.value.detach(), scale, zero)
        self.count += values.numel()
        finite = values.isfinite()
        if not bool(finite.all()):
            values, got, steps = (
                values[finite], got[finite], [t[finite] if t.dim() else t for t in steps],
            )  # fmt: skip
            self.totals[6] += float((~finite).sum())
        low = high = far = values.new_zeros(())
        if grid is not None:
            places = values / steps[0] + steps[1]
            if grid.clips:
                low = (places < grid.low - grid.room[0]).sum()
                high = (places > grid.high + grid.room[1]).sum()
                # rounding errors of the division aren't a step
                below, above = grid.low - 2.01 * grid.room[0], grid.high + 2.01 * grid.room[1]
                far = ((places < below) | (places > above)).sum()
            if grid.count is not None:
                codes = got / steps[0] + steps[1]
                if self.used is None or self.used.numel() != grid.count:
                    self.used = torch.zeros(grid.count, dtype=torch.bool, device=x.device)
                self.used[grid.indices(codes)] = True
        error = (values - got).square().sum(dtype=torch.float64)
        signal = values.square().sum(dtype=torch.float64)
        numbers = (low, high, (got == 0).sum(), error, signal, far)
        mean, shift = scale.mean(dtype=torch.float32), zero.mean(dtype=torch.float32)
        read = torch.stack([t.double() for t in (*numbers, mean, shift)]).tolist()
        for i, number in enumerate(read[:6]):
            self.totals[i] += number
        self.histogram.add(values)
        self.scales.append(read[6])
        self.zero_points.append(read[7])
        self._keep_grid(grid, scale, zero, read[6], read[7])

    def _sampled(self, x: Tensor, y: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
        """Values before and after, scales and zero points, at random places where there are many; in float32 at least."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        tensors = [x, y, scale, zero]
        if x.numel() > self.sample:
            chosen = torch.randint(x.numel(), (self.sample,), generator=self.generator).to(x.device)
            plain = all(
                t.numel() == 1 or (t.is_contiguous() and t.shape == x.shape) for t in tensors
            )
            if plain:
                tensors = [
                    t.reshape(()) if t.numel() == 1 else t.view(-1).index_select(0, chosen)
                    for t in tensors
                ]
            else:
                at = torch.unravel_index(chosen, x.shape)
                tensors = [
                    t.reshape(()) if t.numel() == 1 else t.expand(x.shape)[at] for t in tensors
                ]
        else:
            tensors = [
                t.reshape(()) if t.numel() == 1 and i > 1 else t.expand(x.shape).flatten()
                for i, t in enumerate(tensors)
            ]
        return [t.to(dtype) for t in tensors]

    def _keep_grid(
        self, grid: Grid | None, scale: Tensor, zero: Tensor, mean: float, shift: float
    ) -> None:
        self.grid = grid
        if grid is None:
            return
        if scale.numel() == zero.numel() == 1:
            ends = ((grid.low - shift) * mean, (grid.high - shift) * mean)
            self.grid_values = grid.values(mean, shift)
        else:
            ends = (
                float(((grid.low - zero) * scale).min()),
                float(((grid.high - zero) * scale).max()),
            )
        before = self.ends or ends
        self.ends = (min(before[0], ends[0]), max(before[1], ends[1]))

    def result(self) -> TensorStatistics:
        """What was seen."""
        low, high, zeros, error, signal, far, not_finite = self.totals
        n, finite = max(1, self.count), max(1.0, self.count - not_finite)
        place, proxy = self.place, self.place.proxy
        collectors = proxy.collectors() if hasattr(proxy, "collectors") else []
        used = self.used if self.grid is not None and self.grid.count is not None else None
        return TensorStatistics(
            layer=place.layer,
            tensor=place.tensor,
            quantizer=proxy.quantizer.__name__,
            is_parameter=place.is_parameter,
            bit_width=None if self.grid is None else self.grid.bits,
            sampled=self.count,
            histogram=self.histogram.result(),
            grid=self.grid_values,
            lowest=None if self.ends is None else self.ends[0],
            highest=None if self.ends is None else self.ends[1],
            clipped_low=low / finite,
            clipped_high=high / finite,
            saturated=far / finite,
            zeros=zeros / finite,
            codes=None if used is None else used.numel(),
            codes_used=None if used is None else int(used.sum()),
            mean_squared_error=error / finite,
            sqnr=decibels(signal, error),
            not_finite=not_finite / n,
            scale=self.scales,
            zero_point=self.zero_points,
            scale_gradient=self.gradients or None,
            calibrated=all(c.has_statistics for c in collectors),
        )


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite without noise, minus infinite without a signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def scale_parameters(proxy: nn.Module) -> list[nn.Parameter]:
    """The learned scales of a quantizer, by their names in the state dict."""
    return [p for n, p in proxy.named_parameters() if "scaling_impl" in n and p.requires_grad]


def collect_statistics(
    model: nn.Module,
    batches: Any,
    loss: Loss | None = None,
    layers: list[str] | None = None,
    sample: int = 4096,
    progress: bool | None = None,
) -> ModelStatistics:
    """What happens to each quantized tensor over some batches.

    The model runs in evaluation mode and is as it was afterwards: parameters, statistics, gradients, modes. A sample of each tensor
    is looked at, at random places that are the same in each run, so that it costs less than a second forward pass.

    Args:
        model: quantized and calibrated.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs the model.
        loss: called with the model and a batch, gives a scalar; then gradients of learned scales are recorded too, at the price of a
            backward pass.
        layers: names of layers to look at; all when None.
        sample: values of a tensor that are looked at in a call, at most.
        progress: show a bar; None for only on a terminal.

    Returns:
        A record for each tensor, which prints as a table and has ``to_dict``, ``to_csv`` and ``to_json``.

    Raises:
        ValueError: the model quantizes nothing, or a layer isn't there.
        TypeError: batches that the model can't be run on.
    """
    check_module(model, "collect_statistics")
    if sample < 1:
        raise ValueError(f"collect_statistics: sample={sample} must be at least 1")
    chosen = places(model, layers)
    observers = [Observer(p, sample) for p in chosen]
    inputs = FloatInputs(chosen)
    handles = [o.place.proxy.register_forward_hook(_hook(o)) for o in observers]
    count = 0
    try:
        with evaluating(model), torch.set_grad_enabled(loss is not None):
            for run in runs(batches, loss, progress):
                result = run(model)
                if loss is not None:
                    _gradients(observers, result)
                count += 1
    finally:
        inputs.close()
        for handle in handles:
            handle.remove()
    return ModelStatistics(
        tensors=[o.result() for o in observers if o.count],
        not_reached=[o.place.name for o in observers if not o.count],
        batches=count,
        float_inputs=inputs.names,
    )


def _hook(observer: Observer) -> Any:
    def hook(proxy: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        known = observer.place.is_parameter and observer.count > 0
        if known or not isinstance(output, QuantTensor):
            return
        x = observer.place.before(args)
        if x is not None:
            observer.see(x, output)

    return hook


def _gradients(observers: list[Observer], loss: Any) -> None:
    """Record the norm of the gradient of each learned scale, and leave ``.grad`` alone."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss must give a tensor of one number, got {got}")
    found = [(o, p) for o in observers for p in scale_parameters(o.place.proxy)]
    if not found or not loss.requires_grad:
        return
    gradients = torch.autograd.grad(loss.reshape(()), [p for _, p in found], allow_unused=True)
    squares: dict[int, float] = {}
    for (observer, _), gradient in zip(found, gradients, strict=True):
        add = 0.0 if gradient is None else float(gradient.double().square().sum())
        squares[id(observer)] = squares.get(id(observer), 0.0) + add
    for observer in {id(o): o for o, _ in found}.values():
        observer.gradients.append(math.sqrt(squares[id(observer)]))
