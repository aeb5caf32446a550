"""What quantizers mean works, and gives the same numbers, where nothing can import how they run fast."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numbers_by_core import computed

import qframework
import qframework.layers  # with the fast forms

HERE = Path(__file__).parent
TESTS = HERE.parent
#: Rooms that need the fast forms.
ABOVE = re.compile(r"qframework\.(layers|quantizers|proxy|graph|kernels|testing)|\bTESTS\b")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Another Python, which finds the modules beside this one and this library."""
    found = os.pathsep.join([str(HERE), str(Path(qframework.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS.parent,
    )


@pytest.fixture(scope="module")
def by_definition(tmp_path_factory) -> dict[str, list[torch.Tensor]]:
    """What a Python without fast forms computes."""
    file = tmp_path_factory.mktemp("without") / "numbers"
    done = run(str(HERE / "numbers_by_core.py"), str(file))
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.parametrize("kernels", ["auto", "fused", "reference"])
def test_numbers_are_those_of_the_fast_forms(kernels, by_definition) -> None:
    with qframework.settings.use(kernels=kernels):
        fast = computed()
    assert fast.keys() == by_definition.keys()
    for name, found in fast.items():
        assert len(found) == len(by_definition[name])
        for a, b in zip(found, by_definition[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(found[0], by_definition[name][0]), name


def test_rooms_below_are_imported_without_the_fast_forms() -> None:
    rooms = (
        "core.quant",
        "core.float_quant",
        "core.scaling",
        "functional",
        "quant_tensor",
        "inject",
    )
    code = (
        f"import block_kernels, sys, {', '.join(f'qframework.{room}' for room in rooms)}; "
        "assert not [n for n in sys.modules if n.startswith('qframework.kernels')]"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_block_would_be_noticed() -> None:
    done = run("-c", "import block_kernels, qframework.layers")
    assert done.returncode != 0
    assert "qframework.kernels can't be imported here" in done.stderr


def test_the_tests_of_these_rooms_pass_without_the_fast_forms() -> None:
    """Those that need no layers."""
    files = []
    for room, least in (("core", 3), ("functional", 4), ("quant_tensor", 6)):
        found = sorted((TESTS / room).glob("test_*.py"))
        found = [file for file in found if not ABOVE.search(file.read_text())]
        assert len(found) >= least
        files += found
    which = "not slow and not exhaustive"
    options = ["-q", "-x", "-m", which, "-p", "block_kernels", "-p", "no:xdist"]
    done = run("-m", "pytest", *options, *map(str, files))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 300
