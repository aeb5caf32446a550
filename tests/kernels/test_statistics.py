"""Statistics of large tensors in few passes, and where their gradients go."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qframework
from qframework.functional import abs_max, kth_smallest
from qframework.kernels.statistics import can_search_blocks, from_end

LARGE = 200_003


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    """These functions, also where all others are tested composed."""
    with qframework.settings.use(kernels="fused"):
        yield


def numbers(seed: int, n: int, ties: bool) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return (x * 4).round() if ties else x


def runs(x: torch.Tensor, *how: object) -> str:
    """The name of the first kernel that serves."""
    return next((k.name for k in kth_smallest.kernels if k.serves(x, *how)), "definition")


@pytest.mark.parametrize(
    ("n", "kernel"), [(LARGE, "blocks"), (3000, "selection"), (900, "definition")]
)
@given(
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
def test_elements_of_any_rank_are_exact(
    n, kernel, from_extreme, largest, magnitude, seed, ties
) -> None:
    x = numbers(seed, n, ties)
    rank = n + 1 - from_extreme if largest else from_extreme
    if kernel == "selection" and can_search_blocks(n, from_extreme):
        rank = n + 1 - 40
    assert runs(x, rank, magnitude, None, False) == kernel
    leaf = x.clone().requires_grad_()
    found = kth_smallest(leaf, rank, magnitude)
    ordered = (x.abs() if magnitude else x).sort().values
    assert found.item() == ordered[rank - 1].item()
    (grad,) = torch.autograd.grad(found, leaf)
    (where,) = grad.nonzero(as_tuple=True)
    if magnitude and not found.item():
        assert not len(where)  # the slope of |x| at 0
        return
    assert len(where) == 1
    assert (x.abs() if magnitude else x)[where] == found
    assert grad[where].item() == (x[where].sign().item() if magnitude else 1.0)


@given(st.integers(1, 300), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_ranks_along_an_axis_are_exact(rank, magnitude, keepdim, seed) -> None:
    x = numbers(seed, 2 * 300 * 3, True).view(2, 300, 3)
    how = (rank, magnitude, 1, keepdim)
    near, _ = from_end(rank, 300)
    assert runs(x, *how) == ("selection" if near <= 64 else "definition")
    leaf = x.clone().requires_grad_()
    found = kth_smallest(leaf, *how)
    ordered = (x.abs() if magnitude else x).sort(dim=1).values
    assert torch.equal(found.reshape(2, 3), ordered[:, rank - 1])
    assert found.shape == ((2, 1, 3) if keepdim else (2, 3))
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    hits = grad != 0
    slopes = found.reshape(2, 3) != 0 if magnitude else torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(hits.sum(dim=1), slopes.long())


def test_what_half_precision_finds_is_in_float32() -> None:
    x = numbers(0, LARGE, False).bfloat16()
    for found in (kth_smallest(x, LARGE - 3), kth_smallest(x[:2000], 1999), abs_max(x)):
        assert found.dtype == torch.float32


def test_blocks_find_what_lies_behind_the_last_of_them() -> None:
    x = torch.zeros(8 * 1024 + 5)
    x[-1], x[-3] = 3.0, -7.0
    leaf = x.requires_grad_()
    assert runs(x, 8 * 1024 + 5, False, None, False) == "blocks"
    for rank, magnitude, place in ((len(x), False, -1), (1, False, -3), (len(x), True, -3)):
        found = kth_smallest(leaf, rank, magnitude)
        (grad,) = torch.autograd.grad(found, leaf)
        assert found.abs() == x[place].abs() and grad.nonzero().item() == len(x) + place


def test_the_largest_magnitude_shares_its_gradient() -> None:
    x = torch.tensor([1.0, -3.0, 2.0, 3.0], requires_grad=True)
    zero = torch.zeros(3, requires_grad=True)
    for function in (abs_max, abs_max.definition):
        (grad,) = torch.autograd.grad(function(x), x)
        assert grad.tolist() == [0.0, -0.5, 0.0, 0.5]
        assert torch.autograd.grad(function(zero), zero)[0].tolist() == [0.0, 0.0, 0.0]
