"""Float models as graphs, in a form that quantizes well."""

from __future__ import annotations

import copy

from torch import fx, nn

from qframework.graph import graph_modules
from qframework.graph.channel_splitting import GraphChannelSplitting
from qframework.graph.cross_layer_equalization import EqualizeGraph
from qframework.graph.standardize import MergeBatchNorm


def preprocess_for_quantize(
    model: nn.Module,
    trace_model: bool = True,
    relu6_to_relu: bool = True,
    equalize_iters: int = 0,
    equalize_merge_bias: bool = True,
    merge_bn: bool = True,
    equalize_bias_shrinkage: float | str = "vaiq",
    equalize_scale_computation: str = "maxabs",
    channel_splitting_ratio: float = 0.0,
    channel_splitting_split_input: bool = True,
    channel_splitting_criterion: str = "maxabs",
) -> fx.GraphModule:
    """A copy of a float model as a graph, in a form that quantizes well; in evaluation mode it computes the same.

    Functions become modules, each module without parameters stands in one place, dropout goes, batch norms are folded.

    Args:
        model: float; not changed.
        trace_model: whether it isn't a graph module yet.
        relu6_to_relu: take the bound of ReLU6 away.
        equalize_iters: rounds of cross-layer equalization.
        equalize_merge_bias: see :class:`~qframework.graph.equalize.EqualizeGraph`.
        merge_bn: fold batch norms.
        equalize_bias_shrinkage: see ``EqualizeGraph``.
        equalize_scale_computation: see ``EqualizeGraph``.
        channel_splitting_ratio: share of channels that are split, see :class:`~qframework.graph.channel_splitting.GraphChannelSplitting`.
        channel_splitting_split_input: split where channels are read.
        channel_splitting_criterion: ``"maxabs"``.

    Raises:
        NoGraphError: the model can't be traced.
        TypeError: ``trace_model=False`` and no graph module.
    """
    if not trace_model and not isinstance(model, fx.GraphModule):
        raise TypeError(
            f"preprocess_for_quantize: trace_model=False needs a torch.fx.GraphModule, got {type(model).__name__}"
        )
    training = model.training
    made = graph_modules.as_graph_module(copy.deepcopy(model).eval(), "preprocess_for_quantize")
    graph_modules.functions_to_modules(made)
    graph_modules.stand_alone(made)
    if relu6_to_relu:
        graph_modules.relu6_to_relu(made)
    graph_modules.means_to_pools(made)
    graph_modules.join_concatenations(made)
    clean(made)
    if merge_bn:
        MergeBatchNorm().apply(made)
    graph_modules.without_dropout(made)
    clean(made)
    EqualizeGraph(
        iterations=equalize_iters,
        merge_bias=equalize_merge_bias,
        bias_shrinkage=equalize_bias_shrinkage,
        scale_computation_type=equalize_scale_computation,
    ).apply(made)
    if channel_splitting_ratio > 0:
        GraphChannelSplitting(
            channel_splitting_ratio, channel_splitting_criterion, channel_splitting_split_input
        ).apply(made)
    made.train(training)
    return made


def clean(model: fx.GraphModule) -> None:
    """Check a graph after it was changed, and forget modules that it doesn't call."""
    model.graph.lint()
    model.recompile()
    model.delete_all_unused_submodules()
