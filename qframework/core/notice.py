"""Batches that are left out of statistics, and the one warning that tells of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from qframework.core.base import CoreModule


class LeftOut(CoreModule):
    """Mixin of what collects statistics: it counts the batches that held NaN or infinity.

    Attributes:
        left_out: 0-dim buffer, those that nobody was told of yet; no state dict holds it.
        notice: called when there are any, and warns once; whoever owns the quantizer gives one that names it.
    """

    left_out: Tensor
    notice: Callable[[], None]

    @torch.no_grad()
    def leave_out(self, finite: Tensor) -> None:
        """Count a batch, unless all of its elements are finite; on CPUs, where to look takes no time, tell at once.

        Args:
            finite: 0-dim bool tensor.
        """
        if torch.compiler.is_compiling() or not _can_look(finite):
            self.left_out.add_(~finite)
        elif not finite:
            self.notice()

    @torch.no_grad()
    def tell_left_out(self) -> None:
        """Tell of what was counted where nothing could be said: on other devices, and in compiled graphs."""
        if type(self.left_out) is not Tensor or self.left_out.is_meta:
            return
        if self.left_out:
            self.left_out.zero_()
            self.notice()


def _can_look(t: Tensor) -> bool:
    return (
        t.is_cpu
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def add_left_out(module: LeftOut, device: torch.device | None) -> None:
    """Register the counter, which starts at 0 wherever the module is moved to, and a notice without a name."""
    module.register_constant("left_out", 0.0, torch.float32, device)
    module.notice = Notice()


class Notice:
    """The one warning that batches were left out of statistics."""

    def __init__(self) -> None:
        self.given = False

    def where(self) -> str:
        """For subclasses: the name of what collects them."""
        return "a quantizer"

    def __call__(self) -> None:
        """Warn, unless that was done."""
        if self.given:
            return
        self.given = True
        warnings.warn(
            f"{self.where()}: a batch that holds NaN or infinity is left out of the statistics, as are others of its "
            "kind; look for what makes them in the layers before",
            RuntimeWarning,
            stacklevel=3,
        )
