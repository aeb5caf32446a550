"""python -m benchmarks: what quantization costs, as ratios to the float network; see --help."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qframework
from benchmarks import copies, growth, recurrent, rows
from benchmarks.kit import QuantKit, freeze
from benchmarks.measure import (
    compare,
    evaluator,
    keep_freed_memory,
    ratio,
    seconds,
    trainer,
)
from benchmarks.network import Network, float_network
from qframework import quantizers as q
from qframework.layers import QuantConv2d, QuantLinear, QuantReLU

#: Name of a measure, what it is, and the goal.
ROWS = {
    "train": ("training step, scales learned", "x float", 1.15),
    "train_collecting": ("training step, statistics collected", "x float", 1.35),
    "eval": ("forward pass in evaluation", "x float", 1.15),
    "frozen": ("forward pass, frozen", "x float", 1.03),
    "saved_bytes": ("bytes saved for backward", "x float", 1.2),
    "build_first_seconds": ("building the network, first time", "s", 0.10),
    "build_again_seconds": ("building it again", "s", None),
    "small_layer": ("QuantLinear 64 x 64, batch 1, evaluation", "x float", 8.0),
    "small_layer_frozen": ("the same, frozen", "x float", 2.0),
    "modules_per_layer": ("modules in a default QuantLinear", "", 12),
    "thousand_layers_seconds": ("building 1,000 layers", "s", 1.0),
    "deepcopy_seconds": ("copying them", "s", 2.0),
    "train_4_bits": ("training step, 4 bits", "x float", 1.20),
    "train_per_channel": ("training step, weights per channel", "x float", 1.35),
    "train_shifted": ("training step, zero points", "x float", 1.35),
    "train_power_of_two": ("training step, power-of-two scales", "x float", 1.35),
    "lstm_train": ("LSTM, training, 40 steps", "x float loop", None),
    "lstm_step_train": ("LSTM, training, a further step", "x float loop", 2.0),
    "lstm_eval": ("LSTM, evaluation, 40 steps", "x float loop", None),
    "lstm_step_eval": ("LSTM, evaluation, a further step", "x float loop", 2.0),
    "gru_train": ("GRU, training, 40 steps", "x float loop", None),
    "gru_step_train": ("GRU, training, a further step", "x float loop", 2.0),
    "gru_eval": ("GRU, evaluation, 40 steps", "x float loop", None),
    "gru_step_eval": ("GRU, evaluation, a further step", "x float loop", 2.0),
    "compiled_train": ("training step, torch.compile", "x compiled float", 1.05),
    "compiled_eval": ("forward pass, torch.compile", "x compiled float", None),
    "compiled_frozen": ("forward pass, frozen, torch.compile", "x compiled float", 1.05),
    "compiled_lstm_train": ("LSTM, training, 40 steps, torch.compile", "x compiled loop", None),
    "compiled_lstm_step_train": ("  a further step", "x compiled loop", 1.3),
    "compiled_lstm_eval": ("LSTM, evaluation, 40 steps, torch.compile", "x compiled loop", None),
    "compiled_lstm_step_eval": ("  a further step", "x compiled loop", 1.3),
    "long_objects": ("2,000 training steps: the second half adds", "objects", 200),
    "long_megabytes": ("the same", "MB", 5),
    "long_time": ("the same, time", "x first half", 1.2),
    "constructions_objects": ("10,000 layers built: the second half adds", "objects", 200),
    "constructions_megabytes": ("the same", "MB", 5),
    "constructions_time": ("the same, time", "x first half", 1.2),
}


def network(
    steps: int = 2,
    bits: int = 8,
    weight: Any = q.Int8WeightPerTensorFloat,
    act: Any = q.Uint8ActPerTensorFloat,
) -> Network:
    """The quantized network."""

    def conv(*args: Any, **kwargs: Any) -> QuantConv2d:
        kwargs |= {"weight_quant": weight, "weight_bit_width": bits}
        return QuantConv2d(*args, **kwargs)

    return Network(
        conv,
        lambda: QuantReLU(act_quant=act, bit_width=bits, collect_stats_steps=steps),
        lambda i, o: QuantLinear(i, o, weight_quant=weight),
    )


def _trained(**options: Any) -> Network:
    model = network(**options)
    step = trainer(model)
    for _ in range(4):
        step()
    return model


def measure(rounds: int, compiled: bool) -> dict[str, float]:
    """All measures of this library."""
    out = compare(float_network, lambda steps: network(steps), rounds)
    plain_network, frozen_network = float_network().eval(), _trained().eval()
    with qframework.frozen(frozen_network):
        out["frozen"] = ratio(evaluator(plain_network), evaluator(frozen_network), 2 * rounds)
    layer, plain, x = QuantLinear(64, 64).eval(), nn.Linear(64, 64), torch.randn(1, 64)
    with torch.no_grad():
        out["small_layer"] = ratio(lambda: plain(x), lambda: layer(x), 500, 50)
        with qframework.frozen(layer):
            out["small_layer_frozen"] = ratio(lambda: plain(x), lambda: layer(x), 500, 50)
    out["modules_per_layer"] = sum(1 for _ in layer.modules())
    many: list[nn.Module] = []
    out["thousand_layers_seconds"] = seconds(
        lambda: many.extend(m for _ in range(500) for m in (QuantLinear(8, 8), QuantReLU()))
    )
    out["deepcopy_seconds"] = seconds(lambda: copy.deepcopy(many))
    kinds: dict[str, dict[str, Any]] = {
        "4_bits": {"bits": 4},
        "per_channel": {"weight": q.Int8WeightPerChannelFloat},
        "shifted": {
            "weight": q.ShiftedUint8WeightPerTensorFloat,
            "act": q.ShiftedUint8ActPerTensorFloat,
        },
        "power_of_two": {
            "weight": q.Int8WeightPerTensorFixedPoint,
            "act": q.Uint8ActPerTensorFixedPoint,
        },
    }
    step = trainer(float_network())
    for name, options in kinds.items():
        out[f"train_{name}"] = ratio(step, trainer(_trained(**options)), rounds)
    out.update(recurrent.measure(rounds, compiled))
    if compiled:
        out.update(_compiled(rounds))
    return out


def _compiled(rounds: int) -> dict[str, float]:
    plain, quant = float_network(), network()
    first: Any = torch.compile(plain, fullgraph=True)
    second: Any = torch.compile(quant, fullgraph=True)
    train = ratio(trainer(first), trainer(second), rounds, warm_up=5)
    plain.eval()
    quant.eval()
    out = {
        "compiled_train": train,
        "compiled_eval": ratio(evaluator(first), evaluator(second), 2 * rounds),
    }
    with qframework.frozen(quant):
        out["compiled_frozen"] = ratio(evaluator(first), evaluator(second), 2 * rounds)
    return out


def _run_peer(python: str, *arguments: str) -> dict[str, Any]:
    """The measures of a peer, by the interpreter of its own environment."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [python, "-m", "benchmarks.peer", *arguments],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def _formats(options: argparse.Namespace, machine: str) -> dict[str, Any]:
    """The networks of all formats, of this library and of a peer; prints their table."""
    names = (
        list(rows.ROWS | rows.MORE) if options.rows == "all" else (options.rows or "").split(",")
    )
    names = [n for n in names if n] or list(rows.ROWS)
    found = {"this library": rows.measure(QuantKit(), options.rounds, freeze, names)}
    if options.compile:
        found["compiled"] = rows.measure(QuantKit(), options.rounds, freeze, names, compiled=True)
    if options.copies:
        found["copies"] = rows.measure(copies.CopyingKit(), options.rounds, copies.freeze, names)
    if options.peer:
        peer = _run_peer(options.peer, "rows", str(options.rounds), ",".join(names))
        found[peer["name"]] = peer["measures"]
    table = Table(title=f"Times and bytes over those of floats ({machine})")
    table.add_column("network")
    for measure in rows.MEASURES:
        for who in found:
            table.add_column(
                measure if who == "this library" else f"{measure}, {who}", justify="right"
            )
        table.add_column("goal", justify="right")
    for name in names:
        cells = []
        for i, measure in enumerate(rows.MEASURES):
            ratios = [found[who].get(name, {}).get(measure) for who in found]
            goal = (rows.ROWS | rows.MORE)[name].goals[i]
            cells += ["" if r is None else f"{r:.2f}" for r in (*ratios, goal)]
        table.add_row((rows.ROWS | rows.MORE)[name].what, *cells)
    Console(width=160).print(table)
    for who, measures in found.items():
        shown = ", ".join(f"{m} {v:.2f}" for m, v in rows.means(measures).items())
        print(f"geometric means, {who}: {shown}")
    return found


