"""How the C++ functions are compiled. Imports the standard library alone, so that a wheel can be built without torch.

A library ends with a digest of its own name and content, which loaders don't read. The name tells source, compiler and instruction
set apart. So half a library, and one that was made of another source or lies under another's name, is told from a right one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FLAGS = ["-O2", "-ftree-vectorize", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
#: Values as torch has them: no contraction to fused multiply-adds; loops that become vectors.
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
#: Flags for what torch calls the capability of a CPU; those that aren't here have none.
VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2"],
}
#: From the widest vectors down: a CPU of one runs what was built for the next.
CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")
SOURCE = Path(__file__).with_name("kernels.cpp")
#: All that it is made of.
SOURCES = (
    SOURCE,
    *(
        SOURCE.with_name(f"{name}.h")
        for name in ("calls", "codebooks", "grids", "magnitudes", "numbers", "signs", "watched")
    ),
)
#: Where a wheel has libraries that were built with it.
PREBUILT = Path(__file__).with_name("prebuilt")
_DIGEST = hashlib.sha256().digest_size


def find_compiler() -> list[str] | None:
    """The words of the command: of ``$CXX``, which may have several, else ``g++`` or ``c++``.

    Returns:
        None where there is none, or where it isn't tried: outside of Linux.
    """
    if sys.platform != "linux":
        return None
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [["g++"], ["c++"]]:
        found = shutil.which(words[0])
        if found is not None:
            return [found, *words[1:]]
    return None


def library_name(capability: str, compiler: Sequence[str] = ()) -> str:
    """The name of a library's file.

    Args:
        capability: of the CPU, as torch names it.
        compiler: words of the command; none for a library in a wheel, which may come from any.
    """
    parts = (
        *(path.read_bytes() for path in SOURCES),
        *map(str.encode, compiler),
        platform.machine().encode(),
        *map(str.encode, [*_FLAGS, *VECTORS.get(capability, [])]),
    )
    return f"kernels-{hashlib.sha256(b' '.join(parts)).hexdigest()[:16]}.so"


def compile_library(compiler: Sequence[str], capability: str, path: Path) -> None:
    """Run the compiler; the library appears under its name only when it is whole, since processes may race.

    Args:
        compiler: words of the command.
        capability: of the CPU, as torch names it.
        path: of the library.

    Raises:
        RuntimeError: the compiler fails.
        OSError: the folder can't be written.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as made:
        temporary = Path(made.name)
    try:
        command = [*compiler, *_FLAGS, *VECTORS.get(capability, []), str(SOURCE)]
        run = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(
                f"the C++ compiler failed: {' '.join(command)}\n{run.stderr.strip()[-2000:]}\n"
                "Set qframework.settings.kernels = 'fused' to do without"
            )
        content = temporary.read_bytes()
        temporary.write_bytes(content + _digest(path.name, content))
        temporary.chmod(0o700)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a library is there, and what was built under its name: loading half of one is fatal."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > _DIGEST and _digest(path.name, content[:-_DIGEST]) == content[-_DIGEST:]


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()
