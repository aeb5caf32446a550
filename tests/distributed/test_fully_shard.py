"""FSDP2, ``fully_shard``, in real processes."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from several import Processes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qframework.layers import QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import ShiftedUint8ActPerTensorFloat


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=2),
        QuantLinear(8, 6, weight_scaling_impl_type="parameter_from_stats"),
        QuantReLU(collect_stats_steps=2),
        QuantLinear(6, 4, weight_bit_width_impl_type="parameter"),
    )


def sharded(size: int, **how) -> nn.Sequential:
    return fully_shard(net(), mesh=init_device_mesh("cpu", (size,)), **how)


def train(model: nn.Module, rank: int, size: int, steps: int = 6, alike: bool = True) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(7)
    for _ in range(steps):
        x = torch.randn(16, 8) if alike else torch.randn(16 * size, 8)[rank * 16 : rank * 16 + 16]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, list[float]]:
    whole = {
        n: t.full_tensor() if hasattr(t, "full_tensor") else t
        for n, t in model.state_dict().items()
    }
    return {n: t.detach().double().flatten().tolist() for n, t in whole.items()}


def _train(rank: int, size: int, alike: bool = True):
    model = sharded(size)
    train(model, rank, size, alike=alike)
    return state(model)


def test_training_is_that_of_one_process(two: Processes) -> None:
    model = net()
    train(model, 0, 1)
    expected = state(model)
    for found in two(_train):
        assert found.keys() == expected.keys()
        for name in expected:
            ours, right = torch.tensor(found[name]), torch.tensor(expected[name])
            assert torch.allclose(ours, right, rtol=1e-5, atol=1e-6), name


def test_ranks_with_other_data_have_the_same_scales(three: Processes) -> None:
    first, *others = three(_train, False)
    assert all(other == first for other in others)
    assert first["2.act_quant.tensor_quant.scaling_impl.collected_steps"] == [-1]


def _mixed(rank: int, size: int):
    model = sharded(size, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    train(model, rank, size, alike=False)
    found = state(model)
    dtypes = {str(t.dtype) for n, t in model.state_dict().items() if n.endswith("value")}
    return found, sorted(dtypes)


def test_mixed_precision_trains_and_stores_scales_in_float32(two: Processes) -> None:
    (first, dtypes), (second, _) = two(_mixed)
    assert first == second
    assert dtypes == ["torch.float32"]


def _save(rank: int, size: int, folder: str):
    model = sharded(size)
    train(model, rank, size, alike=False)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    return state(model)


def _load(rank: int, size: int, folder: str):
    model = sharded(size)
    read = {"model": get_model_state_dict(model)}
    dcp.load(read, checkpoint_id=folder)
    set_model_state_dict(model, read["model"])
    dist.barrier()
    return state(model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_is_loaded_by_other_numbers_of_processes(two, three) -> None:
    folder = tempfile.mkdtemp()
    saved, _ = two(_save, folder)
    assert all(loaded == saved for loaded in three(_load, folder))
    model = net()  # one process, not sharded
    read = {"model": model.state_dict()}
    dcp.load(read, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(read["model"])
    assert state(model) == saved


def test_checkpoints_with_scales_without_dimensions_load() -> None:
    model = net()
    for _ in range(3):
        model(torch.randn(4, 8))
    older = {n: t.reshape(()) if t.shape == (1,) else t for n, t in model.state_dict().items()}
    other = net()
    other.load_state_dict(older)
    assert state(other) == state(model)
