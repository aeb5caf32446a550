"""Cross-layer equalization: factors that even out the ranges of channels between layers that follow each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.bounded_activations import largest_inputs
from qframework.graph.channel_factors import bias_of, columns_of, rows_of, scale_columns, scale_rows
from qframework.graph.channel_regions import Region
from qframework.graph.channels import Channels
from qframework.graph.graph_pass import GraphPass
from qframework.graph.parameters_in_use import part
from qframework.graph.tracing import Traced

#: Ranges below it are those of channels that compute nothing.
_NOTHING = 1e-9


class EqualizeGraph(GraphPass):
    """Cross-layer equalization (Nagel 2019, https://arxiv.org/abs/1906.04721); the model computes the same.

    Channel ``c`` between layers is multiplied by ``s_c = sqrt(range of what reads it / range of what writes it)`` where it is
    written and divided by it where it is read, in all layers that share it: through residual additions, concatenations,
    depthwise layers, pooling and activations that commute with positive factors; through ReLU6 where ``apply(model, example_input)``
    shows that the bound isn't reached, else those channels are skipped and reported; through the projections of
    ``nn.MultiheadAttention``, and between its values and what projects its result. The regions are gone through
    again until no factor is further from 1 than ``threshold``.

    Args:
        iterations: at most so many rounds.
        threshold: of ``|1 - s|``; None for all rounds.
        merge_bias: let the range of what is written hold the bias, divided by ``bias_shrinkage``.
        bias_shrinkage: that number, or ``"vaiq"`` for one of 2, 5, 10 and 20 by how large the bias is beside the weight.
        scale_computation_type: ``"maxabs"`` or ``"range"``, largest less smallest.
        return_regions: let ``apply`` return the regions too, as sets of names.

    Raises:
        ValueError: another ``scale_computation_type`` or ``bias_shrinkage``.
    """

    scales_channels = True

    def __init__(
        self,
        iterations: int = 10,
        threshold: float | None = 0.05,
        return_regions: bool = False,
        merge_bias: bool = True,
        bias_shrinkage: float | str = "vaiq",
        scale_computation_type: str = "maxabs",
    ) -> None:
        super().__init__()
        if scale_computation_type not in ("maxabs", "range"):
            raise ValueError(
                f"EqualizeGraph: scale_computation_type={scale_computation_type!r}; allowed: 'maxabs', 'range'"
            )
        if isinstance(bias_shrinkage, str) and bias_shrinkage != "vaiq":
            raise ValueError(
                f"EqualizeGraph: bias_shrinkage={bias_shrinkage!r}; allowed: a number, 'vaiq'"
            )
        self.iterations, self.threshold, self.return_regions = iterations, threshold, return_regions
        self.merge_bias, self.bias_shrinkage = merge_bias, bias_shrinkage
        self.scale_computation_type = scale_computation_type
        self._example: tuple[Any, ...] = ()

    def apply(self, model: nn.Module, *example_input: Any) -> Any:
        """Equalize a model in place; see :class:`~qframework.graph.graph_pass.GraphPass`."""
        self._example = example_input
        result = super().apply(model, *example_input)
        if self.return_regions:
            return result, {
                tuple(u.name for u in (*r.sources, *r.sinks)) for r in self._regions if r.free.any()
            }
        return result

    def change(self, model: nn.Module, traced: Traced) -> None:
        """The rounds."""
        largest = largest_inputs(model, traced, self._example)
        self._regions = Channels(traced, largest=largest).regions()
        for region in self._regions:
            where = " and ".join(u.name for u in region.sources)
            if region.reasons and not bool(region.free.all()):
                some = "" if not bool(region.free.any()) else "some channels: "
                self.report.skipped[where] = some + "; ".join(region.reasons)
        free = [r for r in self._regions if bool(r.free.any())]
        part(model, [u.layer for r in free for u in (*r.sources, *r.sinks)])
        for _ in range(self.iterations):
            farthest = max(
                (self._equalize(r) for r in self._regions if bool(r.free.any())), default=0.0
            )
            if self.threshold is not None and farthest < self.threshold:
                break

    def _equalize(self, region: Region) -> float:
        written = [(u, self._with_bias(u.layer)) for u in region.sources]
        write, read = (
            self._range(written, region),
            self._range([(u, columns_of(u.layer)) for u in region.sinks], region),
        )
        usable = region.free.to(write.device) & (write > _NOTHING) & (read > _NOTHING)
        factor = torch.where(usable, (read / write.clamp_min(_NOTHING)).sqrt(), 1.0)
        if region.most is not None:  # a bound that isn't reached stays out of reach
            most = region.most.to(factor.device)
            factor = torch.minimum(factor, most)
            region.most = (most / factor).to(region.most.device)
        for use in region.sources:
            scale_rows(use.layer, factor[use.ids].to(rows_of(use.layer).dtype))
            self.report.changed[use.name] = "output channels scaled"
        for use in region.sinks:
            scale_columns(use.layer, 1 / factor[use.ids].to(rows_of(use.layer).dtype))
            self.report.changed.setdefault(use.name, "input channels scaled")
        return float((1 - factor).abs().max())

    def _range(self, parts: list[tuple[Any, Tensor]], region: Region) -> Tensor:
        device = parts[0][1].device
        low = torch.full((region.size,), float("inf"), device=device)
        high = torch.full((region.size,), -float("inf"), device=device)
        for use, numbers in parts:
            ids = use.ids.to(device)
            values = numbers.to(torch.float32)
            low.scatter_reduce_(0, ids, values.amin(dim=1), "amin")
            high.scatter_reduce_(0, ids, values.amax(dim=1), "amax")
        if self.scale_computation_type == "maxabs":
            found = torch.maximum(low.abs(), high.abs())
        else:
            found = high - low
        return torch.where(torch.isfinite(found), found, 0.0)

    def _with_bias(self, layer: nn.Module) -> Tensor:
        rows, bias = rows_of(layer), bias_of(layer)
        if not self.merge_bias or bias is None:
            return rows
        rows, beside = rows.to(torch.float32), bias.to(torch.float32).unsqueeze(1)
        return torch.cat([rows, beside / self._shrinkage(rows, beside)], dim=1)

    def _shrinkage(self, rows: Tensor, bias: Tensor) -> float:
        if not isinstance(self.bias_shrinkage, str):
            return float(self.bias_shrinkage)
        ratios = bias.abs() / rows.abs()
        median, mean = float(ratios.median()), float(ratios.mean())
        largest = float(bias.abs().max())
        if largest < 10 and largest / float(rows.abs().max()) < 20:
            return 5.0 if median > 100 or mean > 1000 else 2.0
        if median > 30 or mean > 500:
            return 20.0
        return 10.0 if median > 15 or mean > 250 else 5.0
