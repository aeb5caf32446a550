"""Functions of single elements that keep a grid."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from qframework.quant_tensor.registry import rule


@rule("relu")
def _relu(q: Any, inplace: bool = False) -> Any:
    """``max(q, 0)`` is on the grid when 0 is."""
    return q.replace(value=F.relu(q.value)) if q.has_zero else NotImplemented


def _clip_rule(name: str, minimum: float, maximum: float) -> None:
    """Clipping keeps the metadata, as users of this field know it; a bound off the grid makes it invalid."""

    def apply(q: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        if not q.has_zero:
            return NotImplemented
        return q.replace(value=getattr(F, name)(q.value, *args, **kwargs))

    rule(name, method=False)(apply)


_clip_rule("relu6", 0.0, 6.0)
_clip_rule("hardtanh", -1.0, 1.0)


def _dropout_rule(name: str) -> None:
    def apply(q: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """In evaluation the tensor itself; in training dropout rescales, off the grid."""
        return NotImplemented if training and p != 0 else q

    rule(name, method=False)(apply)


for _name in (
    "dropout",
    "alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
):
    _dropout_rule(_name)
