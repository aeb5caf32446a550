"""A model that computes in integers, as hardware does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qframework.arguments import check_module
from qframework.export.errors import ExportError, refuse
from qframework.export.function_kinds import ARITHMETIC, MOVES
from qframework.export.integers import EXACT, Integers
from qframework.export.obstacles import check_export
from qframework.export.program import trace
from qframework.export.running import Runner, computed, function_name, in_double, layer_of
from qframework.export.session import Call, Session


class IntegerModel(Runner):
    """Calls give the outputs of a model in float64, computed from integers.

    Codes and sums of products are int64; a result is scaled to the next grid by one multiplication in float64, a shift where
    scales are powers of two, rounded as its quantizer says and clamped. Functions that have no form in integers are computed in
    float64, on the values of the codes.

    Attributes:
        trace: of the last call: from the name of a quantizer's call, or of a layer with ``.accumulator``, to an int64 tensor.
        functions: the functions computed in float64 so far, and the layers that call them.
    """

    def __init__(self, program: torch.export.ExportedProgram, session: Session) -> None:
        super().__init__(program, session)
        self.trace: dict[str, Tensor] = {}
        self.functions: list[str] = []
        self.kept: dict[str, Any] = {}
        self.floats: dict[str, Tensor] = {}
        self.output_scales: list[Tensor | None] = []
        self.outputs: list[Any] = []
        self.given: tuple[Any, ...] = ()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for some inputs, in the structure of the model's own, in float64."""
        self.trace, self.kept = {}, {}
        self.floats = {}
        results = self.execute(args, kwargs)
        flat = [_value(v) for v in results]
        self.output_scales = [v.scale if isinstance(v, Integers) else None for v in results]
        self.given = args
        spec = pytree.tree_structure(self.session.output)
        self.outputs = flat
        if spec.num_leaves != len(flat):
            return flat
        return pytree.tree_unflatten(flat, spec)

    def write_golden(self, folder: str | os.PathLike[str], c_header: bool = False) -> Path:
        """Write the integers of the last call: inputs, weights, biases, accumulators, activations and outputs.

        Args:
            folder: for ``manifest.json`` and one .npy file for each tensor; made where it isn't there.
            c_header: write ``golden.h`` with C arrays, too.

        Returns:
            The path of the manifest.

        Raises:
            ExportError: there was no call yet.
        """
        from qframework.export.golden import write

        if not self.kept:
            raise ExportError(
                "call the integer model first: golden vectors are those of its last call"
            )
        return write(self, folder, c_header)

    # ------------------------------------------------------------ numbers

    def held(self, t: Tensor) -> Any:
        """Floats in float64."""
        return in_double(t.detach().cpu())

    def quantizer(self, call: Call, x: Any) -> Any:
        """The integers of a quantizer; values of minifloats."""
        c = call.constants
        if c.is_parameter:
            assert c.codes is not None
            codes = c.codes
        else:
            steps = _steps(call, x)
            codes = c.rounded(steps)
        if c.format == "minifloat":
            wide = c.dequantized(codes.double())
            self.kept[call.name] = (call, None)
            self.floats[call.name] = wide
            return wide
        if not c.is_parameter:
            codes = codes.nan_to_num(0, 0, 0).long()
        self.trace[call.name] = codes
        scale, zero = c.spread(c.scale).double(), c.spread(c.zero_point).double()
        if bool((zero != zero.round()).any()):
            self.kept[call.name] = (call, None)
            return (codes.double() - zero) * scale
        made = Integers(codes, scale, zero.long())
        self.kept[call.name] = (call, made)
        return made

    def function(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of integers where it keeps them, else in float64."""
        name = function_name(node)
        if any(isinstance(a, Integers) for a in pytree.tree_leaves((args, kwargs))):
            if name in EXACT:
                try:
                    found = EXACT[name](*args, **kwargs)
                except OverflowError:
                    found = NotImplemented
                if found is not NotImplemented:
                    self._keep_accumulator(name, node, found)
                    return found
            if name in MOVES:
                found = _moved(node, name, args, kwargs)
                if found is not NotImplemented:
                    return found
        if name not in ARITHMETIC and name not in MOVES:
            layer = layer_of(node)
            text = f"{name} in {layer}" if layer else name
            if text not in self.functions and _gives_floats(node):
                self.functions.append(text)
        args, kwargs = pytree.tree_map(_value, (args, kwargs))
        return computed(node, args, kwargs)

    def _keep_accumulator(self, name: str, node: torch.fx.Node, found: Any) -> None:
        if not isinstance(found, Integers) or not _is_product(name):
            return
        base = f"{layer_of(node)}.accumulator".lstrip(".")
        label, count = base, 0
        while label in self.trace:
            count += 1
            label = f"{base}#{count}"
        self.trace[label] = found.codes
        self.kept[label] = (None, found)


def _is_product(name: str) -> bool:
    return name in ("linear", "matmul", "mm", "bmm", "addmm") or name.startswith("conv")


def _is_integers(x: Any) -> bool:
    return isinstance(x, Integers)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Integers) else x


def _gives_floats(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _steps(call: Call, x: Any) -> Tensor:
    """``x`` in steps of the grid of a quantizer, in float64."""
    c = call.constants
    if not isinstance(x, Integers):
        # what comes in as floats is divided in their precision, as the quantizer does
        narrow = x.to(c.scale.dtype)
        return c.steps(narrow if torch.equal(narrow.double(), x.double()) else x.double()).double()
    if c.truncates is not None:
        divisor, scale, zero, _ = c.truncates
        q = (x.centered.double() * (x.scale / scale.double()) + zero.double()).round()
        return q / divisor.double()
    steps = x.centered.double() * (x.scale / c.spread(c.scale).double())
    if c.format != "integer" or c.symmetric:
        return steps
    return steps + c.spread(c.zero_point).double()


def _moved(node: torch.fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Integers with their elements moved."""
    parts = [a for a in pytree.tree_leaves((args, kwargs)) if _is_integers(a)]
    first: Integers = parts[0]
    if name in ("to", "_to_copy", "type_as", "dropout", "detach", "clone", "contiguous", "alias"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            return NotImplemented
        return first
    floats = [a for a in pytree.tree_leaves((args, kwargs)) if _is_floats(a)]
    if floats:
        return NotImplemented
    target: Any = node.target

    def apply(field: Any) -> Any:
        moved_args, moved_kwargs = pytree.tree_map(
            lambda a: field(a) if _is_integers(a) else a, (args, kwargs)
        )
        return target(*moved_args, **moved_kwargs)

    if name in ("constant_pad_nd", "pad"):
        filled = args[2] if len(args) > 2 and name == "constant_pad_nd" else 0
        if filled != 0 or (name == "pad" and len(args) > 2 and args[2] != "constant"):
            return NotImplemented
    alike = all(p.one_scale and bool((p.scale == first.scale).all()) for p in parts)
    zero = (
        first.zero
        if alike and all(torch.equal(p.zero.reshape(()), first.zero.reshape(())) for p in parts)
        else None
    )
    floating = name.startswith(("max_pool", "adaptive_max", "upsample"))
    if alike and zero is not None:
        # what is filled in is 0, so that codes move without their zero point
        codes = apply(lambda p: p.centered.double() if floating else p.centered)
        back = zero.reshape(())
        return pytree.tree_map(lambda t: Integers(t.long() + back, first.single, back), codes)
    if floating and any(n > 1 for p in parts for n in p.scale.shape[2:]):
        return NotImplemented
    codes = apply(lambda p: p.centered.double() if floating else p.centered)
    scales = apply(lambda p: p.scale.expand(p.codes.shape).contiguous())
    nothing = torch.zeros((), dtype=torch.int64)
    return pytree.tree_map(lambda t, s: Integers(t.long(), s, nothing), codes, scales)


def _is_floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def integer_model(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> IntegerModel:
    """The model as a program of integers, to call, to look into, and to write golden vectors of.

    Args:
        model: with quantized layers, calibrated; it is run once in evaluation mode, and is afterwards as it was.
        args: positional arguments of a run, a tuple or one tensor.
        kwargs: keyword arguments of a run.
        dynamic_shapes: as in ``torch.export.export``; where None, the first axis of all inputs may vary if the model lets it.

    Raises:
        ExportError: something stands in the way; all of it is named before anything is traced.
    """
    check_module(model, "integer_model")
    refuse("integer model", check_export(model, "integer"))
    session = Session(model, args, kwargs)
    return IntegerModel(free_program(session, dynamic_shapes), session)


def free_program(session: Session, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    """The program of a recorded model, for batches of any size where that is possible."""
    if dynamic_shapes is not None:
        return trace(session, dynamic_shapes=dynamic_shapes)
    try:
        return trace(session, dynamic_shapes=_first_axes(session))
    except ExportError:
        return trace(session)


def _first_axes(session: Session) -> Any:
    def free(x: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None

    if session.kwargs:
        return None
    return tuple(pytree.tree_map(free, a) for a in session.args)
