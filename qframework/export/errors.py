"""What stands in the way of an export, as data and as an error; what is wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: Length of the messages of our errors, in characters.
_LONGEST = 1400


class ExportError(RuntimeError, ValueError):
    """A model can't be exported as it is; the message says what stands in the way, and what works."""


class CheckpointError(ValueError):
    """A folder that can't be read, doesn't fit the model, or can't be written for it."""


class Obstacle(NamedTuple):
    """One thing that a target can't hold.

    Attributes:
        layer: qualified name of the layer in the model; empty where it is the model itself.
        tensor: which of its tensors, ``"weight"``, ``"act"``, ...
        quantizer: name of the quantizer class.
        reason: what the target lacks.
        remedy: the nearest thing that works.
    """

    layer: str
    tensor: str
    quantizer: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        where = ".".join(p for p in (self.layer, self.tensor) if p)
        what = f"{where} ({self.quantizer})" if self.quantizer else where
        return f"{what}: {self.reason}; {self.remedy}"


def refuse(target: str, obstacles: Sequence[Obstacle]) -> None:
    """Raise where there are obstacles.

    Args:
        target: for the message.
        obstacles: all that were found.

    Raises:
        ExportError: there are some; those that a short message has room for are listed.
    """
    if not obstacles:
        return
    lines, length = [f"{target}: {len(obstacles)} obstacle{'s' * (len(obstacles) > 1)}"], 60
    for i, obstacle in enumerate(obstacles):
        text = f"- {obstacle}"
        if length + len(text) + 60 > _LONGEST and i:
            lines.append(f"- and {len(obstacles) - i} more, see qframework.export.check_export")
            break
        lines.append(text[: _LONGEST - 200])
        length += len(text) + 1
    raise ExportError("\n".join(lines))


def shortened(what: str, error: BaseException) -> ExportError:
    """The error of another program in a few words, without its dump.

    Args:
        what: was being done.
        error: that came out of it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:6])
    return ExportError(f"{what} failed: {type(error).__name__}: {text[:900]}")
