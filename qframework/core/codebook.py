"""Quantizers to the entries of a codebook, and the codebooks of papers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule
from qframework.core.function_wrapper import Identity
from qframework.functional import codebook_quantize, compute_dtype, floating

#: The 4-bit NormalFloat: quantiles of the normal distribution, asymmetric so that 0 is an entry
#: (https://arxiv.org/abs/2305.14314, appendix E).
NORMAL_FLOAT_4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def additive_powers_of_two(bits: int, base_bits: int = 2, signed: bool = True) -> tuple[float, ...]:
    """The levels of APoT: sums of ``n`` powers of two, up to 1 (https://arxiv.org/abs/1909.13144).

    Term ``i`` of ``n = ceil(b / k)`` is 0 or ``2^-(i + j n)``, ``j`` from 0 to ``2^k - 2``; the last term has the bits
    that remain. Levels are divided by the largest.

    Args:
        bits: of a level; one of them is the sign when signed.
        base_bits: ``k``, bits of a term.
        signed: whether levels are mirrored at 0.

    Returns:
        Levels in increasing order: ``2^bits`` of them, one less when signed.

    Raises:
        ValueError: no bits for magnitudes, or a term without bits.
    """
    magnitude_bits = bits - int(signed)
    if magnitude_bits < 1 or base_bits < 1:
        raise ValueError(
            f"additive powers of two need a bit for magnitudes and a term of a bit; got bit_width={bits}, "
            f"signed={signed}, apot_base_bits={base_bits}"
        )
    count = -(-magnitude_bits // base_bits)
    terms = []
    for i in range(count):
        own = min(base_bits, magnitude_bits - i * base_bits)
        terms.append([0.0, *(2.0 ** -(i + j * count) for j in range(2**own - 1))])
    levels = sorted({sum(choice) for choice in itertools.product(*terms)})
    top = levels[-1]
    levels = [v / top for v in levels]
    return (*(-v for v in reversed(levels[1:])), *levels) if signed else tuple(levels)


def check_codebook(codebook: Sequence[float]) -> tuple[float, ...]:
    """The entries as numbers.

    Raises:
        ValueError: fewer than two, one twice, or one that isn't finite.
    """
    entries = tuple(sorted(float(v) for v in codebook))
    finite = all(abs(v) != float("inf") and v == v for v in entries)
    if len(entries) < 2 or len(set(entries)) < len(entries) or not finite:
        raise ValueError(f"codebook needs two or more different, finite entries; got {codebook!r}")
    return entries


class CodebookQuant(CoreModule):
    """The nearest entry, ``y = scale * codebook[index]``; returns values, scale, zero point 0 and the codebook.

    Args:
        codebook: entries, in any order.
        scaling_impl: called with ``(x, threshold)``, the threshold being the largest magnitude of an entry.
        input_view_impl: shapes the input before, the identity when None.
        dtype: of the codebook.
        device: of the codebook.

    Raises:
        ValueError: fewer than two entries, one twice, or one that isn't finite.
    """

    codebook: Tensor
    threshold: Tensor

    def __init__(
        self,
        codebook: Sequence[float],
        scaling_impl: nn.Module,
        input_view_impl: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.entries = check_codebook(codebook)
        wide = compute_dtype(dtype)
        self.register_constant(
            "codebook", torch.tensor(self.entries, dtype=wide, device="cpu"), wide, device
        )
        top = max(abs(self.entries[0]), abs(self.entries[-1]))
        self.register_constant("threshold", top, wide, device)
        self.scaling_impl = scaling_impl
        self.input_view_impl = input_view_impl or Identity()

    @property
    def depends_on_input(self) -> bool:
        """Whether the scale depends on the input of the present call."""
        return bool(getattr(self.scaling_impl, "depends_on_input", True))

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and bits of an index for ``x``."""
        bits = (len(self.entries) - 1).bit_length()
        width = torch.full_like(self.threshold, float(bits))
        return self.scaling_impl(x, self.threshold), torch.zeros_like(width), width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize ``x``."""
        x = floating(x)
        scale = self.scaling_impl(x, self.threshold)
        return (
            codebook_quantize(self.input_view_impl(x), scale, self.codebook),
            scale,
            torch.zeros_like(self.threshold),
            self.codebook,
        )
