"""The error of a layer's outputs as a function of its quantized weights, and searches for weights with little of it.

With ``H`` and ``C`` the means of ``2 y y^T`` and ``2 y x^T`` (``y`` the inputs in the quantized model, ``x`` those in the float
one), the error of ``q`` against the float weights ``w`` is ``tr(q^T H q) - 2 tr(q^T C w)``, up to a constant. It takes the place
of the data: a step costs one product, and is that of all samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.graph.input_statistics import InputStatistics

_BLOCK = 64


class OutputError:
    """The error for each row of a matrix of weights.

    Args:
        original: the float matrix, ``(groups, columns, rows)``.
        statistics: of the layer's inputs.
    """

    def __init__(self, original: Tensor, statistics: InputStatistics) -> None:
        self.hessian = statistics.hessian
        self.target = statistics.cross @ original

    def slope(self, q: Tensor) -> Tensor:
        """Half of the gradient."""
        return self.hessian @ q - self.target

    def of_rows(self, q: Tensor) -> Tensor:
        """The error of each row, up to a constant of the row, ``(groups, 1, rows)``."""
        return (q * (self.hessian @ q - 2 * self.target)).sum(dim=1, keepdim=True)


def flip_while_better(
    q: Tensor, other: Tensor, error: OutputError, sweeps: int = 4
) -> tuple[Tensor, Tensor]:
    """Exchange single weights for their other choice wherever that lowers the error of their row.

    Args:
        q: present weights, ``(groups, columns, rows)``.
        other: the other choice for each.
        error: of the weights.
        sweeps: at most so many times over all columns.

    Returns:
        New weights, and the other choice for each of them.
    """
    q, other = q.clone(), other.clone()
    columns = q.shape[1]
    diagonal = error.hessian.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        changed = False
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            h = error.hessian[:, start:stop]
            slope = h @ q - error.target[:, start:stop]
            for i in range(stop - start):
                j = start + i
                step = other[:, j] - q[:, j]
                gain = step * (2 * slope[:, i] + step * diagonal[:, j : j + 1])
                flip = gain < -1e-9 * diagonal[:, j : j + 1] * step.square()
                moved = torch.where(flip, step, 0.0)
                q[:, j] += moved
                other[:, j] -= moved
                slope.baddbmm_(h[:, :, j : j + 1], moved.unsqueeze(1))
                changed = changed or bool(flip.any())
        if not changed:
            break
    return q, other
