"""Numbers for channels: which are one and the same, which can't be changed and why, and how far others may be."""

from __future__ import annotations

from collections.abc import Iterable


class ChannelNumbers:
    """A number for each channel of each tensor; numbers of channels that are the same have one root.

    Attributes:
        blocked: for a number why its channel can't be scaled or turned.
        most: for a number the largest factor that its channel allows.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.blocked: dict[int, str] = {}
        self.most: dict[int, float] = {}

    def new(self, count: int) -> list[int]:
        """Numbers of channels that are no others."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return list(range(first, first + count))

    def root(self, i: int) -> int:
        """The number that stands for a channel and all that are the same."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, a: Iterable[int], b: Iterable[int]) -> None:
        """Let channels be the same, one by one."""
        for i, j in zip(a, b, strict=True):
            self._parent[self.root(j)] = self.root(i)

    def block(self, ids: Iterable[int], reason: str) -> None:
        """Let channels stay as they are."""
        for i in ids:
            self.blocked.setdefault(i, reason)

    def bound(self, i: int, factor: float) -> None:
        """Let a channel be multiplied by no more than a factor."""
        self.most[i] = min(self.most.get(i, float("inf")), factor)

    def reasons(self) -> dict[int, str]:
        """For the root of each channel that is blocked, or the same as one that is, the first reason."""
        found: dict[int, str] = {}
        for i, why in self.blocked.items():
            found.setdefault(self.root(i), why)
        return found
