"""The 8-bit floating-point formats that runtimes have."""

from __future__ import annotations

import torch

from qframework.functional import MinifloatFormat

#: Minifloats that ONNX has: bits of exponent and mantissa, bias, largest number.
FLOAT8 = {
    (4, 3, 7, 448.0): ("FLOAT8E4M3FN", torch.float8_e4m3fn),
    (5, 2, 15, 57344.0): ("FLOAT8E5M2", torch.float8_e5m2),
    (4, 3, 8, 240.0): ("FLOAT8E4M3FNUZ", torch.float8_e4m3fnuz),
    (5, 2, 16, 57344.0): ("FLOAT8E5M2FNUZ", torch.float8_e5m2fnuz),
}


def float8_of(exponent_bits: int, format: MinifloatFormat | None) -> tuple[str, torch.dtype] | None:
    """The name in ONNX and the dtype of a minifloat format; None where there is none."""
    if format is None or not format.signed:
        return None
    return FLOAT8.get((exponent_bits, format.mantissa_bits, format.exponent_bias, format.largest))
