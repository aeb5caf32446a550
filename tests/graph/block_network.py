"""A float network of blocks that torch.fx can't trace."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.a = nn.LayerNorm(width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, *, mask):
        x = x + self.a(self.norm(x)) * mask
        return (x + self.down(torch.relu(self.up(x))),)


class Blocks(nn.Module):
    def __init__(self, width: int = 16, count: int = 3) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(20, width), nn.Parameter(torch.zeros(6, width))
        self.layers = nn.ModuleList(Block(width) for _ in range(count))
        self.head = nn.Linear(width, 5)

    def forward(self, ids, mask=None):
        x = self.embedding(ids) + self.place[: ids.shape[1]]
        if mask is None:
            mask = ids > 0
        for layer in self.layers:
            (x,) = layer(x, mask=mask.unsqueeze(-1).to(x.dtype))
        return {"y": self.head(x)}


def blocks(width: int = 16, count: int = 3) -> Blocks:
    torch.manual_seed(0)
    return Blocks(width, count).eval()


def batches(count: int = 3, size: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 20, (size, 6), generator=generator)} for _ in range(count)]
