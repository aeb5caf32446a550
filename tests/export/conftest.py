"""Exports need packages of the extra "export"; tests of qonnx need that one too."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("onnx") is None or find_spec("onnxruntime") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _skip_without_qonnx(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("qonnx") and find_spec("qonnx") is None:
        pytest.skip("qonnx is not installed")
