"""Programs in the style that users of the reference write: after the command they run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qframework.migrate.__main__ import main

PROGRAMS = Path(__file__).parent / "programs"
NAMES = sorted(p.stem for p in PROGRAMS.glob("*.py"))


@pytest.fixture(scope="module")
def migrated(tmp_path_factory) -> Path:
    """The folder of all programs, after ``--write``."""
    place = tmp_path_factory.mktemp("programs")
    for path in PROGRAMS.glob("*.py"):
        (place / path.name).write_text(path.read_text())
    assert main(["--write", str(place)]) == 0
    return place


@pytest.mark.parametrize("name", NAMES)
def test_a_migrated_program_runs(name, migrated, monkeypatch) -> None:
    """Its own assertions say what has to come out."""
    text = (migrated / f"{name}.py").read_text()
    assert "import brevitas" not in text and "from brevitas" not in text
    monkeypatch.syspath_prepend(str(migrated))
    torch.manual_seed(0)
    exec(compile(text, name, "exec"), {"__name__": name})
    monkeypatch.delitem(sys.modules, "quantizers_in_common", raising=False)


def test_the_command_shows_a_diff_and_changes_nothing(tmp_path, capsys) -> None:
    program = tmp_path / "program.py"
    program.write_text("from brevitas.nn import QuantReLU\n")
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "-from brevitas.nn import QuantReLU\n+from qframework.layers import QuantReLU\n" in out
    assert program.read_text() == "from brevitas.nn import QuantReLU\n"


def test_the_command_writes_and_can_be_run_again(tmp_path, capsys) -> None:
    program = tmp_path / "program.py"
    program.write_bytes(
        b"# coding: latin-1\r\nfrom brevitas.nn import QuantReLU\r\nname = '\xe9'\r\n"
    )
    assert main(["--write", str(program)]) == 0
    written = program.read_bytes()
    assert (
        written
        == b"# coding: latin-1\r\nfrom qframework.layers import QuantReLU\r\nname = '\xe9'\r\n"
    )
    capsys.readouterr()
    assert main(["--write", str(program)]) == 0
    assert program.read_bytes() == written
    assert capsys.readouterr().out == ""


def test_the_command_lists_what_is_left_by_file_and_line(tmp_path, capsys) -> None:
    program = tmp_path / "program.py"
    program.write_text("import torch\nfrom brevitas.export import enable_debug\n")
    main([str(program)])
    assert f"{program}:2: brevitas.export.enable_debug: not here yet: " in capsys.readouterr().out


def test_a_file_that_cant_be_read_is_left_and_the_others_arent(tmp_path, capsys) -> None:
    (tmp_path / "a.py").write_text("import brevitas.nn as\n")
    (tmp_path / "b.py").write_text("import brevitas.nn as q\n")
    assert main(["--write", str(tmp_path), str(tmp_path / "none.py")]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'a.py'}: left as it is" in said
    assert f"{tmp_path / 'none.py'}: left as it is" in said
    assert (tmp_path / "b.py").read_text() == "import qframework.layers as q\n"


def test_hidden_folders_and_installed_packages_are_left_alone(tmp_path, capsys) -> None:
    for place in (".venv", "lib/site-packages", "build"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.py").write_text("import brevitas.nn as q\n")
    assert main(["--write", str(tmp_path)]) == 0
    assert all(p.read_text().startswith("import brevitas") for p in tmp_path.rglob("*.py"))


def test_it_is_a_command(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import brevitas.nn as qnn\n")
    command = [sys.executable, "-m", "qframework.migrate", "--write", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "+import qframework.layers as qnn" in done.stdout
    assert program.read_text() == "import qframework.layers as qnn\n"
