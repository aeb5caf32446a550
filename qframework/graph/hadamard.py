"""Hadamard matrices of every size that a classical construction gives, and products with them.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. Constructions: Sylvester's doubling; Paley's from the squares of a field
of ``q`` elements, of size ``q + 1`` or ``2 (q + 1)``; Goethals and Seidel's from four sequences; and products of those.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

#: Four circulants for sizes that Paley's constructions don't reach: first rows, 1 as ``+``. Found by a search among
#: sequences that a subgroup of the units leaves as they are; their squared spectra add up to four times their length.
_FOUR_SEQUENCES = {
    43: (
        "++-+-++++-+--+--+++--++--+++--+--+-++++-+-+",
        "+-++-----++++-+-+++-++++-+++-+-++++-----++-",
        "+++++-++----+-++--++-++-++--++-+----++-++++",
        "+++---++--+-+-+-++--------++-+-+-+--++---++",
    ),
    39: (
        "+-+-++++--+-++-+--+------+----+-+-+-++-",
        "+---+--++-+++-+-----++--++---++--+++++-",
        "+--++---+++++++----+++--++-+++++-+-++--",
        "+-+--+++-----+-+-++----+--+-----+-+--++",
    ),
}
#: Sizes whose doublings :func:`find_closest_hadamard_number` goes through.
_BASES = (12, 20, 28, 36, 40, 52, 60, 108, 140, 152, 156, 172)


class NoHadamardError(ValueError):
    """A size without a known construction."""


def hadamard_matrix(size: int) -> Tensor:
    """A Hadamard matrix, float32; Sylvester's where the size is a power of two.

    Args:
        size: 1, 2, or a multiple of 4.

    Raises:
        NoHadamardError: there is none, or no construction is known here; the message names the nearest sizes.
    """
    rows = _rows(size)
    if rows is None:
        below = next((n for n in range(size - 1, 0, -1) if n < 3 or _can_be(n)), 1)
        above = next(n for n in range(size + 1, 4 * size + 8) if n < 3 or _can_be(n))
        raise NoHadamardError(
            f"no Hadamard matrix of size {size} is known here; nearest sizes: {below}, {above}"
        )
    return torch.tensor(rows, dtype=torch.float32)


def _can_be(size: int) -> bool:
    return _rows(size) is not None


def _rows(size: int) -> list[list[int]] | None:
    found = _factors(size)
    if found is None:
        return None
    doublings, odd = found
    rows = [[1]] if odd == 1 else _construct(odd)
    for _ in range(doublings):
        rows = [r + r for r in rows] + [r + [-x for x in r] for r in rows]
    return rows


@functools.lru_cache(maxsize=256)
def _factors(size: int) -> tuple[int, int] | None:
    """How often the matrix of a base is doubled, and its size; None where there is none."""
    if not isinstance(size, int) or size < 1:
        return None
    doublings = 0
    while True:
        if size == 1 or _way(size) is not None:
            return doublings, size
        if size % 2:
            return None
        size, doublings = size // 2, doublings + 1


def _way(size: int) -> str | None:
    """How the matrix of a base size is made."""
    if size % 4:
        return None
    if size & (size - 1) == 0:
        return None  # Sylvester's
    if _prime_power(size - 1) and (size - 1) % 4 == 3:
        return "paley"
    if _prime_power(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return "paley two"
    return "four" if size // 4 in _FOUR_SEQUENCES else None


def _construct(size: int) -> list[list[int]]:
    way = _way(size)
    if way == "paley":
        q = _squares(size - 1)
        n = len(q)
        rows = [[1] * (n + 1)]
        rows += [[-1, *(1 if i == j else q[i][j] for j in range(n))] for i in range(n)]
        return rows
    if way == "paley two":
        q = _squares(size // 2 - 1)
        n = len(q) + 1
        core = [[0, *[1] * (n - 1)], *([1, *row] for row in q)]
        rows = []
        for top in (True, False):
            for i in range(n):
                row = []
                for j in range(n):
                    c = core[i][j]
                    pair = (1, -1) if i == j else (c, c)
                    if not top:
                        pair = (-1, -1) if i == j else (c, -c)
                    row.append(pair)
                rows.append([x for x, _ in row] + [x for _, x in row])
        return rows
    return _goethals_seidel(_FOUR_SEQUENCES[size // 4])


def _goethals_seidel(sequences: tuple[str, ...]) -> list[list[int]]:
    n = len(sequences[0])
    a, b, c, d = (torch.tensor([1 if x == "+" else -1 for x in s]) for s in sequences)
    place = (torch.arange(n)[None, :] - torch.arange(n)[:, None]) % n
    ma, mb, mc, md = (x[place] for x in (a, b, c, d))
    flip = torch.eye(n, dtype=torch.int64).flip(0)
    mb, mc, md = mb @ flip, mc @ flip, md @ flip
    tb, tc, td = (x[place].t() @ flip for x in (b, c, d))
    blocks = [
        torch.cat([ma, mb, mc, md], 1),
        torch.cat([-mb, ma, td, -tc], 1),
        torch.cat([-mc, -td, ma, tb], 1),
        torch.cat([-md, tc, -tb, ma], 1),
    ]
    return torch.cat(blocks).tolist()  # type: ignore[no-any-return]


def _prime_power(q: int) -> tuple[int, int] | None:
    """The prime and the exponent of a prime power."""
    if q < 2:
        return None
    prime = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    exponent = 0
    while q % prime == 0:
        q, exponent = q // prime, exponent + 1
    return (prime, exponent) if q == 1 else None


def _squares(q: int) -> list[list[int]]:
    """``chi(a - b)`` over a field of q elements: 1 for squares, -1 for others, 0 for 0."""
    found = _prime_power(q)
    assert found is not None
    prime, exponent = found
    elements = [
        tuple((i // prime**k) % prime for k in range(exponent)) for i in range(q)
    ]  # polynomials, by their coefficients
    modulus = _irreducible(prime, exponent)
    squares = {_product(e, e, prime, modulus) for e in elements if any(e)}

    def chi(e: tuple[int, ...]) -> int:
        return 0 if not any(e) else (1 if e in squares else -1)

    def less(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((x - y) % prime for x, y in zip(a, b, strict=True))

    return [[chi(less(a, b)) for b in elements] for a in elements]


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """Coefficients, but for the leading 1, of a polynomial without factors."""
    if degree == 1:
        return (0,)
    for code in range(prime**degree):
        low = tuple((code // prime**k) % prime for k in range(degree))
        if _is_field(prime, low):
            return low
    raise AssertionError("every degree has an irreducible polynomial")


def _is_field(prime: int, modulus: tuple[int, ...]) -> bool:
    """Whether no two elements other than 0 have the product 0, by the powers of all of them."""
    degree = len(modulus)
    elements = [
        tuple((i // prime**k) % prime for k in range(degree)) for i in range(1, prime**degree)
    ]
    one = (1, *[0] * (degree - 1))
    for e in elements:
        power, base, n = one, e, prime**degree - 1
        while n:
            if n & 1:
                power = _product(power, base, prime, modulus)
            base, n = _product(base, base, prime, modulus), n >> 1
        if power != one:
            return False
    return True


def _product(
    a: tuple[int, ...], b: tuple[int, ...], prime: int, modulus: tuple[int, ...]
) -> tuple[int, ...]:
    degree = len(modulus)
    result = [0] * (2 * degree - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] += x * y
    for i in range(2 * degree - 2, degree - 1, -1):
        for k in range(degree):
            result[i - degree + k] -= result[i] * modulus[k]
    return tuple(x % prime for x in result[:degree])


# ------------------------------------------------------------ products


def get_hadK(n: int, transpose: bool = False) -> tuple[Tensor | None, int]:
    """The base of a size that isn't a power of two.

    Args:
        n: the size.
        transpose: give the transposed base.

    Returns:
        The base's matrix of ``K`` rows and ``K``; ``(None, 1)`` for powers of two.

    Raises:
        NoHadamardError: as :func:`hadamard_matrix`.
    """
    if n > 0 and n & (n - 1) == 0:
        return None, 1
    found = _factors(n)
    if found is None:
        hadamard_matrix(n)
    assert found is not None
    base = hadamard_matrix(found[1])
    return (base.t() if transpose else base), found[1]


def _butterflies(x: Tensor, size: int) -> Tensor:
    """Times Sylvester's matrix along the last axis but one, which is a power of two."""
    step = 1
    while step < size:
        pairs = x.unflatten(-2, (-1, 2, step))
        a, b = pairs.unbind(-3)
        x = torch.stack([a + b, a - b], dim=-3).flatten(-4, -2)
        step *= 2
    return x


