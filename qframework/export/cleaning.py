"""A traced program without what its outputs don't depend on: bookkeeping of scales and widths, float weights."""

from __future__ import annotations

import torch
from torch.export.graph_signature import InputKind

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ)


def _may_go(node: torch.fx.Node) -> bool:
    if node.users:
        return False
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    name = str(node.target)
    if name.startswith("aten._assert_tensor_metadata"):
        return True
    if "assert" in name:
        return False
    return schema is None or not schema.is_mutable


def clean(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove, in place, nodes that no output depends on, and parameters and constants that no node uses.

    Args:
        program: traced; without side effects but those of in-place functions.
    """
    graph = program.graph
    for node in reversed(list(graph.nodes)):
        if _may_go(node):
            graph.erase_node(node)
    signature = program.graph_signature
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    gone = {
        spec.arg.name: spec
        for spec in signature.input_specs
        if spec.kind in _HELD and not placeholders[spec.arg.name].users
    }
    for name, spec in gone.items():
        graph.erase_node(placeholders[name])
        for held in (program._state_dict, program._constants):
            held.pop(spec.target, None)
    kept = [s for s in signature.input_specs if s.arg.name not in gone]
    signature.input_specs[:] = kept
    program.graph_module.recompile()
    return program
