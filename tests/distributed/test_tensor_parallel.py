"""Tensor parallelism is refused, by name."""

import pytest
import torch
import torch.distributed as dist
from several import Processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from qframework.layers import QuantEmbedding, QuantLinear


def _parallelize(rank: int, size: int):
    mesh = init_device_mesh("cpu", (size,))
    found = []
    for style in (ColwiseParallel, RowwiseParallel):
        for layer, x in (
            (QuantLinear(8, 6), torch.randn(4, 8)),
            (QuantEmbedding(8, 6), torch.arange(4)),
        ):
            model = nn.Sequential(layer)
            before, parameter = model(x), layer.weight
            with pytest.raises(RuntimeError, match=r"tensor parallelism.*fully_shard") as refused:
                parallelize_module(model, mesh, {"0": style()})
            assert type(layer).__name__ in str(refused.value)
            assert layer.weight is parameter and not isinstance(parameter, DTensor)
            found.append(torch.equal(model(x), before))
    dist.barrier()
    return found


def test_styles_of_tensor_parallelism_are_refused_and_change_nothing(two: Processes) -> None:
    assert two(_parallelize) == [[True] * 4] * 2