def matmul_hadU(x: Tensor, transpose: bool = False, base: Tensor | None = None) -> Tensor:
    """``x @ H / sqrt(n)``, for the Hadamard matrix of the size ``n`` of the last axis, in ``n log n`` steps for powers of two.

    For a size ``2^k m`` the matrix is the Kronecker product of Sylvester's and the base's; both are symmetric up to the base.

    Args:
        x: ``(..., n)``, floating-point.
        transpose: multiply by the transposed matrix, which is the inverse.
        base: that of :func:`get_hadK`, where it is at hand.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        NoHadamardError: as :func:`hadamard_matrix`.
    """
    n = x.shape[-1]
    if base is None:
        found, k = get_hadK(n)
    else:
        found, k = base, base.shape[0]
    y = _butterflies(x.unflatten(-1, (n // k, k)), n // k)
    if found is not None:
        turned = found.to(x.device, x.dtype)
        y = y @ (turned.t() if transpose else turned)
    result: Tensor = y.flatten(-2) * float(n) ** -0.5
    return result


def matmul_hadUt(x: Tensor) -> Tensor:
    """The inverse of :func:`matmul_hadU`."""
    return matmul_hadU(x, transpose=True)


def random_hadamard_matrix(
    size: int, device: Any = None, generator: torch.Generator | None = None
) -> Tensor:
    """An orthogonal matrix: a Hadamard matrix over ``sqrt(n)``, its rows with random signs; float32.

    Args:
        size: ``n``.
        device: of the result.
        generator: of the signs; None for torch's own.
    """
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu").to(torch.float64)
    matrix = matmul_hadU(torch.eye(size, dtype=torch.float64, device="cpu"))
    return ((2 * signs - 1).unsqueeze(1) * matrix).to(device=device, dtype=torch.float32)


def random_orthogonal_matrix(
    size: int, device: Any = None, generator: torch.Generator | None = None
) -> Tensor:
    """An orthogonal matrix, evenly distributed over all; float32.

    Args:
        size: number of rows.
        device: of the result.
        generator: None for torch's own.
    """
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(normal)
    result: Tensor = (q * r.diagonal().sign()).to(device=device, dtype=torch.float32)
    return result


def find_closest_hadamard_number(size: int, steps: int = 1) -> int:
    """The next larger size among the doublings of 12, 20, 28, 36, 40, 52, 60, 108, 140, 152, 156 and 172.

    Args:
        size: to start from.
        steps: how often to go on; 0 gives ``size``.

    Raises:
        ValueError: a negative number.
    """
    if steps < 0 or size < 0:
        raise ValueError(
            f"find_closest_hadamard_number: size={size} and steps={steps} must be 0 or above"
        )
    for _ in range(steps):
        size = min(_next_doubling(base, size) for base in _BASES)
    return size


def _next_doubling(base: int, size: int) -> int:
    while base <= size:
        base *= 2
    return base
