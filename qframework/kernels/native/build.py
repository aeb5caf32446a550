"""Builds the C++ functions once per machine, and loads them.

They are compiled by the compiler of the machine, in some seconds, into a library that stays in a cache: the folder ``qframework``
in ``$XDG_CACHE_HOME`` or ``~/.cache``. Its name tells source, compiler and instruction set apart; a digest at its end, which
loaders don't read, tells whether it is whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from ctypes import POINTER, Structure, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

_FLAGS = ["-O2", "-ftree-vectorize", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
#: Values as torch has them: no contraction to fused multiply-adds; loops that become vectors.
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2"],
}


class Call(Structure):
    """The operands of a function, as ``Call`` in kernels.cpp has them."""

    _fields_ = [
        *((name, c_void_p) for name in ("g", "x", "out", "scale", "zero", "stored", "slope")),
        *((name, c_void_p) for name in ("grad_of_scale", "grad_scale", "grad_zero")),
        *((name, c_void_p) for name in ("top", "where")),
        *((name, c_int64) for name in ("n", "channels", "inner", "taps")),
        *((name, c_double) for name in ("low", "high", "smallest", "threshold")),
        *((name, c_int32) for name in ("clamp_gradient", "relu", "threads")),
    ]


@cache
def compiler() -> str | None:
    """The compiler: ``$CXX``, ``g++`` or ``c++``; None where there is none, or where it isn't tried: outside of Linux."""
    if sys.platform != "linux":
        return None
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "c++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


@cache
def library() -> ctypes.CDLL:
    """The functions, built if they aren't in the cache.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(
            "no C++ compiler was found (looked for $CXX, g++ and c++, on Linux): install one, or set "
            "qframework.settings.kernels = 'fused'"
        )
    source = Path(__file__).with_name("kernels.cpp")
    flags = [*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    parts = (
        source.read_bytes(),
        command.encode(),
        platform.machine().encode(),
        *map(str.encode, flags),
    )
    name = f"kernels-{hashlib.sha256(b' '.join(parts)).hexdigest()[:16]}.so"
    path = _folder() / name
    if not _is_whole(path):
        _compile([command, *flags, str(source)], path)
    loaded = ctypes.CDLL(str(path))
    run, quantize, spread = (
        getattr(loaded, f"qframework_{name}") for name in ("run", "quantize", "spread")
    )
    run.argtypes, run.restype = [c_int, c_int, c_int, POINTER(Call)], None
    quantize.argtypes = [c_int, c_int, POINTER(Call), *[c_void_p] * 2, c_int64, c_int, c_int]
    quantize.restype = None
    spread.argtypes = [c_int, *[c_void_p] * 3, c_int64, *[c_void_p] * 2, c_int, c_int]
    spread.restype = None
    return loaded


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "qframework"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or one that can't be written
        pass
    return Path(tempfile.mkdtemp(prefix="qframework-"))


def _compile(command: list[str], path: Path) -> None:
    """Run the compiler; the library appears under its name only when it is whole, since processes may race."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as made:
        temporary = Path(made.name)
    try:
        run = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(
                f"the C++ compiler failed: {' '.join(command)}\n{run.stderr.strip()[-2000:]}\n"
                "Set qframework.settings.kernels = 'fused' to do without"
            )
        content = temporary.read_bytes()
        temporary.write_bytes(content + hashlib.sha256(content).digest())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether a library is there and as it was written, which the digest behind it tells: loading half of one is fatal."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return len(content) > size and hashlib.sha256(content[:-size]).digest() == content[-size:]
