"""Which quantized layer stands for which torch layer, and how it is built from one."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_WEIGHTED = ("weight", "bias", "input", "output")


class NoQuantizedForm(Exception):
    """A torch layer was made in a way that its quantized one doesn't have."""


@dataclass(frozen=True)
class Conversion:
    """From a torch layer to its quantized one.

    Attributes:
        target: name of the quantized layer.
        roles: tensors that it quantizes: ``{role}_quant`` and keywords ``{role}_...``.
        special: constructor arguments that aren't attributes of the same name.
        copies: its weights are arranged otherwise, so that they are copied, not shared.
        by_default: replaced without being asked for.
        prefixes: in front of the keywords for a role, where several parts have them.
        operands: in front of the names of operands of attention's products, which ``act_quant`` and its keywords are for; None
            where there are none.
    """

    target: str
    roles: tuple[str, ...]
    special: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    copies: bool = False
    by_default: bool = True
    prefixes: tuple[str, ...] = ("",)
    operands: str | None = None

    @property
    def layer(self) -> type[nn.Module]:
        """The quantized layer."""
        return getattr(sys.modules["qframework.layers"], self.target)  # type: ignore[no-any-return]


_ACT = ("act", "input")
_RECURRENT = ("weight", "bias", "io", "gate_acc", "sigmoid", "tanh", "cell_state")
_BIAS_KV = {"add_bias_kv": lambda m: m.bias_k is not None}
_ENCODER = {
    "d_model": lambda m: m.self_attn.embed_dim,
    "nhead": lambda m: m.self_attn.num_heads,
    "dim_feedforward": lambda m: m.linear1.out_features,
    "dropout": lambda m: m.dropout.p,
    "activation": lambda m: m.activation,
    "layer_norm_eps": lambda m: m.norm1.eps,
    "batch_first": lambda m: m.self_attn.batch_first,
    "bias": lambda m: m.linear1.bias is not None,
}

CONVERSIONS: dict[type[nn.Module], Conversion] = {
    nn.Linear: Conversion("QuantLinear", _WEIGHTED),
    nn.Conv1d: Conversion("QuantConv1d", _WEIGHTED),
    nn.Conv2d: Conversion("QuantConv2d", _WEIGHTED),
    nn.Conv3d: Conversion("QuantConv3d", _WEIGHTED),
    nn.ConvTranspose1d: Conversion("QuantConvTranspose1d", _WEIGHTED),
    nn.ConvTranspose2d: Conversion("QuantConvTranspose2d", _WEIGHTED),
    nn.ConvTranspose3d: Conversion("QuantConvTranspose3d", _WEIGHTED),
    nn.Embedding: Conversion("QuantEmbedding", ("weight",)),
    nn.EmbeddingBag: Conversion("QuantEmbeddingBag", ("weight",)),
    nn.LayerNorm: Conversion("QuantLayerNorm", _WEIGHTED, by_default=False),
    nn.RMSNorm: Conversion("QuantRMSNorm", ("weight", "input", "output"), by_default=False),
    nn.GroupNorm: Conversion("QuantGroupNorm", _WEIGHTED, by_default=False),
    nn.RNN: Conversion("QuantRNN", _RECURRENT[:4], copies=True),
    nn.LSTM: Conversion("QuantLSTM", _RECURRENT, copies=True),
    nn.GRU: Conversion("QuantGRU", _RECURRENT[:6], copies=True),
    nn.MultiheadAttention: Conversion(
        "QuantMultiheadAttention",
        ("weight", "bias", "input"),
        _BIAS_KV,
        copies=True,
        prefixes=("in_proj_", "out_proj_"),
        operands="",
    ),
    nn.TransformerEncoderLayer: Conversion(
        "QuantTransformerEncoderLayer",
        ("weight", "bias", "input"),
        _ENCODER,
        copies=True,
        operands="self_attn_",
    ),
    nn.ReLU: Conversion("QuantReLU", _ACT),
    nn.ReLU6: Conversion("QuantReLU6", _ACT),
    nn.LeakyReLU: Conversion("QuantLeakyReLU", _ACT),
    nn.PReLU: Conversion("QuantPReLU", _ACT),
    nn.ELU: Conversion("QuantELU", _ACT),
    nn.GELU: Conversion("QuantGELU", _ACT),
    nn.SiLU: Conversion("QuantSiLU", _ACT),
    nn.Sigmoid: Conversion("QuantSigmoid", _ACT),
    nn.Tanh: Conversion("QuantTanh", _ACT),
    nn.Hardtanh: Conversion("QuantHardTanh", _ACT),
    nn.Hardswish: Conversion("QuantHardSwish", _ACT),
    nn.Hardsigmoid: Conversion("QuantHardSigmoid", _ACT),
    nn.Softmax: Conversion("QuantSoftmax", _ACT, by_default=False),
}