def _check(found: dict[str, dict[str, float]], fails: bool) -> None:
    beyond = rows.exceeded(found)
    if not fails:
        return
    if beyond:
        raise SystemExit("beyond the limits:\n" + "\n".join(beyond))
    print("within all limits")


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of each measure")
    parser.add_argument("--kernels", default="auto,fused", help="settings to measure")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too, with the first setting (minutes)"
    )
    parser.add_argument(
        "--long", action="store_true", help="whether anything grows in long work (half a minute)"
    )
    parser.add_argument(
        "--rows", help="names of networks of all formats to measure, alone; 'all' for every one"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail where a network of a format is beyond benchmarks/limits.json",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="networks of all formats by the time of the processor, in one thread: on a machine that others use",
    )
    parser.add_argument(
        "--copies",
        action="store_true",
        help="the same networks with a copy in place of each quantizer, which none can be below",
    )
    parser.add_argument("--peer", help="python of an environment with Brevitas in it")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output/results.json"))
    options = parser.parse_args()
    keep_freed_memory()
    if options.cpu_time:
        torch.set_num_threads(1)
        rows.CLOCK[0] = time.process_time
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    formats = _formats(options, machine)
    if options.rows:
        _write(options.output, {"machine": machine, "formats": formats})
        _check(formats["this library"], options.check)
        return
    columns: dict[str, dict[str, float]] = {}
    for kernels in options.kernels.split(","):
        with qframework.settings.use(kernels=kernels):
            columns[f"kernels {kernels!r}"] = measure(
                options.rounds, options.compile and kernels == options.kernels.split(",")[0]
            )
    if options.long:
        next(iter(columns.values())).update(growth.measure())
    if options.copies:
        columns["copies"] = compare(float_network, lambda _: copies.network(), options.rounds)
    if options.peer:
        found = _run_peer(options.peer, "network", str(options.rounds))
        columns[found["name"]] = found["measures"]
    table = Table(title=f"What quantization costs ({machine})")
    for heading in ("measure", "unit", "goal", *columns):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for name, (what, unit, goal) in ROWS.items():
        if any(name in c for c in columns.values()):
            values = [f"{c[name]:.3g}" if name in c else "" for c in columns.values()]
            table.add_row(what, unit, "" if goal is None else f"{goal:g}", *values)
    Console(width=120).print(table)
    _write(options.output, {"machine": machine, "measures": columns, "formats": formats})
    _check(formats["this library"], options.check)


if __name__ == "__main__":
    main()
