import pytest
import torch

from qframework.graph.hadamard import (
    find_closest_hadamard_number,
    hadamard_matrix,
    matmul_hadU,
    matmul_hadUt,
    random_hadamard_matrix,
    random_orthogonal_matrix,
)


@pytest.mark.parametrize(
    "size", [1, 2, 4, 12, 20, 28, 36, 52, 60, 96, 100, 108, 140, 152, 156, 172]
)
def test_hadamard_matrices_are_orthogonal_with_entries_of_one(size) -> None:
    matrix = hadamard_matrix(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size))
    x = torch.randn(3, size)
    torch.testing.assert_close(matmul_hadUt(matmul_hadU(x)), x, atol=1e-5, rtol=1e-5)


def test_a_size_without_one_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match="nearest sizes: 12, 16"):
        hadamard_matrix(14)


def test_random_matrices_follow_their_generator() -> None:
    for make in (random_hadamard_matrix, random_orthogonal_matrix):
        a, b = (make(12, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(a, b)
        torch.testing.assert_close(a @ a.t(), torch.eye(12), atol=1e-5, rtol=0)


def test_the_next_size_is_found() -> None:
    assert [find_closest_hadamard_number(n, 2) for n in (13, 30, 100)] == [24, 40, 108]
