"""What keeps the channels of a tensor apart: modules and functions that let factors, or any linear map of channels, pass."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

#: Modules that scale with their input, element by element.
INVARIANT: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
#: Modules that do along axes behind that of the channels.
SPATIAL: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.Upsample, nn.UpsamplingNearest2d,
)  # fmt: skip
#: Functions and methods that do, element by element.
INVARIANT_FUNCTIONS: frozenset[Any] = frozenset({
    torch.relu, F.relu, F.relu_, F.leaky_relu, F.dropout, "relu", "relu_", "contiguous", "clone",
    "detach",
})  # fmt: skip
#: Functions that do along axes behind that of the channels.
SPATIAL_FUNCTIONS: frozenset[Any] = frozenset({
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.adaptive_max_pool2d, F.interpolate,
})  # fmt: skip
ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
CONCATENATIONS: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate})
FLATTEN: frozenset[Any] = frozenset({torch.flatten, "flatten"})
RESHAPE: frozenset[Any] = frozenset({torch.reshape, "reshape", "view"})
AVERAGES: frozenset[Any] = frozenset({torch.mean, "mean"})
#: What reads a tensor's shape, not its numbers.
SHAPES: frozenset[Any] = frozenset({getattr, "size", "dim"})
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: Modules that let any linear map of their input's channels pass, in evaluation mode.
PASSING: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
PASSING_FUNCTIONS: frozenset[Any] = frozenset({F.dropout, "contiguous", "clone", "detach"})
