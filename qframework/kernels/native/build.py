"""Builds the C++ functions once for a user, and loads them.

They are compiled by the compiler of the machine, in some seconds, into a library that stays in a cache: the folder ``qframework``
in ``$XDG_CACHE_HOME`` or ``~/.cache``, which is the user's own. A wheel may bring them along instead.
"""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
import warnings
from ctypes import POINTER, Structure, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qframework.kernels.native.compilation import (
    CAPABILITIES,
    PREBUILT,
    compile_library,
    find_compiler,
    is_whole,
    library_name,
)


class Call(Structure):
    """The operands of a function, as ``Call`` in kernels.cpp has them."""

    #: What is read, which has to stay until the call is made.
    values: Any

    _fields_ = [
        *((name, c_void_p) for name in ("g", "x", "out", "scale", "zero", "stored", "slope")),
        *((name, c_void_p) for name in ("grad_of_scale", "grad_scale", "grad_zero")),
        *((name, c_void_p) for name in ("top", "where")),
        *((name, c_int64) for name in ("n", "channels", "inner", "taps")),
        *((name, c_double) for name in ("low", "high", "smallest", "threshold")),
        *((name, c_double) for name in ("least_normal", "overflow")),
        *((name, c_int32) for name in ("mantissa_bits", "clamp_gradient", "relu", "threads")),
        *((name, c_int32) for name in ("domain", "exponent_rounding", "rounding")),
    ]


@cache
def compiler() -> tuple[str, ...] | None:
    """The command of the compiler: ``$CXX``, ``g++`` or ``c++``; None where there is none, or where it isn't tried: outside of Linux."""
    found = find_compiler()
    return None if found is None else tuple(found)


@cache
def prebuilt() -> Path | None:
    """The library of this source that came with the package; None where there is none, or a better one can be built.

    That for this CPU, or without a compiler one for less of it.
    """
    own = torch.backends.cpu.get_cpu_capability()
    if own not in CAPABILITIES:
        return None
    less = CAPABILITIES[CAPABILITIES.index(own) :]
    for capability in less if compiler() is None else less[:1]:
        path = PREBUILT / library_name(capability)
        if is_whole(path):
            return path
    return None


@cache
def library() -> ctypes.CDLL:
    """The functions: those of the package, those in the cache, or else built.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the library can't be written or loaded.

    Warns:
        RuntimeWarning: the cache can't be used, so that each process builds its own.
    """
    found = prebuilt()
    if found is not None:
        return _loaded(found)
    command = compiler()
    if command is None:
        raise RuntimeError(
            "no C++ compiler was found (looked for $CXX, g++ and c++, on Linux): install one, or set "
            "qframework.settings.kernels = 'fused'"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    name = library_name(capability, command)
    folder = cache_folder()
    path = folder / name
    reason = _make_own(folder)
    if _is_trusted(folder) and _is_trusted(path) and is_whole(path):
        return _loaded(path)
    if not reason:
        compile_library(command, capability, path)
        return _loaded(path)
    warnings.warn(
        f"{folder} {reason}: each process builds the C++ functions anew, in some seconds. Set XDG_CACHE_HOME to a folder of "
        "your own, or qframework.settings.kernels = 'fused' to do without them",
        RuntimeWarning,
        stacklevel=2,
    )
    with tempfile.TemporaryDirectory(prefix="qframework-") as place:
        compile_library(command, capability, Path(place) / name)
        return _loaded(Path(place) / name)  # what is loaded stays when its file goes


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    run, spread = loaded.qframework_run, loaded.qframework_spread
    run.argtypes = [c_int, c_int, *[c_void_p] * 12, *[c_int64] * 4, c_int]
    run.restype = None
    names = ("row_tops", "absmax_share", "codebook", "codebook_gradients", "signs")
    for name in (*names, "signs_gradients", "row_end_share"):
        short = getattr(loaded, f"qframework_{name}")
        short.argtypes, short.restype = [c_int, POINTER(Call)], None
    large = loaded.qframework_in_large_pages
    large.argtypes, large.restype = [c_void_p, c_int64], None
    spread.argtypes = [c_int, *[c_void_p] * 3, c_int64, *[c_void_p] * 2, c_int, c_int]
    spread.restype = None
    return loaded


# ------------------------------------------------------------ the cache


def cache_folder() -> Path:
    """Where libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "qframework"
    except RuntimeError:  # no home
        return Path("/nonexistent/qframework")


def _make_own(folder: Path) -> str:
    """Make a folder that is the user's own and nobody else's; why it can't be, else an empty text.

    What is below a folder that had to be made stays; nothing is made where it can't be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        held = folder.stat()
        if held.st_uid != os.geteuid():
            return "belongs to another user"
        if held.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        return f"can't be made ({error.strerror})"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "can't be written"


def _is_trusted(path: Path) -> bool:
    """Whether only this user and the administrator can have written something, a folder or a file."""
    try:
        held = path.stat() if path.is_dir() else path.lstat()
    except OSError:
        return False
    if not (stat.S_ISDIR(held.st_mode) or stat.S_ISREG(held.st_mode)):
        return False
    return held.st_uid in (os.geteuid(), 0) and not held.st_mode & 0o022
