"""How definitions run fast; see :func:`~qframework.kernels.prepare.prepare`. To import it adds the kernels to the definitions."""

import qframework.processes  # noqa: F401 registers itself
from qframework.kernels import (
    absmax,
    codebook,
    collection,
    graphs,
    gru_sequence,
    integer,
    learned,
    lstm_sequence,
    minifloat,
    minmax,
    percentile,
    products,
    rnn_sequence,
    signs,
    statistics,
)
from qframework.kernels.plan import Plan
from qframework.kernels.prepare import prepare
from qframework.kernels.static import Static, static

__all__ = [
    "Plan",
    "Static",
    "absmax",
    "codebook",
    "collection",
    "graphs",
    "gru_sequence",
    "integer",
    "learned",
    "lstm_sequence",
    "minifloat",
    "minmax",
    "percentile",
    "prepare",
    "products",
    "rnn_sequence",
    "signs",
    "static",
    "statistics",
]
