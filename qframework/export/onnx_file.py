"""From a traced program to an ONNX file, its quantizers written as a dialect has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch.utils import _pytree as pytree

from qframework.export.errors import ExportError, shortened
from qframework.export.onnx_graph import Builder
from qframework.export.program import DOMAIN, live_calls, quiet, trace
from qframework.export.session import Call, Session

#: The opset that torch's exporter is asked for; later ones change nothing of what it writes.
_EXPORTED = 20


class Dialect(Protocol):
    """Emits the nodes of quantizers."""

    domain: str

    def parameter(self, builder: Builder, call: Call) -> None:
        """The nodes of a weight or bias, whose result is called as the call."""

    def activation(self, builder: Builder, call: Call, x: str) -> None:
        """The nodes of an activation ``x``, whose result is called as the call."""


def onnx_model(
    session: Session,
    dialect: Dialect,
    opset: int,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    optimize: bool = True,
    program: torch.export.ExportedProgram | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a recorded model.

    Args:
        session: the model and its calls.
        dialect: how quantizers are written.
        opset: of the file.
        dynamic_shapes: as in ``torch.export.export``.
        input_names: of the graph; those of ``forward`` where None.
        output_names: of the graph.
        optimize: whether constants are folded, and what nothing needs is removed.
        program: traced already.

    Raises:
        ExportError: it can't be traced or written, or lost a quantizer or an output.
    """
    if program is None:
        program = trace(session, dynamic_shapes=dynamic_shapes, what="tracing")
    names: dict[str, Any] = {
        "input_names": list(input_names) if input_names else None,
        "output_names": list(output_names) if output_names else None,
    }
    with quiet():
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=_EXPORTED,
                optimize=False,
                **names,
            )
            assert written is not None
            if optimize:
                _simplify(written.model)
            proto: onnx.ModelProto = written.model_proto
        except Exception as error:
            raise shortened("torch.onnx.export", error) from error
    _check_kept(session, program, proto)
    _expand(proto, session, dialect, opset)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise shortened("the check of the ONNX model", error) from error
    return proto


def _simplify(model: Any) -> None:
    """Fold constants and remove what nothing needs; no pattern is rewritten, which would take most of the time."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    optimizer.remove_unused_nodes(model)


def _check_kept(
    session: Session, program: torch.export.ExportedProgram, proto: onnx.ModelProto
) -> None:
    """Refuse a graph that lacks a quantizer or an output of its program."""
    wanted = set(live_calls(program))
    kept = {_call_name(n) for n in proto.graph.node if n.domain == DOMAIN}
    lost = sorted(wanted - kept)
    if lost:
        raise ExportError(
            f"torch.onnx.export lost {len(lost)} of {len(wanted)} quantizers, such as {lost[0]}"
        )
    leaves = [t for t in pytree.tree_leaves(session.output) if isinstance(t, torch.Tensor)]
    if len(leaves) != len(proto.graph.output):
        raise ExportError(
            f"the model has {len(leaves)} outputs, its ONNX graph {len(proto.graph.output)}"
        )


def _call_name(node: onnx.NodeProto) -> str:
    return str(next(a.s.decode() for a in node.attribute if a.name == "call"))


def _expand(proto: onnx.ModelProto, session: Session, dialect: Dialect, opset: int) -> None:
    """Write the quantizers of a graph, in place."""
    graph = proto.graph
    builder, renamed = Builder(opset), dict[str, str]()
    outputs = {o.name for o in graph.output}
    readers: dict[str, set[str]] = {name: {""} for name in outputs}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.domain)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.domain != DOMAIN:
            builder.nodes.append(node)
            continue
        call = session.call(_call_name(node))
        builder.is_requantized = readers.get(node.output[0]) == {DOMAIN}
        if call.constants.is_parameter:
            dialect.parameter(builder, call)
        else:
            dialect.activation(builder, call, node.input[0])
        old = node.output[0]
        if old in outputs:
            builder.node("Identity", [call.name], old)
        else:
            renamed[old] = call.name
    del graph.node[:]
    graph.node.extend(builder.nodes)
    graph.initializer.extend(builder.constants.values())
    kept = [v for v in graph.value_info if v.name not in renamed]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    _drop_unused(graph)
    _drop_notes(proto)
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", opset))
    if dialect.domain:
        proto.opset_import.append(onnx.helper.make_opsetid(dialect.domain, 2))
    proto.ir_version = max(10, onnx.helper.find_min_ir_version_for(proto.opset_import, True))
    proto.producer_name = "qframework"
    del proto.functions[:]


def _drop_notes(proto: onnx.ModelProto) -> None:
    """Leave out where in whose files each node was traced."""
    graph = proto.graph
    del proto.metadata_props[:]
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    for n in graph.node:
        for a in n.attribute:
            used |= {i for inner in a.g.node for i in inner.input}
    kept = [t for t in graph.initializer if t.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def save(proto: onnx.ModelProto, path: str | os.PathLike[str] | None) -> None:
    """Write one file, where a path is given."""
    if path is not None:
        Path(path).write_bytes(proto.SerializeToString())
