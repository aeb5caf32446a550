"""Factoring, reordering and multiplying matrices where they are."""

import pytest
import torch

from qframework.graph import in_place
from qframework.graph.in_place import (
    NotSolvable,
    in_order,
    lower_product,
    mirror_,
    solve_upper_,
    upper_factor,
)
from tests.graph.live_bytes import LiveBytes


def hessian(size: int, groups: int = 2) -> torch.Tensor:
    x = torch.randn(
        groups, size, 2 * size, generator=torch.Generator().manual_seed(size), dtype=torch.float64
    )
    return mirror_(x @ x.transpose(1, 2) / size, from_upper=True)


SIZES = [1, 5, in_place._BLOCK, in_place._BLOCK + 1, 2 * in_place._BLOCK + 40]


@pytest.mark.parametrize("size", SIZES)
def test_the_factor_is_upper_and_its_square_the_matrix(size) -> None:
    matrix = hessian(size)
    before, added = matrix.clone(), torch.rand(2, size, dtype=torch.float64)
    with upper_factor(matrix, added) as factor:
        v = factor.triu()
        assert torch.equal(factor.tril(-1), before.tril(-1))
        torch.testing.assert_close(v @ v.transpose(1, 2), before + torch.diag_embed(added))
        right = torch.randn(2, size, 7, dtype=torch.float64)
        torch.testing.assert_close(v @ solve_upper_(factor, right.clone()), right)
    assert torch.equal(matrix, before)


def test_a_part_of_a_matrix_is_factored_and_the_rest_left_alone() -> None:
    matrix = hessian(150)
    before = matrix.clone()
    with upper_factor(matrix[:, 1:, 1:], torch.zeros(())) as factor:
        v = factor.triu()
        torch.testing.assert_close(v @ v.transpose(1, 2), before[:, 1:, 1:])
        assert torch.equal(matrix[:, 0], before[:, 0])
        assert torch.equal(matrix[:, :, 0], before[:, :, 0])
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("size", SIZES)
def test_after_a_factorization_that_failed_the_matrix_is_as_it_was(size) -> None:
    matrix = hessian(size)
    matrix[1, 0, 0] = -1.0  # met last, when all else is overwritten
    before = matrix.clone()
    with (
        pytest.raises(NotSolvable, match="not positive definite"),
        upper_factor(matrix, torch.zeros(())),
    ):
        pass
    assert torch.equal(matrix, before)
    with upper_factor(matrix, torch.full((), 1e3, dtype=torch.float64)) as factor:
        v = factor.triu()
        wanted = before + torch.diag_embed(torch.full((2, size), 1e3, dtype=torch.float64))
        torch.testing.assert_close(v @ v.transpose(1, 2), wanted)


def test_a_hessian_of_inputs_that_hold_nan_is_told_from_one_of_few_samples() -> None:
    matrix = hessian(SIZES[0])
    matrix[1, 0, 0] = float("nan")
    with (
        pytest.raises(NotSolvable, match="NaN or infinity"),
        upper_factor(matrix, torch.zeros(())),
    ):
        pass


def test_another_order_holds_for_a_while_also_when_something_raises() -> None:
    matrix = hessian(40)
    before = matrix.clone()
    order = torch.stack([torch.randperm(40), torch.randperm(40)])
    with pytest.raises(KeyboardInterrupt), in_order(order, matrix):
        for g in range(2):
            assert torch.equal(matrix[g], before[g][order[g]][:, order[g]])
        raise KeyboardInterrupt
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("size", SIZES)
def test_the_lower_product_leaves_out_what_is_above(size) -> None:
    matrix, right = torch.randn(2, size, size), torch.randn(2, size, 3)
    torch.testing.assert_close(
        lower_product(matrix, right), matrix.tril() @ right, rtol=1e-4, atol=1e-4
    )


def test_working_storage_is_small_beside_the_matrix(monkeypatch) -> None:
    monkeypatch.setattr(in_place, "_BLOCK", 64)
    matrix = hessian(1024, groups=1).float()
    order = matrix.diagonal(dim1=1, dim2=2).argsort(dim=1)
    with LiveBytes() as live, in_order(order, matrix), upper_factor(matrix, torch.ones(())):
        pass
    assert live.peak < matrix.numel() * 4 / 8
