"""Rotations that spread outliers over all channels: of residual streams, and in front of single layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.attention_projections import (
    AttentionInputChanged,
    Projection,
    Projections,
    why_one_whole,
    with_projections,
)
from qframework.graph.channel_regions import ROTATION, Region, Use
from qframework.graph.channels import Channels
from qframework.graph.evaluating import evaluating
from qframework.graph.graph_pass import GraphPass, PassReport
from qframework.graph.hadamard import (
    NoHadamardError,
    find_closest_hadamard_number,
    random_hadamard_matrix,
    random_orthogonal_matrix,
)
from qframework.graph.layer_view import LINEAR
from qframework.graph.layer_wrappers import replace_module
from qframework.graph.parameters_in_use import READ, part, readers_in_code, why_otherwise
from qframework.graph.reading_code import noting_reads, read_by_code
from qframework.graph.rotation import (
    RotatedColumns,
    RotatedInput,
    RotatedRows,
    Rotation,
    TurnedInput,
    rotate_columns,
    rotate_rows,
    turn_columns,
)
from qframework.graph.single_layers import IN_FRONT, note_single_layer, told
from qframework.graph.torch_transformers import call_changed_parts
from qframework.graph.tracing import Traced
from qframework.layers.linear import TransposedLinear


class GraphRotationEqualization(GraphPass):
    """Turn what linear layers and embeddings write into a residual stream, and what reads it back (QuaRot, SpinQuant 2024).

    The model computes the same (https://arxiv.org/abs/2404.00456, https://arxiv.org/abs/2405.16406). Additions and RMS norms without
    factors let a rotation pass, and ``nn.MultiheadAttention`` reads and writes it by its projections, so :class:`~qframework.graph.equalize.MergeLnAffine` and ``LayerNormToRMS`` come first.

    Args:
        blacklist_layers: names of layers; regions that they belong to stay.
        orphan_sink: turn the inputs of the other linear layers when they are called.
        use_parametrized_rotations: leave the matrices as parameters, to learn with :class:`~qframework.graph.optim.CaileySGD`;
            ``fuse_parametrizations`` ends that.
        full_rotation_method: ``"had"``, random Hadamard matrices, or random orthogonal ones where none of a size is
            known; ``"ort"``, random orthogonal ones.
        rotation_block_size: of rotations at call time; None for all channels at once.
        layers_to_expand: names of layers whose inputs get zeros behind them, so that a Hadamard matrix of another size fits.
        expansion_step: how many sizes further, see :func:`~qframework.graph.hadamard.find_closest_hadamard_number`.
        seed: of the matrices.
        return_rewriters: let ``apply`` return the names of turned layers too.

    Raises:
        ValueError: another method.
    """

    scales_channels = True

    def __init__(
        self,
        blacklist_layers: Sequence[str] | None = None,
        orphan_sink: bool = False,
        use_parametrized_rotations: bool = False,
        full_rotation_method: str = "had",
        rotation_block_size: int | None = None,
        layers_to_expand: Sequence[str] | None = None,
        expansion_step: int = 0,
        seed: int = 0,
        return_rewriters: bool = False,
    ) -> None:
        super().__init__()
        if full_rotation_method not in ("had", "ort"):
            raise ValueError(
                f"GraphRotationEqualization: full_rotation_method={full_rotation_method!r}; allowed: 'had', 'ort'"
            )
        self.blacklist, self.orphan_sink = set(blacklist_layers or ()), orphan_sink
        self.use_parametrized_rotations = use_parametrized_rotations
        self.method, self.block_size, self.seed = full_rotation_method, rotation_block_size, seed
        self.layers_to_expand, self.expansion_step = set(layers_to_expand or ()), expansion_step
        self.return_rewriters = return_rewriters

    def apply(self, model: nn.Module, *example_input: Any) -> Any:
        """Turn a model's layers in place; see :class:`~qframework.graph.graph_pass.GraphPass`."""
        result = super().apply(model, *example_input)
        return (result, list(self.report.changed)) if self.return_rewriters else result

    def change(self, model: nn.Module, traced: Traced) -> None:
        """Turn all regions that can be."""
        generator = torch.Generator().manual_seed(self.seed)
        channels = Channels(traced, moves=ROTATION)
        turned: set[nn.Module] = set()
        self._blacklisted = with_projections(model, self.blacklist)
        for region in channels.regions():
            names = ", ".join(u.name for u in (*region.sources, *region.sinks))
            reason = self._hindrance(region)
            if reason is not None:
                self.report.skipped[names] = reason
                continue
            part(model, [u.layer for u in (*region.sources, *region.sinks)])
            matrix = self._matrix(region.size, generator, names)
            self._turn(region, matrix)
            turned |= {getattr(u.layer, "attention", u.layer) for u in region.sinks}
        if self.orphan_sink:
            names_of = {m: n for n, m in model.named_modules()}
            called = {traced.called(n): None for n in traced.graph.nodes}
            in_code = readers_in_code(traced)
            for layer in called:
                if layer in in_code or (layer is not None and why_otherwise(layer) is not None):
                    continue
                if layer is model and isinstance(layer, (nn.Linear, nn.MultiheadAttention)):
                    self.report.skipped[""] = told(model, IN_FRONT)
                    continue
                if isinstance(layer, nn.MultiheadAttention) and layer not in turned:
                    if names_of[layer] not in self.blacklist:
                        rotate_attention_input(
                            model, layer, names_of[layer], self.report, self.block_size
                        )
                if isinstance(layer, nn.Linear) and layer not in turned:
                    if names_of[layer] not in self.blacklist:
                        expanded = names_of[layer] in self.layers_to_expand
                        steps = self.expansion_step if expanded else 0
                        rotate_input(
                            model, layer, names_of[layer], self.report, self.block_size, steps
                        )

    def _hindrance(self, region: Region) -> str | None:
        if not region.is_free:
            return "; ".join(region.reasons) or "not all of its channels come from layers"
        order = torch.arange(region.size)
        for use in (*region.sources, *region.sinks):
            if use.name in self._blacklisted:
                return "as blacklist_layers says"
            if not isinstance(use.layer, (*LINEAR, nn.Embedding)):
                return f"{use.name} is neither a linear layer nor an embedding"
            if len(use.ids) != region.size or not torch.equal(use.ids, region.sources[0].ids):
                return f"{use.name} has its channels in another order"
        return (
            None if torch.equal(region.sources[0].ids.sort().values, order) else "channels repeat"
        )

    def _matrix(self, size: int, generator: torch.Generator, names: str) -> Tensor:
        if self.method == "had":
            try:
                return random_hadamard_matrix(size, generator=generator)
            except NoHadamardError as error:
                self.report.changed[names] = f"a random orthogonal matrix, since {error}"
        return random_orthogonal_matrix(size, generator=generator)

    def _turn(self, region: Region, matrix: Tensor) -> None:
        device = region.sources[0].layer.weight.device
        rotation = Rotation(matrix.to(device))  # type: ignore[arg-type]
        for use in region.sources:
            self.report.changed[use.name] = "output channels turned"
            if self.use_parametrized_rotations:
                _parametrize_rows(use.layer, rotation)
            else:
                rotate_rows(use.layer, matrix)
        for use in region.sinks:
            self.report.changed[use.name] = "input channels turned"
            if self.use_parametrized_rotations:
                _parametrize_columns(use, rotation)
            else:
                rotate_columns(use.layer, matrix)


def _parametrize_columns(use: Use, rotation: Rotation) -> None:
    if isinstance(use.layer, Projection):
        use.layer.parametrize(RotatedColumns(rotation))
        return
    last = isinstance(use.layer, TransposedLinear)
    parametrize.register_parametrization(use.layer, "weight", RotatedColumns(rotation, last))


def _parametrize_rows(layer: Any, rotation: Rotation) -> None:
    layer = layer.holder if isinstance(layer, Projection) else layer  # the result's, of all rows
    last = isinstance(layer, (nn.Embedding, TransposedLinear))
    parametrize.register_parametrization(layer, "weight", RotatedRows(rotation, last))
    if getattr(layer, "bias", None) is not None:
        parametrize.register_parametrization(layer, "bias", RotatedRows(rotation))


def rotate_input(
    model: nn.Module,
    layer: nn.Linear,
    name: str,
    report: PassReport,
    block_size: int | None,
    steps: int = 0,
) -> nn.Module:
    """Turn the input of a layer when it is called, if there is a matrix of its size.

    Returns:
        What stands for the layer then.
    """
    size = find_closest_hadamard_number(layer.in_features, steps) if steps else None
    try:
        made = RotatedInput(layer, block_size, size)
    except ValueError as error:
        report.skipped[name] = str(error)
        return layer
    made.train(layer.training)
    replace_module(model, layer, made)
    report.changed[name] = "input turned when it is called"
    return made


def rotate_attention_input(
    model: nn.Module, attention: Any, name: str, report: PassReport, block_size: int | None
) -> nn.Module:
    """Turn query, key and value of torch's attention when it is called, if there are matrices of their sizes.

    Returns:
        What stands for the attention layer then.
    """
    reason = why_one_whole(attention)
    if reason is not None:
        report.skipped[name] = reason
        return attention  # type: ignore[no-any-return]
    parts = Projections(attention, name, same=attention._qkv_same_embed_dim)
    made: Any = attention
    try:
        turns = [TurnedInput(layer.in_features, block_size) for _, layer, _ in parts.inputs]  # type: ignore[arg-type]
    except ValueError as error:
        report.skipped[name] = str(error)
        return attention  # type: ignore[no-any-return]
    part(model, [layer for _, layer, _ in parts.inputs])
    for turn, (projection, layer, operands) in zip(turns, parts.inputs, strict=True):
        turn_columns(layer, turn)
        made = AttentionInputChanged(turn.to(attention.out_proj.weight.device), made, operands)
        report.changed[projection] = "input turned when it is called"
    made.train(attention.training)
    replace_module(model, attention, made)
    return made  # type: ignore[no-any-return]


class LayerwiseActivationRotation:
    """Turn the input of every linear layer, and of attention, by a Hadamard matrix when it is called; the model computes the same.

    Args:
        blacklist_layer: names of layers to leave alone.
        layers_to_expand: names of layers whose inputs get zeros behind them, so that a matrix of another size fits.
        expansion_step: how many sizes further, see :func:`~qframework.graph.hadamard.find_closest_hadamard_number`.
        rotation_block_size: turn blocks of so many channels; None for all at once.

    Attributes:
        report: of the last ``apply``.
    """

    def __init__(
        self,
        blacklist_layer: Sequence[str] | None = None,
        layers_to_expand: Sequence[str] | None = None,
        expansion_step: int = 0,
        rotation_block_size: int | None = None,
    ) -> None:
        self.blacklist = set(blacklist_layer or ())
        self.layers_to_expand, self.expansion_step = set(layers_to_expand or ()), expansion_step
        self.block_size = rotation_block_size
        self.report = PassReport()

    def apply(self, model: nn.Module, *example_input: Any) -> nn.Module:
        """Turn the inputs of a model's layers, in place.

        Args:
            model: any module.
            *example_input: arguments of the model, run to see which layers' parameters code reads past them, where
                neither a trace nor the source tells.

        Returns:
            The same module; where it is a single layer, what stands for it.
        """
        self.report = PassReport(way="not needed")
        in_code = read_by_code(model)
        if example_input:
            with torch.no_grad(), evaluating(model), noting_reads(model, in_code):
                model(*example_input)
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        attentions = [(n, m) for n, m in model.named_modules() if type(m) is nn.MultiheadAttention]
        # attention of torch reads the weights of its parts and never calls them
        read = {
            part
            for m in model.modules()
            if isinstance(m, nn.MultiheadAttention)
            for part in m.modules()
        }
        result = model
        with unchanged_on_error(model):
            for name, layer in layers:
                if name in self.blacklist:
                    self.report.skipped[name] = "as blacklist_layer says"
                    continue
                why = READ if layer in in_code else why_otherwise(layer)
                if why is not None:
                    self.report.skipped[name] = why
                    continue
                if layer in read:
                    why = "nn.MultiheadAttention reads its weight itself, past what could turn the input"
                    self.report.skipped[name] = why
                    continue
                steps = self.expansion_step if name in self.layers_to_expand else 0
                made = rotate_input(model, layer, name, self.report, self.block_size, steps)
                result = made if layer is model else result
            for name, attention in attentions:
                if name in self.blacklist:
                    self.report.skipped[name] = "as blacklist_layer says"
                    continue
                if attention in in_code:
                    self.report.skipped[name] = READ
                    continue
                made = rotate_attention_input(model, attention, name, self.report, self.block_size)
                result = made if attention is model else result
            call_changed_parts(result)
        note_single_layer(self.report, model, "it has no linear layer and no attention")
        return result
