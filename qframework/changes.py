"""Which state the quantizers are in: one number, ``changes.count``, that holds while nothing changes."""

from __future__ import annotations

import itertools
import time


class Changes:
    """Counts the changes that decide how something is computed: settings, and parts, settings and hooks of quantizers.

    What was looked up for one count holds while it stays. It is read on every call, and so an attribute rather than a function.
    Counts start with the time, so that what was looked up in another process, and pickled, holds for none of this one.
    """

    __slots__ = ("_next", "count")

    def __init__(self) -> None:
        self._next = itertools.count(time.time_ns())
        self.count = next(self._next)

    def note(self) -> None:
        """Something has changed."""
        self.count = next(self._next)


#: Of this process.
changes = Changes()
