"""Everything is in pyproject.toml; this lets a wheel bring the C++ functions along where that is asked for.

    QFRAMEWORK_PREBUILT="AVX2 AVX512" python -m build --wheel

builds them by ``$CXX`` or ``g++`` for these capabilities of CPUs, as torch names them (``DEFAULT`` for any), and the wheel is one for
this platform. Without it the wheel is for all platforms, and the functions are built where they are first needed.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CAPABILITIES = os.environ.get("QFRAMEWORK_PREBUILT", "").split()
NATIVE = Path(__file__).parent / "qframework" / "kernels" / "native"


class BuildWithLibraries(build_py):
    """Also compiles the C++ functions."""

    def run(self) -> None:
        """Copy the modules, then compile."""
        super().run()
        if not CAPABILITIES:
            return
        how = runpy.run_path(str(NATIVE / "compilation.py"))
        known = set(how["CAPABILITIES"])
        if not known.issuperset(CAPABILITIES):
            raise SystemExit(
                f"QFRAMEWORK_PREBUILT={' '.join(CAPABILITIES)!r}: allowed are {', '.join(sorted(known))}"
            )
        compiler = how["find_compiler"]()
        if compiler is None:
            raise SystemExit("QFRAMEWORK_PREBUILT needs a C++ compiler, on Linux: $CXX, g++ or c++")
        place = Path(self.build_lib) / "qframework" / "kernels" / "native" / "prebuilt"
        place.mkdir(parents=True, exist_ok=True)
        for capability in CAPABILITIES:
            path = place / how["library_name"](capability)
            how["compile_library"](compiler, capability, path)
            path.chmod(0o755)


class WheelForPlatform(bdist_wheel):
    """A wheel with libraries is for this platform, and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Of the wheel's name."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if CAPABILITIES else (python, abi, platform)


class WithLibraries(Distribution):
    """Says that there are libraries, though no extension module."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel is for one platform."""
        return bool(CAPABILITIES)


setup(
    distclass=WithLibraries,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelForPlatform},
)
