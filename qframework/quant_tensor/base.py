"""The interface of a tensor, for a record that holds one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, ClassVar, NoReturn, SupportsIndex, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.quant_tensor.registry import METHODS, RULES, Rule

Self = TypeVar("Self", bound="QuantTensor")


@overload
def dequantize(x: TensorLike) -> Tensor: ...
@overload
def dequantize(x: object) -> Any: ...
def dequantize(x: object) -> Any:
    """Quantized tensors replaced by their values, inside tuples, lists and dicts too.

    Args:
        x: anything.

    Returns:
        The value of a quantized tensor, same shape; a container of the same type, with its items dequantized; else
        ``x`` itself.
    """
    if type(x) is Tensor or type(x) is nn.Parameter:
        return x
    if isinstance(x, QuantTensor):
        return x.value
    if isinstance(x, (tuple, list)):
        items = [dequantize(i) for i in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(x, dict):
        return {k: dequantize(v) for k, v in x.items()}
    return x


#: Torch's functions take these names too.
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def dispatch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a torch function by its rule, or to the values where there is none.

    Args:
        function: of ``torch``, ``torch.nn.functional`` or ``torch.Tensor``.
        args: its positional arguments, at least one of them or of ``kwargs`` a quantized tensor.
        kwargs: its keyword arguments.

    Returns:
        What the function gives for the values; as quantized tensors where the rule keeps their grid.

    Raises:
        InPlaceError: the function changes a quantized tensor in place.
    """
    if not args and "input" in kwargs and "condition" not in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"),)
    found = _rules_for(args, kwargs).get(function)
    if found is not None:
        if kwargs:
            kwargs = {_NUMPY_NAMES.get(k, k): v for k, v in kwargs.items()}
        result = found(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if args and isinstance(args[0], QuantTensor):
        name = _CHANGES_IN_PLACE.get(function)
        if name is not None:
            raise InPlaceError(_IN_PLACE.format(kind=type(args[0]).__name__, name=name))
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    return function(*dequantize(args), **dequantize(kwargs))


def _rules_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[Any, Any]:
    """The rules of the format that has the fewest."""
    rules: Mapping[Any, Any] = RULES
    for a in (*args, *kwargs.values()):
        for q in a if isinstance(a, (tuple, list)) else (a,):
            if isinstance(q, QuantTensor) and q.rules is not None:
                rules = q.rules
    return rules


class InPlaceError(TypeError, AttributeError):
    """A change in place of a quantized tensor, which has no such methods."""


_IN_PLACE = (
    "{kind}.{name}() would change values under their scale; use the form without the underscore, "
    "or {name}() on q.value"
)


def _changes_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")


#: By function, because a compiler that traces a call may not know the function's name.
_CHANGES_IN_PLACE: dict[Any, str] = {
    getattr(place, name): name
    for place in (torch, F, torch.Tensor)
    for name in dir(place)
    if _changes_in_place(name)
}


class QuantTensor:
    """Base of quantized tensors: immutable records around a dequantized ``value``.

    They behave as tensors do: everything that ``torch.Tensor`` has works here too. Functions that keep a grid
    return a quantized tensor; the others decay to a float tensor, the result on ``value``.
    """

    value: Tensor
    #: From torch functions to their rules, where these aren't all that there are; other functions decay.
    rules: ClassVar[Mapping[Any, Any] | None] = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    # ------------------------------------------------------------ for subclasses

    def map_tensors(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same record with ``function`` applied to each of its tensors."""
        raise NotImplementedError

    def set(self: Self, **changes: object) -> Self:
        """The same record with fields replaced."""
        raise NotImplementedError

    # ------------------------------------------------------------ attributes of a tensor

    @property
    def tensor(self) -> Tensor:
        """The dequantized value."""
        return self.value

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the value."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """Device of the value."""
        return self.value.device

    @property
    def ndim(self) -> int:
        """Number of axes of the value."""
        return self.value.ndim

    @property
    def requires_grad(self) -> bool:
        """Whether the value has a gradient."""
        return self.value.requires_grad

    def dim(self) -> int:
        """Number of axes of the value."""
        return self.value.dim()

    def size(self, *args: int) -> Any:
        """Size of the value."""
        return self.value.size(*args)

    def numel(self) -> int:
        """Number of elements of the value."""
        return self.value.numel()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "value":
            raise AttributeError(name)
        found = METHODS.get(name)
        if found is not None:
            return _Method(self, name, found)
        if _changes_in_place(name) and hasattr(torch.Tensor, name):
            raise InPlaceError(_IN_PLACE.format(kind=type(self).__name__, name=name))
        if hasattr(torch.Tensor, name):
            return getattr(self.value, name)
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}, and neither has torch.Tensor"
        )

    # ------------------------------------------------------------ moving and copying

    def to(self: Self, *args: Target, **kwargs: Target | torch.memory_format) -> Any:
        """Move to a device, or convert the value to a dtype; scale, zero point and bit width keep theirs.

        Arguments as for ``torch.Tensor.to``. A dtype that isn't floating-point gives a plain tensor.
        """
        value: Tensor = self.value.to(*dequantize(args), **dequantize(kwargs))
        if not value.is_floating_point():
            return value
        return self.map_tensors(lambda t: value if t is self.value else t.to(value.device))

    def cpu(self: Self) -> Self:
        """Move to the CPU."""
        return self.map_tensors(lambda t: t.cpu())

    def cuda(
        self: Self,
        device: torch.device | str | int | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Self:
        """Move to a GPU."""
        return self.map_tensors(lambda t: t.cuda(device, non_blocking, memory_format=memory_format))

    def float(self: Self) -> Any:
        """The value in float32."""
        return self.to(torch.float32)

    def double(self: Self) -> Any:
        """The value in float64."""
        return self.to(torch.float64)

    def half(self: Self) -> Any:
        """The value in float16."""
        return self.to(torch.float16)

    def bfloat16(self: Self) -> Any:
        """The value in bfloat16."""
        return self.to(torch.bfloat16)

    def detach(self: Self) -> Self:
        """Cut value and metadata off the graph."""
        return self.map_tensors(lambda t: t.detach())

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Say whether the value has a gradient, in place."""
        self.value.requires_grad_(requires_grad)
        return self

    def clone(self: Self, **kwargs: torch.memory_format) -> Self:
        """Copy all tensors."""
        return self.map_tensors(lambda t: t.clone(**kwargs))

    def contiguous(self: Self, **kwargs: torch.memory_format) -> Self:
        """Lay out the value contiguously; keywords as for ``torch.Tensor.contiguous``."""
        return self.set(value=self.value.contiguous(**kwargs))

    # ------------------------------------------------------------ Python protocols

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.unbind(self))  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> Any:
        return self.value.item()

    def __int__(self) -> Any:
        return int(self.value)

    def __setitem__(self, index: Index, value: Operand) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} doesn't change, and another value may not be on its grid; "
            "use torch.cat or torch.where, or assign to a clone of its .value"
        )

    def __format__(self, specification: str) -> str:
        """One number as that number, as torch does; others as text."""
        if self.value.dim() == 0:
            return format(self.value, specification)
        return object.__format__(self, specification)

    def __array__(self, *args: object, **kwargs: object) -> Any:
        return self.value.__array__(*args, **kwargs)

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, index: Index) -> Any:
        return dispatch(torch.Tensor.__getitem__, (self, index), {})

    def __matmul__(self, other: TensorLike) -> Any:
        return dispatch(torch.matmul, (self, other), {})

    def __rmatmul__(self, other: TensorLike) -> Any:
        return dispatch(torch.matmul, (other, self), {})

    def __pos__(self: Self) -> Self:
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{type(self).__name__} doesn't change; use q.set({name}=...) for a new one"
        )


