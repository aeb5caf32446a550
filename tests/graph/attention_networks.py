"""Small transformers with torch's attention, before and behind norms."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

SIZE, HEADS, LENGTH, BATCH, WORDS = 16, 4, 5, 3, 11


class Block(nn.Module):
    """A block of a transformer by hand."""

    def __init__(self, norm_first: bool, **options) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = nn.MultiheadAttention(SIZE, HEADS, **options)
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def attend(self, x, padding, mask):
        return self.attention(x, x, x, padding, need_weights=False, attn_mask=mask)[0]

    def forward(self, x, padding=None, mask=None):
        if self.norm_first:
            x = x + self.attend(self.norm1(x), padding, mask)
            return x + self.down(torch.relu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x, padding, mask))
        return self.norm2(x + self.down(torch.relu(self.up(x))))


class Stream(nn.Module):
    """Words, blocks and a head."""

    def __init__(self, norm_first: bool, blocks: int = 1, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, SIZE)
        self.blocks = nn.ModuleList(Block(norm_first, **options) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, WORDS)

    def forward(self, tokens, padding=None, mask=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, padding, mask)
        return self.head(self.norm(x))


class OfTorch(nn.Module):
    """The same, of torch's encoder."""

    def __init__(self, norm_first: bool, **options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            SIZE, HEADS, 2 * SIZE, 0.0, norm_first=norm_first, **options
        )
        nested = not norm_first and options.get("batch_first") and options.get("bias", True)
        self.embed = nn.Embedding(WORDS, SIZE)
        self.encoder = nn.TransformerEncoder(
            layer, 1, nn.LayerNorm(SIZE), enable_nested_tensor=nested
        )
        self.head = nn.Linear(SIZE, WORDS)

    def forward(self, tokens, padding=None, mask=None):
        return self.head(self.encoder(self.embed(tokens), mask, padding))


class Cross(nn.Module):
    """Attention of one stream to another one, whose features may be others."""

    def __init__(self, norm_first: bool, memory: int = SIZE, **options) -> None:
        super().__init__()
        sizes = {} if memory == SIZE else {"kdim": memory, "vdim": memory}
        self.embed, self.other = nn.Embedding(WORDS, SIZE), nn.Embedding(WORDS, memory)
        self.norm, self.normed = nn.LayerNorm(SIZE), nn.LayerNorm(memory)
        self.attention = nn.MultiheadAttention(SIZE, HEADS, **sizes, **options)
        self.last, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, WORDS)

    def forward(self, tokens, padding=None, mask=None):
        x, memory = self.embed(tokens), self.normed(self.other(tokens))
        options = {"key_padding_mask": padding, "attn_mask": mask}
        found, weights = self.attention(query=self.norm(x), key=memory, value=memory, **options)
        return self.head(self.last(x + found)) + weights.sum()


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "by hand": Stream,
    "of torch": OfTorch,
    "cross": Cross,
    "cross, other features": lambda norm_first, **o: Cross(norm_first, 12, **o),
}


def network(kind: str, norm_first: bool, seed: int = 0, **options) -> nn.Module:
    """A network in evaluation mode whose channels have different ranges."""
    torch.manual_seed(seed)
    net = NETWORKS[kind](norm_first, **options).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "norm" not in name:
                parameter.mul_(torch.exp(torch.randn(len(parameter), 1)))
    return net


def tokens(batch_first: bool) -> torch.Tensor:
    """Some words."""
    shape = (BATCH, LENGTH) if batch_first else (LENGTH, BATCH)
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(3))


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys are padding, and which each query may not see."""
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 3:] = True
    return padding, torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def outputs(net: nn.Module, batch_first: bool) -> list[torch.Tensor]:
    """What a network gives, without masks and with each of them, with gradients and without, which torch computes otherwise.

    Of padded places nothing is asked: torch's encoder gives zeros there or not, as it computes.
    """
    x, (padding, mask) = tokens(batch_first), masks()
    calls = [(x,), (x, padding, mask)]
    there = ~(padding if batch_first else padding.t())

    def run(*call) -> torch.Tensor:
        found = net(*call).detach()
        return found if call[1:2] in ((), (None,)) else found[there]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensor.*")
        found = [run(*c) for c in calls]
        with torch.no_grad():
            return found + [run(*c) for c in ((x, padding), (x, None, mask))]


def same(net: nn.Module, before: list[torch.Tensor], batch_first: bool, room: float) -> bool:
    """Whether a network gives what it did."""
    now = outputs(net, batch_first)
    return all(bool((a - b).norm() <= room * b.norm()) for a, b in zip(now, before, strict=True))
