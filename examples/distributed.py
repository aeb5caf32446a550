"""A quantized network learns handwritten digits in several processes: DistributedDataParallel, then fully_shard.

torchrun --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import qframework
from qframework.graph import calibration_mode
from qframework.layers import QuantLinear, QuantReLU

EPOCHS, BATCH = 8, 64


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        QuantLinear(64, 64, weight_bit_width=4),
        QuantReLU(bit_width=4, collect_stats_steps=20),
        QuantLinear(64, 10, weight_bit_width=4),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, rank: int, size: int) -> None:
    """Each process takes its part of every batch; the engine averages gradients, and quantizers their statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            mine = batch[rank::size]
            optimizer.zero_grad()
            cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def shard_calibration(x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """The scale after calibrating on a part of the data in each process, and by one process over all of it."""
    scales = []
    for how, batches in (("auto", x.split(128)[rank::size]), ("never", x.split(128))):
        model = network().eval()
        with (
            qframework.settings.use(reduce_statistics=how),
            torch.no_grad(),
            calibration_mode(model),
        ):
            for batch in batches:
                model(batch)
        scales.append(model[2].act_quant.scale())
    return scales[0], scales[1]


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[:1408], order[1408:]

    found: dict[str, float] = {}
    one = network()
    with qframework.settings.use(reduce_statistics="never"):  # every process trains this one alone
        train(one, x[seen], y[seen], 0, 1)
    found["one process"] = accuracy(one, x[unseen], y[unseen])
    for name in ("DistributedDataParallel", "fully_shard"):
        model: nn.Module = network()
        if name == "fully_shard":
            fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        else:
            model = DistributedDataParallel(model)
        train(model, x[seen], y[seen], rank, size)
        found[name] = accuracy(model, x[unseen], y[unseen])
    together, alone = shard_calibration(x[seen], rank, size)
    every: list[object] = [None] * size
    dist.all_gather_object(every, (found, together.item()))
    if rank == 0:
        for name, right in found.items():
            print(f"{name}: {right:.1%}")
        print(f"scale after calibration: on shards {together:.6f}, by one process {alone:.6f}")
    assert all(other == every[0] for other in every), "all processes end with the same numbers"
    assert torch.allclose(together, alone, rtol=1e-6)
    assert min(found.values()) > max(found.values()) - 0.03
    del model  # engines go before their processes part
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
