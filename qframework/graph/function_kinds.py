"""Functions of torch that compute with numbers, under all the names that they have."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Kind, the functions, the names of methods.
_TABLE: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...] = (
    ("add", (torch.add, operator.add, operator.iadd, Tensor.__iadd__), ("add", "__add__", "__radd__")),
    ("add_", (), ("add_",)),
    ("mul", (torch.mul, torch.multiply, operator.mul, operator.imul, Tensor.__imul__), ("mul", "__mul__", "mul_")),
    ("cat", (torch.cat, torch.concat, torch.concatenate), ()),
    ("matmul", (torch.matmul, torch.bmm, torch.mm, operator.matmul), ("matmul", "bmm", "mm", "__matmul__")),
    ("einsum", (torch.einsum,), ()),
    ("addmm", (torch.addmm, torch.baddbmm, torch.addbmm), ("addmm", "baddbmm")),
    ("scaled_dot_product_attention", (F.scaled_dot_product_attention,), ()),
    ("multi_head_attention_forward", (F.multi_head_attention_forward,), ()),
    ("linear", (F.linear, F.bilinear), ()),
    ("conv", (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), ()),
    ("embedding", (F.embedding, F.embedding_bag), ()),
    ("relu", (F.relu, torch.relu), ("relu",)),
    ("relu_", (F.relu_, torch.relu_), ("relu_",)),
    ("relu6", (F.relu6,), ()),
    ("leaky_relu", (F.leaky_relu,), ()),
    ("elu", (F.elu,), ()),
    ("gelu", (F.gelu,), ()),
    ("silu", (F.silu,), ()),
    ("hardswish", (F.hardswish,), ()),
    ("hardsigmoid", (F.hardsigmoid,), ()),
    ("sigmoid", (F.sigmoid, torch.sigmoid), ("sigmoid",)),
    ("tanh", (F.tanh, torch.tanh), ("tanh",)),
    ("mish", (F.mish,), ()),
    ("softplus", (F.softplus,), ()),
    ("glu", (F.glu,), ()),
    ("hardtanh", (F.hardtanh,), ()),
    ("softmax", (F.softmax, torch.softmax), ("softmax",)),
    ("layer_norm", (F.layer_norm, torch.layer_norm), ()),
    ("batch_norm", (F.batch_norm,), ()),
    ("group_norm", (F.group_norm,), ()),
    ("rms_norm", (F.rms_norm,), ()),
    ("interpolate", (F.interpolate,), ()),
)  # fmt: skip

FUNCTIONS: dict[Any, str] = {
    function: kind
    for kind, functions, methods in _TABLE
    for function in (*functions, *(getattr(Tensor, name) for name in methods))
}
METHODS: dict[str, str] = {name: kind for kind, _, methods in _TABLE for name in methods}

#: Of two tensors; with a number they only move or stretch a grid.
BINARY = frozenset(("add", "add_", "mul"))
#: Their results are never negative.
UNSIGNED = frozenset(("relu", "relu_", "relu6", "hardsigmoid", "sigmoid", "softmax"))
#: They multiply and sum with what may be a weight.
PRODUCTS = frozenset(
    ("matmul", "einsum", "addmm", "linear", "conv", "embedding", "multi_head_attention_forward")
)
#: With a quantized layer that stands for a call.
QUANTIZED = {
    "linear": "QuantIdentity",
    "conv": "QuantIdentity",
    "add": "QuantSum",
    "cat": "QuantConcatenation",
    "matmul": "QuantMatMul",
    "scaled_dot_product_attention": "QuantScaledDotProductAttention",
    "relu": "QuantReLU",
    "relu6": "QuantReLU6",
    "leaky_relu": "QuantLeakyReLU",
    "elu": "QuantELU",
    "gelu": "QuantGELU",
    "silu": "QuantSiLU",
    "hardswish": "QuantHardSwish",
    "hardsigmoid": "QuantHardSigmoid",
    "sigmoid": "QuantSigmoid",
    "tanh": "QuantTanh",
}
#: Of them those whose first operand alone is quantized; the other one is a weight, which layers quantize.
INPUT_ALONE = frozenset(("linear", "conv"))
_SETTINGS = {"leaky_relu": "negative_slope", "elu": "alpha", "gelu": "approximate"}


def settings_of(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call that belong to the constructor of the quantized layer."""
    name = _SETTINGS.get(kind)
    if name is None:
        return {}
    if name in kwargs:
        return {name: kwargs[name]}
    return {name: args[1]} if len(args) > 1 else {}


def operands_of(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a call computes with, as far as a quantizer is concerned."""
    first = args[0] if args else kwargs.get("input", kwargs.get("tensors"))
    if kind == "cat":
        return list(first) if isinstance(first, (list, tuple)) else [first]
    if kind in (*BINARY, "matmul"):
        second = (
            args[1]
            if len(args) > 1
            else next((kwargs[n] for n in ("other", "mat2") if n in kwargs), None)
        )
        return [first, second]
    return [first]