#: Modules that compute nothing of their own with numbers, or only choose and move them.
NEUTRAL = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
    nn.Upsample, nn.UpsamplingNearest2d,
)  # fmt: skip


def _first_tensor(module: nn.Module) -> torch.Tensor | None:
    return next(module.parameters(), None)


#: GPT-2's layer in transformers, whose weight is a linear layer's transposed.
TRANSPOSED = Conversion(
    "QuantTransposedLinear",
    _WEIGHTED,
    {"in_features": lambda m: m.weight.shape[0], "out_features": lambda m: m.weight.shape[1]},
)
#: The many classes of transformers and others that normalize by the root of the mean of squares.
RMS_NORM = Conversion(
    "QuantRMSNorm",
    ("weight", "input", "output"),
    {"normalized_shape": lambda m: tuple(m.weight.shape), "eps": lambda m: epsilon(m)},
    by_default=False,
)


def epsilon(norm: Any) -> float | None:
    """What a norm adds to the mean of squares."""
    names = ("eps", "variance_epsilon", "epsilon")
    return next((float(getattr(norm, n)) for n in names if hasattr(norm, n)), None)


def by_shape(module: Any) -> Conversion | None:
    """The conversion of a class that isn't torch's, known by its name and its parameters, where it computes what is meant.

    That it does is tried on numbers; on the meta device it is taken for granted.
    """
    kind, weight = type(module).__name__, module._parameters.get("weight")
    if weight is None or module._modules or module._buffers or "forward" in vars(module):
        return None
    if kind == "Conv1D" and set(module._parameters) == {"weight", "bias"} and weight.dim() == 2:
        bias = module.bias
        if bias is None or bias.shape != weight.shape[1:]:
            return None
        same = _agrees(module, weight, lambda x: torch.addmm(bias, x, weight))
        return TRANSPOSED if same else None
    if kind.endswith("RMSNorm") and set(module._parameters) == {"weight"} and weight.dim() == 1:
        eps = epsilon(module)
        if eps is None:
            return None
        same = _agrees(module, weight, lambda x: F.rms_norm(x, tuple(weight.shape), weight, eps))
        return RMS_NORM if same else None
    return None


@torch.no_grad()
def _agrees(module: nn.Module, weight: torch.Tensor, function: Callable[[Any], Any]) -> bool:
    """Whether a module computes a function, on some rows of numbers, small ones among them."""
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator) * torch.tensor([[1e-3], [1.0], [30.0]])
    x = x.to(weight.device, weight.dtype)
    try:
        got = copy.deepcopy(module)(x)  # a forward may leave traces
    except Exception:  # whatever another class raises for such an input
        return False
    room = 100 * torch.finfo(weight.dtype).eps
    wanted = function(x)
    return isinstance(got, torch.Tensor) and torch.allclose(got, wanted, rtol=room, atol=room)


def arguments_of(
    module: nn.Module,
    target: type[nn.Module],
    special: Mapping[str, Any],
    base: type[nn.Module] | None = None,
) -> dict[str, Any]:
    """What the torch layer was made with, for the constructor of a quantized one.

    Args:
        module: the torch layer.
        target: the quantized one.
        special: arguments that aren't attributes of the same name.
        base: the torch layer that it computes the same as.
    """
    base = base or type(module)
    theirs: Any = {**inspect.signature(base.__init__).parameters, **special}
    ours = inspect.signature(target.__init__).parameters
    found: dict[str, Any] = {}
    first = _first_tensor(module)
    for name in theirs:
        if name in ("self", "device", "dtype", "inplace", "_weight", "args", "kwargs"):
            continue
        if name in special:
            found[name] = special[name](module)
        elif name == "bias" and not isinstance(getattr(module, "bias", None), bool):
            found[name] = getattr(module, "bias", None) is not None or (
                getattr(module, "in_proj_bias", None) is not None
            )
        elif hasattr(module, name):
            found[name] = getattr(module, name)
    if isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)):
        for name in (
            "input_size",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "bidirectional",
        ):
            found[name] = getattr(module, name)
        if getattr(module, "proj_size", 0) or module.dropout:
            raise NoQuantizedForm("dropout between layers and proj_size have no quantized form")
        if base is nn.RNN:
            found["nonlinearity"] = module.nonlinearity
    if base is nn.Hardtanh:
        found = {"min_val": module.min_val, "max_val": module.max_val}
    if isinstance(module, nn.PReLU):
        found.pop("init", None)
    if isinstance(module, nn.MultiheadAttention):
        found["packed_in_proj"] = module._qkv_same_embed_dim
    accepted = {n: v for n, v in found.items() if n in ours or base is nn.Hardtanh}
    if first is not None and "device" in ours:
        accepted |= {"device": first.device, "dtype": first.dtype}
    return accepted
