"""A progress bar with the time left, by rich or tqdm where one of them is installed, else a line of text."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Bar(Protocol):
    """What shows how far work has come."""

    def at(self, done: int, total: int | None, what: str) -> None:
        """Show that so much is done, and what comes now."""


class _Nothing:
    def at(self, done: int, total: int | None, what: str) -> None:
        """Nothing is shown."""


class _Rich:
    def __init__(self, progress: Any) -> None:
        self.progress, self.task = progress, progress.add_task("")

    def at(self, done: int, total: int | None, what: str) -> None:
        self.progress.update(self.task, completed=done, total=total, description=what)


class _Tqdm:
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def at(self, done: int, total: int | None, what: str) -> None:
        self.bar.total, self.bar.n = total, done
        self.bar.set_description(what)


class _Text:
    def __init__(self) -> None:
        self.start = time.perf_counter()

    def at(self, done: int, total: int | None, what: str) -> None:
        spent = time.perf_counter() - self.start
        left = ""
        if total is not None:
            left = f", {done} of {total}"
            if done:
                left += f", about {spent / done * (total - done):.0f} s left"
        sys.stderr.write(f"\r{what}{left}".ljust(78) + "\r")
        sys.stderr.flush()


@contextmanager
def progress_bar(shown: bool | None) -> Iterator[Bar]:
    """A bar on standard error, gone at the end.

    Args:
        shown: whether there is one; None for only on a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield _Nothing()
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        with _other_bar() as bar:
            yield bar
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Rich(progress)


@contextmanager
def _other_bar() -> Iterator[Bar]:
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield _Text()
        sys.stderr.write("\n")
        return
    with tqdm(leave=False) as bar:
        yield _Tqdm(bar)


def shown(items: Iterable[Any], total: int | None, shown: bool | None, what: str) -> Iterator[Any]:
    """The items, with a bar.

    Args:
        items: of any kind.
        total: how many; None for unknown.
        shown: see :func:`progress_bar`.
        what: they are.
    """
    with progress_bar(shown) as bar:
        bar.at(0, total, what)
        for i, item in enumerate(items):
            yield item
            bar.at(i + 1, total, what)
