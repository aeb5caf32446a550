"""What is installed: all folders, with and without the links that tools use."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import qframework

ROOT = Path(__file__).parents[1]
LINKED = {"layers", "quantizers"}


def packages() -> set[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return set(settings["tool"]["setuptools"]["packages"])


def test_every_folder_with_python_files_is_a_package() -> None:
    found = {f"qframework.{name}" for name in LINKED}
    for path in (ROOT / "qframework").rglob("*.py"):
        parts = path.parent.relative_to(ROOT).parts
        if len(parts) == 1 or parts[1] not in LINKED:
            found.add(".".join(parts))
    assert packages() == found


def test_the_links_lead_to_the_folders() -> None:
    for name in LINKED:
        assert (ROOT / "qframework" / name).resolve() == (ROOT / name).resolve()


def copy_of_checkout(place: Path) -> Path:
    """All files but those that tools and builds have made."""
    made = (
        ".git",
        ".venv",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        "*.egg-info",
        "build",
        "_build",
    )
    shutil.copytree(ROOT, place, symlinks=True, ignore=shutil.ignore_patterns(*made))
    return place


def wheel(source: Path, place: Path) -> list[str]:
    """The files of the wheel that a checkout builds."""
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(place)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (made,) = place.glob("*.whl")
    return sorted(zipfile.ZipFile(made).namelist())


@pytest.mark.slow
def test_a_checkout_without_links_builds_the_same_wheel(tmp_path) -> None:
    built = {}
    for kind in ("links", "none"):
        source = copy_of_checkout(tmp_path / kind)
        if kind == "none":
            for name in LINKED:
                (source / "qframework" / name).unlink()
        (tmp_path / f"{kind}-wheel").mkdir()
        built[kind] = wheel(source, tmp_path / f"{kind}-wheel")
    assert built["links"] == built["none"]
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "qframework").rglob("*.py")}
    sources = {p for p in sources if p.split("/")[1] not in LINKED}
    sources |= {f"qframework/{n}/{p.name}" for n in LINKED for p in (ROOT / n).glob("*.py")}
    assert {p for p in built["links"] if p.endswith(".py")} == sources
    native = {
        f"kernels/native/{name}"
        for name in ("kernels.cpp", "calls.h", "codebooks.h", "grids.h", "numbers.h")
    }
    data = {"py.typed", *native, "migrate/names.toml"}
    assert {f"qframework/{name}" for name in data} <= set(built["links"])


@pytest.mark.slow
def test_a_wheel_can_bring_the_libraries_along(tmp_path, monkeypatch) -> None:
    from qframework.kernels.native import compilation

    if compilation.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    source = copy_of_checkout(tmp_path / "source")
    quick = tmp_path / "c++"  # optimizes nothing
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    monkeypatch.setenv("CXX", str(quick))
    monkeypatch.setenv("QFRAMEWORK_PREBUILT", "DEFAULT AVX2")
    (tmp_path / "wheel").mkdir()
    names = wheel(source, tmp_path / "wheel")
    (made,) = (tmp_path / "wheel").glob("*.whl")
    assert "-py3-none-linux" in made.name
    prebuilt = "qframework/kernels/native/prebuilt/"
    expected = {prebuilt + compilation.library_name(c) for c in ("DEFAULT", "AVX2")}
    assert {n for n in names if n.startswith(prebuilt)} == expected
    zipfile.ZipFile(made).extractall(tmp_path / "installed")
    assert all(compilation.is_whole(tmp_path / "installed" / n) for n in expected)
    # without a compiler and without a cache
    script = "from qframework.kernels.native import available as a; print(a())"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path / "installed",
        env=os.environ
        | {"CXX": "none", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "True\n", found.stderr


@pytest.mark.slow
def test_an_unknown_capability_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QFRAMEWORK_PREBUILT", "AVX3")
    source = copy_of_checkout(tmp_path / "source")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        wheel(source, tmp_path)
    assert b"allowed are AVX2, AVX512, DEFAULT" in caught.value.stderr


@pytest.mark.slow
def test_a_source_distribution_holds_the_tests_and_builds_the_same_wheel(tmp_path) -> None:
    source = copy_of_checkout(tmp_path / "source")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in ("tests", "docs", "examples", "benchmarks", "layers", "quantizers"):
        there = {p.relative_to(unpacked) for p in (unpacked / name).rglob("*.py")}
        assert there >= {p.relative_to(source) for p in (source / name).rglob("*.py")}, name
    assert (unpacked / "tests/golden/golden_dev.npz").is_file()
    assert (unpacked / "Makefile").is_file() and (unpacked / "constraints.txt").is_file()
    (tmp_path / "from-source").mkdir(), (tmp_path / "from-archive").mkdir()
    assert wheel(unpacked, tmp_path / "from-archive") == wheel(source, tmp_path / "from-source")


def test_the_version_stands_in_one_place() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert f"version: {qframework.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {qframework.__version__}" in (ROOT / "CHANGELOG.md").read_text()