class _Method:
    """A tensor method of a quantized tensor that has a rule."""

    __slots__ = ("name", "owner", "rule")

    def __init__(self, owner: QuantTensor, name: str, rule: Rule) -> None:
        self.owner, self.name, self.rule = owner, name, rule

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return dispatch(getattr(torch.Tensor, self.name), (self.owner, *args), kwargs)


def _comparison(function: Callable[[Any, Any], Any]) -> Any:
    def compare(self: QuantTensor, other: object) -> Any:
        return function(self.value, dequantize(other))

    return compare


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(QuantTensor, f"__{_name}__", _comparison(getattr(operator, _name)))


def _decaying(function: Callable[[Any, Any], Any], reverse: bool) -> Any:
    def apply(self: QuantTensor, other: Operand) -> Any:
        other = dequantize(other)
        return function(other, self.value) if reverse else function(self.value, other)

    return apply


for _name in ("pow", "mod", "floordiv"):
    setattr(QuantTensor, f"__{_name}__", _decaying(getattr(operator, _name), False))
    setattr(QuantTensor, f"__r{_name}__", _decaying(getattr(operator, _name), True))


#: What layers and functions take and give: a plain tensor, or a quantized one.
TensorLike = Tensor | QuantTensor
#: What stands beside a tensor in an operation of two.
Operand = TensorLike | float | complex
#: One axis, several, or all.
Dims = int | list[int] | tuple[int, ...] | None
#: What selects elements, in brackets; sequences of these too.
Index = SupportsIndex | slice | EllipsisType | TensorLike | Sequence[Any] | None
#: Arguments of ``torch.Tensor.to``: a device, a dtype, a tensor that has both, flags.
Target = torch.device | torch.dtype | str | int | TensorLike | None
