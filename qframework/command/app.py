"""The commands, by typer."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import qframework
from qframework.command.catalogue import catalogue, choose, find
from qframework.graph.table import Table
from qframework.inject import QuantizerError

app = typer.Typer(
    name="python -m qframework",
    help="Look at quantizers, checkpoints and models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _fail(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"qframework {qframework.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Look at quantizers, checkpoints and models."""


@app.command("list")
def list_quantizers(
    text: Annotated[str | None, typer.Argument(help="Anything in name or description.")] = None,
    role: Annotated[
        str | None, typer.Option(help="weight, bias, activation or accumulator.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of an element.")] = None,
    per: Annotated[
        str | None, typer.Option(help="What shares a scale: tensor, channel, row or group.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="A word of the scale: stats, parameter, const, power_of_two.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List predefined quantizers that fit everything given."""
    try:
        found = choose(catalogue(), role, bits, per, scale, text)
    except ValueError as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps([asdict(e) for e in found], indent=1))
        return
    if not found:
        raise _fail(ValueError("no predefined quantizer is like that; leave a filter out"))
    rows = [[e.name, e.role, e.format, e.granularity, e.scale] for e in found]
    typer.echo(str(Table("Quantizers", ["quantizer", "role", "format", "per", "scale"], rows, 5)))
    typer.echo(f"{len(found)} quantizers; explain NAME tells what one is made of")


@app.command()
def explain(name: Annotated[str, typer.Argument(help="Of a predefined quantizer.")]) -> None:
    """Print every name of a quantizer, its value, and what bound it."""
    try:
        quantizer = find(name)
    except QuantizerError as error:
        raise _fail(error) from None
    typer.echo(" ".join((quantizer.__doc__ or "").split()))
    typer.echo(f"Bases: {', '.join(b.__name__ for b in quantizer.__bases__)}\n")
    typer.echo(str(quantizer.explain()))


@app.command()
def summary(
    path: Annotated[
        Path, typer.Argument(help="A safetensors file, or a folder that save_quantized wrote.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Print the tensors of a checkpoint: bits, quantizers, sizes."""
    from qframework.command.checkpoint_summary import read_tensors, table

    try:
        found = read_tensors(path)
    except ImportError:
        raise _fail(
            ImportError("summary needs safetensors: pip install 'qframework[export]'")
        ) from None
    except (OSError, ValueError) as error:
        raise _fail(error) from None
    typer.echo(json.dumps([asdict(t) for t in found], indent=1) if as_json else str(table(found)))


@app.command()
def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:FUNCTION",
            help="A function without arguments that returns (model, batches) or (model, batches, loss); module:function works, too.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    sensitivity: Annotated[
        bool, typer.Option(help="Quantize one layer at a time, too, which takes a pass for each.")
    ] = True,
) -> None:
    """Write one HTML page on a quantized model: histograms, errors, warnings with remedies."""
    from qframework.inspect import report as write_report

    try:
        made = _function(source)()
    except (ImportError, OSError, ValueError) as error:
        raise _fail(error) from None
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise _fail(
            ValueError(
                f"{source} has to return (model, batches) or (model, batches, loss), and gave a {type(made).__name__}"
            )
        )
    model, batches, *loss = made
    try:
        written = write_report(
            model,
            batches,
            output,
            loss[0] if loss else None,
            with_sensitivity=sensitivity,
        )
    except (ImportError, OSError, ValueError) as error:
        raise _fail(error) from None
    for finding in written.findings:
        typer.echo(str(finding))
    typer.echo(f"{output}: {output.stat().st_size / 1024:,.0f} KiB")


def _function(source: str) -> Callable[[], Any]:
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise ValueError(f"{source!r}: write FILE.py:FUNCTION or module:function")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ValueError(f"{place}: no such file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{place} has no function {name!r}")
    return found  # type: ignore[no-any-return]
