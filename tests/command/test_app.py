"""The commands of python -m qframework."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import qframework
from qframework.command.app import app
from qframework.export import save_quantized
from qframework.graph import quantize_model


def run(*arguments: object, fails: bool = False) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == (1 if fails else 0), done.output
    return done.stderr if fails else done.stdout


def test_list_shows_those_that_fit_as_a_table_or_as_json() -> None:
    text = run("list", "--role", "activation", "--per", "row")
    assert "Int8DynamicActPerRowFloat" in text and "PerTensor" not in text
    found = json.loads(run("list", "LSQ", "--role", "weight", "--json"))
    assert {"Int8WeightPerTensorLSQ", "Int8WeightPerChannelLSQ"} <= {e["name"] for e in found}
    assert "no role 'wheel'" in run("list", "--role", "wheel", fails=True)
    assert "leave a filter out" in run("list", "--bits", 77, fails=True)


def test_explain_tells_each_name_and_where_it_came_from() -> None:
    text = run("explain", "Int8ActPerTensorFloat")
    line = next(x for x in text.splitlines() if x.split()[:1] == ["bit_width"])
    assert line.split() == ["bit_width", "8", "class", "PerTensorFloatScaling8bit"]
    wrong = run("explain", "Int8ActPerTensorFlaot", fails=True)
    assert "Did you mean 'Int8ActPerTensorFloat'?" in wrong


def test_summary_of_a_quantized_checkpoint_counts_packed_bits(tmp_path) -> None:
    model, _ = quantize_model(nn.Sequential(nn.Linear(64, 32)).eval(), weight_bit_width=4)
    save_quantized(model.eval(), tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = {t["name"]: t for t in json.loads(run("summary", path, "--json"))}
        assert found["0.weight"]["kind"] == "4 bits" and found["0.weight"]["bits"] == 4 * 64 * 32
        assert found["0.weight"]["quantizer"] == "Int8WeightPerTensorFloat"
    assert "4 bits" in run("summary", tmp_path)


def test_summary_of_any_safetensors_file_and_of_what_is_none(tmp_path) -> None:
    save_file({"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert json.loads(run("summary", tmp_path / "x.safetensors", "--json"))[0]["bits"] == 192
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    assert "no safetensors file" in run("summary", tmp_path / "y.safetensors", fails=True)
    assert "no such file" in run("summary", tmp_path / "z.safetensors", fails=True)


def test_report_writes_a_page_of_what_a_function_gives(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from qframework.layers import QuantLinear, QuantReLU\n"
        "def made():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(QuantLinear(8, 4), QuantReLU())\n"
        "    batches = [torch.randn(16, 8)]\n"
        "    model(batches[0])\n"
        "    return model, batches\n"
        "def nothing():\n"
        "    return 1\n"
    )
    page = tmp_path / "page.html"
    assert "KiB" in run("report", f"{program}:made", "-o", page, "--no-sensitivity")
    assert page.read_text().startswith("<!doctype html>")
    assert "has to return (model, batches)" in run("report", f"{program}:nothing", fails=True)
    assert "no function 'no'" in run("report", f"{program}:no", fails=True)
    assert "write FILE.py:FUNCTION" in run("report", "x", fails=True)


def test_the_version_is_told() -> None:
    assert run("--version").strip() == f"qframework {qframework.__version__}"


@pytest.mark.parametrize("missing", ["typer"])
def test_without_typer_it_says_what_to_install(missing) -> None:
    script = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {missing!r} else real(n, *a)\n"
        "import runpy; runpy.run_module('qframework', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'qframework[cli]'")
    assert "Traceback" not in done.stderr
