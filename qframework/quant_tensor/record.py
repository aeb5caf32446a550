"""What the immutable records of all number formats share: fields, copies, moving, the tree of their tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qframework.quant_tensor.base import QuantTensor
from qframework.quant_tensor.later import Later, can_wait
from qframework.quant_tensor.source import Source, can_read
from qframework.quant_tensor.validation import check_names

Self = TypeVar("Self", bound="Record")
#: See :meth:`Record.with_codes`.
Codes = Tensor | Callable[[], Tensor | None] | None


# Named here, because to look it up in torch each time takes long where nothing is in a cache.
is_compiling = torch.compiler.is_compiling


class Record(QuantTensor):
    """A quantized tensor with named fields, some of them tensors.

    Attributes:
        tensor_names: fields that are tensors, ``value`` first.
        static_names: the others; they are constants to a compiler.
    """

    tensor_names: ClassVar[tuple[str, ...]]
    static_names: ClassVar[tuple[str, ...]]

    scale: Tensor
    zero_point: Tensor
    signed: bool
    training: bool
    source: Source
    symmetric: bool
    has_zero: bool

    @classmethod
    def of_fields(cls: type[Self], fields: tuple[Any, ...]) -> Self:
        """One with these fields, in the order of the names, without any check."""
        out = object.__new__(cls)
        fill(out, fields)
        return out

    def fields(self) -> tuple[Any, ...]:
        """All fields, in the order of their names."""
        return tuple(getattr(self, n) for n in self.tensor_names + self.static_names)

    def _named(self) -> Iterator[tuple[str, Any]]:
        return zip(self.tensor_names + self.static_names, self.fields(), strict=True)

    def replace(self: Self, **changes: object) -> Self:
        """The same record with exactly these fields replaced, for rules: nothing is checked or looked up."""
        out = object.__new__(type(self))
        if not is_compiling():
            held = {**self.__dict__, **changes}
            held.pop("_codes", None)
            out.__dict__.update(held)
            return out
        names = self.tensor_names + self.static_names
        fill(out, tuple([changes[n] if n in changes else getattr(self, n) for n in names]))
        return out

    def replace_later(
        self: Self, later: Callable[[], dict[str, Tensor]], **changes: object
    ) -> Self:
        """As :meth:`replace`, with further tensors that are computed when one of them is first looked at.

        What stands beside a value costs more than the value where tensors are small, and a quantizer behind has no use for it. It
        is what it would have been at once, gradients included.

        Args:
            later: gives the tensors, by the names of their fields.
            **changes: as for :meth:`replace`.
        """
        if not can_wait():
            return self.replace(**later(), **changes)
        wait = Later(later)
        given = {n: changes[n] if n in changes else getattr(self, n) for n in self.static_names}
        out = object.__new__(type(self))
        out.__dict__.update({**given, **changes, "_later": wait})
        return out

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__
        wait: Later | None = held.get("_later")
        if wait is None and name in held:  # another thread has looked meanwhile
            return held[name]
        if wait is None or name not in self.tensor_names:
            return super().__getattr__(name)
        if torch.compiler.is_compiling():  # which may not see what this writes
            return wait.fields()[name]
        for n, t in wait.fields().items():
            held.setdefault(n, t)
        held.pop("_later", None)
        return getattr(self, name)

    def set(self: Self, **changes: object) -> Self:
        """The same record with fields replaced.

        Raises:
            TypeError: an unknown field.
        """
        check_names(changes, self.tensor_names + self.static_names)
        return self.replace(**changes)

    def __getstate__(self) -> dict[str, Any]:
        # A source is known by identity, and means nothing elsewhere.
        state = {**dict(self._named()), "source": None}
        state |= {n: held for n, held in self.__dict__.items() if n not in (*state, "_later")}
        if "_codes" in state:
            state["_codes"] = self.known_codes()
        return state

    # ------------------------------------------------------------ integers of coarse values

    def with_codes(self: Self, codes: Codes) -> Self:
        """The same record, which knows its integers, for values whose dtype is too coarse to tell them.

        In the 8 bits of a bfloat16 number, 254 and 255 steps may be the same.

        Args:
            codes: the integers in the shape of the value, in a float dtype; or what gives them when they are asked for, and None
                where they are known no more.
        """
        object.__setattr__(self, "_codes", codes)
        return self

    def known_codes(self) -> Tensor | None:
        """The integers where they are known beside the value, else None."""
        found: Codes = self.__dict__.get("_codes")
        return found() if callable(found) and not isinstance(found, Tensor) else found  # type: ignore[return-value]

    def moved_codes(self: Self, made: Self, move: Callable[[Tensor], Any]) -> Self:
        """Let a record whose value ``move`` made of this one's know its integers likewise."""
        if self.__dict__.get("_codes") is None:
            return made

        def moved() -> Tensor | None:
            found = self.known_codes()
            return None if found is None else move(found)

        return made.with_codes(moved)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        out = object.__new__(type(self))
        memo[id(self)] = out
        fill(out, tuple([copy.deepcopy(f, memo) for f in self.fields()]))
        known = self.known_codes()
        return out if known is None else out.with_codes(known.clone())

    def detach_(self: Self) -> Self:
        """Cut value and metadata off the graph, in this record; tensors that others hold, such as parameters, stay."""
        fill(self, self.detach().fields())
        return self

    def map_tensors(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same record with ``function`` applied to each of its tensors."""
        made = self.replace(**{n: function(getattr(self, n)) for n in self.tensor_names})
        return self.moved_codes(made, function)

    @property
    def device(self) -> torch.device:
        """Device of all parts.

        Raises:
            RuntimeError: they are on different devices.
        """
        devices = {n: getattr(self, n).device for n in self.tensor_names}
        if len(set(devices.values())) > 1:
            where = ", ".join(f"{n} on {d}" for n, d in devices.items())
            raise RuntimeError(
                f"the parts of this {type(self).__name__} are on different devices: {where}; use q.to(device)"
            )
        return self.value.device

    def __repr__(self) -> str:
        hidden = ("source", "symmetric", "has_zero")
        names = [n for n in self.tensor_names + self.static_names if n not in hidden]
        return f"{type(self).__name__}({', '.join(f'{n}={_shown(getattr(self, n), n)}' for n in names)})"


def _shown(field: object, name: str) -> str:
    """A field as it is printed; one number beside the value in full, where it can be read."""
    if name != "value" and type(field) in (Tensor, torch.nn.Parameter) and field.dim() == 0:  # type: ignore[attr-defined]
        if can_read(field):  # type: ignore[arg-type]
            return repr(field.item())  # type: ignore[attr-defined]
    return repr(field)


def has_field(x: object, name: str) -> bool:
    """Whether something is a record with a field, which isn't looked at; or has an attribute of that name."""
    names = getattr(type(x), "tensor_names", None)
    return hasattr(x, name) if names is None else name in names


def fill(record: Record, fields: tuple[Any, ...]) -> None:
    """Set all fields of a record that is being made."""
    named = zip(record.tensor_names + record.static_names, fields, strict=True)
    if not is_compiling():
        record.__dict__.update(named)
        return
    for name, content in named:
        object.__setattr__(record, name, content)


def register(cls: type[Record]) -> None:
    """Let compilers, ``torch.utils._pytree`` and ``torch.load`` know a record."""
    tensors, static = cls.tensor_names, cls.static_names

    def flatten(q: Record) -> tuple[list[Tensor], tuple[Any, ...]]:
        return [getattr(q, n) for n in tensors], tuple(getattr(q, n) for n in static)

    def flatten_with_keys(
        q: Record,
    ) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], tuple[Any, ...]]:
        parts, context = flatten(q)
        return [(pytree.GetAttrKey(n), t) for n, t in zip(tensors, parts, strict=True)], context

    def to_dumpable(context: tuple[Any, ...]) -> list[Any]:
        # a source is an object of this process
        return [None if n == "source" else c for n, c in zip(static, context, strict=True)]

    def unflatten(parts: Iterable[Tensor], context: tuple[Any, ...]) -> Record:
        return cls.of_fields((*parts, *context))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"qframework.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
        to_dumpable_context=to_dumpable,
        from_dumpable_context=_tuples,
    )
    torch.serialization.add_safe_globals([cls])


def _tuples(context: object) -> Any:
    return tuple(_tuples(c) for c in context) if isinstance(context, (list, tuple)) else context
