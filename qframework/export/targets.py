"""Runs an export of a model in its target, and tells what its quantizers gave there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qframework.export.errors import ExportError, shortened
from qframework.export.integer_program import IntegerModel
from qframework.export.program import CALL, quiet
from qframework.export.session import Session

if TYPE_CHECKING:
    import onnx

#: Targets of a verification, and the package that each needs.
NEEDS = {"integer": None, "torch": None, "onnxruntime": "onnxruntime", "qonnx": "qonnx"}


@dataclass
class Results:
    """What a target computed.

    Attributes:
        values: dequantized results of quantizers, by the name of the call.
        outputs: of the model, flat.
        parameters: parameters of the file that aren't quantized, by their names in the model.
        without: outputs of a run that computed nothing but them; None where there was none.
        defaults: outputs with a runtime's default settings; None where there are none.
    """

    values: dict[str, Tensor]
    outputs: list[Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    without: list[Tensor] | None = None
    defaults: list[Tensor] | None = None


def is_installed(target: str) -> bool:
    """Whether what a target needs is there."""
    needs = NEEDS[target]
    return (
        all(find_spec(n) is not None for n in (needs, "onnx", "onnxscript") if n) if needs else True
    )


def run_integer(session: Session, program: torch.export.ExportedProgram) -> Results:
    """The integer model."""
    model = IntegerModel(program, session)
    model(*session.args, **session.kwargs)
    values = {}
    for name, codes in model.trace.items():
        call = model.kept[name][0]
        if call is not None:  # else an accumulator
            c = call.constants
            wide = codes.double() - c.spread(c.zero_point).double()
            values[name] = wide * c.spread(c.scale).double()
    for name, number in model.floats.items():
        values[name] = number
    return Results(values, _tensors(model.outputs))


class _Watched(torch.fx.Interpreter):
    """Keeps the last float result of each call."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        name = (n.meta.get("custom") or {}).get(CALL)
        if name is not None and isinstance(result, Tensor) and result.is_floating_point():
            if n.op == "call_function":
                self.values[name] = result
        return result


def run_torch(session: Session) -> Results:
    """The exported program, node by node."""
    from qframework.export.torch_qcdq import torch_program

    module = torch_program(session).module(check_guards=False)
    watched = _Watched(module)  # type: ignore[arg-type]
    given = list(pytree.tree_leaves((session.args, session.kwargs)))
    with torch.no_grad():
        out = watched.run(*given)
    values = {n: t.cpu() for n, t in watched.values.items()}
    return Results(values, [t.cpu() for t in _tensors(out)])


def run_onnx(session: Session, proto: onnx.ModelProto) -> Results:
    """An ONNX file, in onnxruntime, or in the qonnx package where it has nodes of that."""
    inputs = _inputs(session, proto)
    names = _known_values(session, proto)
    try:
        if any(o.domain.startswith("qonnx") for o in proto.opset_import):
            found = _run_qonnx(proto, inputs)
            values = {n: found[n] for n in names if n in found}
            outputs = [found[o.name] for o in proto.graph.output]
            results = Results(values, outputs)
        else:
            results = _run_onnxruntime(proto, inputs, names)
    except ExportError:
        raise
    except Exception as error:
        raise shortened("the run of the ONNX file", error) from error
    results.parameters = _float_parameters(session, proto)
    return results


def _inputs(session: Session, proto: onnx.ModelProto) -> dict[str, Any]:
    given = [t for t in pytree.tree_leaves((session.args, session.kwargs)) if isinstance(t, Tensor)]
    constants = {t.name for t in proto.graph.initializer}
    names = [i.name for i in proto.graph.input if i.name not in constants]
    if len(given) != len(names):
        raise ExportError(
            f"the file has {len(names)} inputs ({', '.join(names)}), given are {len(given)} tensors"
        )
    if any(t.dtype is torch.bfloat16 for t in given):
        raise ExportError(
            "bfloat16 inputs can't be handed to an ONNX runtime; use float32 or float16"
        )
    return {n: t.detach().cpu().numpy() for n, t in zip(names, given, strict=True)}


def _known_values(session: Session, proto: onnx.ModelProto) -> list[str]:
    computed = {o for n in proto.graph.node for o in n.output}
    return [c.name for c in session.order if c.name in computed]


def _run_onnxruntime(proto: onnx.ModelProto, inputs: dict[str, Any], names: list[str]) -> Results:
    import onnx
    import onnxruntime

    def run(model: onnx.ModelProto, defaults: bool = False) -> list[Any]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        keywords: dict[str, Any] = {"providers": ["CPUExecutionProvider"]}
        if not defaults:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            keywords["disabled_optimizers"] = ["DoubleQDQPairsRemover"]
        made = onnxruntime.InferenceSession(model.SerializeToString(), options, **keywords)
        return made.run(None, inputs)  # type: ignore[no-any-return]

    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    count = len(proto.graph.output)
    watched.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    found = [_tensor(a) for a in run(watched)]
    try:
        defaults: list[Tensor] | None = [_tensor(a) for a in run(proto, defaults=True)]
    except Exception:  # its own fusions refuse some graphs
        defaults = None
    return Results(
        dict(zip(names, found[count:], strict=True)),
        found[:count],
        without=[_tensor(a) for a in run(proto)],
        defaults=defaults,
    )


def _run_qonnx(proto: onnx.ModelProto, inputs: dict[str, Any]) -> dict[str, Tensor]:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    fixed = type(proto)()
    fixed.CopyFrom(proto)
    for value in fixed.graph.input:  # the package executes graphs of known shapes
        for place, size in zip(
            value.type.tensor_type.shape.dim, inputs[value.name].shape, strict=True
        ):
            place.dim_value = size
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    with quiet():
        model = ModelWrapper(fixed).transform(InferShapes())
        found = execute_onnx(model, inputs, return_full_exec_context=True)
    return {n: _tensor(a) for n, a in found.items() if n and a is not None and a.dtype != object}


def _float_parameters(session: Session, proto: onnx.ModelProto) -> dict[str, Tensor]:
    """Constants that are called and shaped as parameters and buffers of the model."""
    from onnx import numpy_helper

    own = dict(session.model.named_parameters()) | dict(session.model.named_buffers())
    found = {}
    for t in proto.graph.initializer:
        if t.name in own and tuple(t.dims) == tuple(own[t.name].shape):
            found[t.name] = _tensor(numpy_helper.to_array(t))
    return found


def load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """An ONNX file.

    Raises:
        ExportError: it can't be read.
    """
    import onnx

    try:
        return onnx.load(os.fspath(path))
    except Exception as error:
        raise shortened(f"reading {os.fspath(path)}", error) from error


def _tensor(array: Any) -> Tensor:
    import numpy as np

    array = np.ascontiguousarray(array) if getattr(array, "ndim", 0) else np.asarray(array)
    try:
        return torch.from_numpy(array.copy())
    except TypeError:  # a dtype of the ml_dtypes package
        return torch.from_numpy(array.astype(np.float32))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
