"""The names of the room are imported when they are asked for, and no file format before."""

import subprocess
import sys

import pytest

import qframework.export
from qframework.export import save_quantized
from qframework.layers import QuantLinear

SCRIPT = """
import sys
import qframework, qframework.layers, qframework.export, qframework.graph
print([m for m in ("safetensors", "compressed_tensors", "transformers", "onnx") if m in sys.modules])
from qframework.export import CheckpointError, export_compressed_tensors, load_quantized, save_quantized
print("safetensors" in sys.modules)
"""


def test_importing_loads_no_file_format() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["[]", "False"]


def test_every_name_is_there() -> None:
    for name in qframework.export.__all__:
        assert getattr(qframework.export, name) is not None
        assert name in dir(qframework.export)
    with pytest.raises(AttributeError, match="has no attribute 'save_pickle'"):
        qframework.export.save_pickle  # noqa: B018


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"qframework\[export\]"):
        save_quantized(QuantLinear(4, 4), tmp_path)
