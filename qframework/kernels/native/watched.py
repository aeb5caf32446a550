"""Whether objects of Python are what they were, asked of C++ where its library is loaded: see watched.h."""

from __future__ import annotations

import ctypes
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence, Sized
from ctypes import Structure, c_int, c_int64, c_void_p
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from qframework.kernels.native import build


class _Watched(Structure):
    """As ``Watched`` in watched.h has it."""

    _fields_ = [
        *((name, c_int64) for name in ("entries", "containers", "objects")),
        *((name, c_void_p) for name in ("dictionaries", "keys", "values", "held")),
        *((name, c_void_p) for name in ("lengths", "parts", "types", "own")),
    ]


@cache
def _functions() -> Any:
    """The library, called with the interpreter's lock; None where it isn't in a process that has what it calls."""
    found = build.library()
    loaded = ctypes.PyDLL(found._name, handle=found._handle)  # the file may be gone
    loaded.qframework_can_watch.restype = c_int
    # an address, which takes half the time of a pointer to be converted
    loaded.qframework_is_same.argtypes, loaded.qframework_is_same.restype = [c_void_p], c_int
    return loaded if loaded.qframework_can_watch() else None


def can_watch() -> bool:
    """Whether the library is loaded, and finds what it calls of Python."""
    return build.library.cache_info().currsize > 0 and _functions() is not None


def watch(
    entries: Iterable[tuple[Any, str, Any]],
    lengths: Iterable[tuple[Sized, int]],
    objects: Iterable[tuple[object, type, dict[str, Any]]] = (),
) -> Callable[[], bool] | None:
    """A function that tells whether all is as it is said to be; False may also mean that something equal took a place.

    To be asked for where :func:`can_watch`.

    Args:
        entries: dictionaries (those of classes, too), a key, and what is there.
        lengths: containers, and their lengths.
        objects: with their types and dictionaries.

    Returns:
        None where something else than dictionaries and lists is to be watched.
    """
    try:
        places = [(_dictionary(place), key, value) for place, key, value in entries]
        held = [(c if type(c) is list else _dictionary(c), n) for c, n in lengths]
    except TypeError:
        return None
    parts = list(objects)
    columns = [*_columns(places, 3), *_columns(held, 2), *_columns(parts, 3)]
    arrays = [_addresses(column) for column in columns]
    arrays[4] = (c_int64 * len(held))(*columns[4])
    watched = _Watched(len(places), len(held), len(parts), *map(ctypes.addressof, arrays))
    asks = partial(_functions().qframework_is_same, ctypes.addressof(watched))
    asks.kept = (watched, columns, arrays)  # type: ignore[attr-defined]
    return asks


def _dictionary(place: Any) -> dict[Any, Any]:
    """The dictionary itself, also of a class, which gives a view of it."""
    if isinstance(place, MappingProxyType):
        (place,) = gc.get_referents(place)
    if not isinstance(place, dict) or type(place).__len__ not in _LENGTHS:
        raise TypeError
    return place


#: Of dictionaries that say nothing of their own.
_LENGTHS = (dict.__len__, OrderedDict.__len__)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [[row[i] for row in rows] for i in range(width)]


def _addresses(objects: Sequence[object]) -> Any:
    return (c_void_p * len(objects))(*map(id, objects))
