"""The program of a model in which each quantizer is one node: what all ONNX targets and the integers start from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qframework.export.cleaning import clean
from qframework.export.errors import ExportError, shortened
from qframework.export.session import Call, Session
from qframework.export.slots import InSlot, Slot, in_evaluation, plain_outputs, replaced
from qframework.functional import floating
from qframework.quant_tensor import QuantTensor, product_source

#: Of the nodes that stand for quantizers.
DOMAIN, KIND = "qframework", "Quantizer"
#: Where nodes of a program say which call they belong to.
CALL = "qframework"


class _Counter:
    """A number that torch.export, which restores the attributes of modules, leaves alone."""

    calls = 0


class ExportSlot(InSlot):
    """What a slot holds while a model is traced: the constants of a recorded call.

    Args:
        slot: the place.
        session: with the calls.
    """

    def __init__(self, slot: Slot, session: Session) -> None:
        super().__init__(slot)
        self.__dict__["_session"] = (session,)
        self.__dict__["_counter"] = _Counter()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The quantized tensor that the proxy would return."""
        session: Session = self.__dict__["_session"][0]
        if args and args[0] is None:
            return None
        calls, counter = session.calls.get(self.slot.name, ()), self.counter
        if counter.calls >= len(calls):
            raise ExportError(
                f"{self.slot.name} is called more often while the model is traced than in a run: does its forward depend "
                "on values, or on whether it is traced?"
            )
        call = calls[counter.calls]
        counter.calls += 1
        constants = call.constants
        source = session.source_of(constants)
        if constants.role == "bias" and getattr(self.slot.proxy, "requires_input_scale", False):
            source = product_source(args[1], args[2]) or source
        with torch.fx.traceback.annotate({CALL: call.name}):
            if constants.is_parameter:
                value = self.parameter(call)
            else:
                x = args[0].value if isinstance(args[0], QuantTensor) else floating(args[0])
                if constants.activation is not None:
                    x = constants.activation(x)
                value = self.activation(call, x)
        return constants.rewrap(value, source)

    @property
    def counter(self) -> _Counter:
        """How often the module was called."""
        return self.__dict__["_counter"]  # type: ignore[no-any-return]

    def parameter(self, call: Call) -> Tensor:
        """The dequantized weight or bias."""
        c = call.constants
        shape = list(c.shape)
        return symbolic((), call.name, c.dtype, shape)

    def activation(self, call: Call, x: Tensor) -> Tensor:
        """The dequantized activation for what its function made of the input."""
        return symbolic((x,), call.name, x.dtype, list(x.shape))


def symbolic(inputs: tuple[Tensor, ...], call: str, dtype: torch.dtype, shape: list[Any]) -> Tensor:
    """A node that stands for a call."""
    import torch.onnx.ops

    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{KIND}", inputs, attrs={"call": call}, dtype=dtype, shape=shape, version=1
    )


def trace(
    session: Session,
    kind: type[ExportSlot] = ExportSlot,
    dynamic_shapes: Any = None,
    what: str = "torch.export.export",
) -> torch.export.ExportedProgram:
    """Trace a model with export modules in its slots.

    Args:
        session: the model and its recorded calls.
        kind: of the export modules.
        dynamic_shapes: as in ``torch.export.export``.
        what: is being done, for the error.

    Raises:
        ExportError: the model can't be traced.
    """
    model = session.model
    made: list[ExportSlot] = []

    def make(slot: Slot) -> nn.Module:
        made.append(kind(slot, session))
        return made[-1]

    with in_evaluation(model), replaced(session.slots, make), plain_outputs(model), quiet():
        try:
            with torch.no_grad(), torch.fx.traceback.preserve_node_meta():
                program = torch.export.export(
                    model,
                    session.args,
                    session.kwargs,
                    dynamic_shapes=dynamic_shapes,
                    strict=False,
                )
        except ExportError:
            raise
        except Exception as error:
            raise shortened(what, error) from error
    for slot in made:
        wanted, seen = len(session.calls.get(slot.slot.name, ())), slot.counter.calls
        if wanted != seen:
            raise ExportError(
                f"{slot.slot.name} is called {wanted} times in a run and {seen} times while the model is traced"
            )
    return clean(program)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes that exporters write about themselves."""
    loggers = [
        logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def live_calls(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the calls that outputs depend on, in the order of the program."""
    nodes = list(program.graph.nodes)
    needed, found = {nodes[-1]}, []
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
            name = call_of(node)
            if name is not None:
                found.append(name)
    return found[::-1]


def call_of(node: torch.fx.Node) -> str | None:
    """The call that a node stands for; None for other nodes."""
    if node.op != "call_function" or not str(node.target).startswith("onnx_symbolic"):
        return None
    if node.kwargs.get("domain") != DOMAIN:
        return None
    return str(node.kwargs["attr_strs"][0])  # type: ignore[index]
