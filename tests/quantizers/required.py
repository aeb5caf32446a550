"""The keywords that predefined quantizers can't do without, for inputs (N, ..., 16) or images of 3 channels."""

from typing import Any

from qframework import quantizers

_RANGE = {"min_val": -2.0, "max_val": 2.0}
_NAMED: dict[str, dict[str, Any]] = {
    "IntBias": {"bit_width": 8},
    "Int8ActPerTensorFloatMinMaxInit": _RANGE,
    "Int8ActPerTensorFixedPointMinMaxInit": _RANGE,
    "Uint8ActPerTensorFloatMaxInit": {"max_val": 2.0},
    "Uint8ActPerTensorFixedPointMaxInit": {"max_val": 2.0},
    "ShiftedUint8WeightGroupQuantFloat": {"group_size": 4},
}


def keywords_of(name: str) -> dict[str, Any]:
    """What has to be given."""
    found = dict(_NAMED.get(name, {}))
    proxy = getattr(quantizers, name).proxy_class.__name__
    if name.startswith(("FpOCP", "FpFNUZ")):
        found |= {"bit_width": 7, "exponent_bit_width": 3, "mantissa_bit_width": 3}
    if "PerChannelFloat2d" in name:
        found["per_channel_broadcastable_shape"] = (1, 3, 1, 1)
    if proxy.startswith("GroupwiseAct"):
        found["group_dim"] = -1
    if name.startswith("Codebook"):
        found["codebook"] = (-1.0, -0.4, 0.0, 0.3, 1.0)
    return found


def shape_of(name: str) -> tuple[int, ...]:
    """An input that the quantizer takes."""
    if "2d" in name:
        return (4, 3, 4, 16)
    return (4, 16, 16) if name.endswith("1d") else (4, 16)
