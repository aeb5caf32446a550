"""Equalization and rotation of whole models, under one roof."""

from __future__ import annotations

from qframework.graph.activation_equalization import activation_equalization_mode
from qframework.graph.cross_layer_equalization import EqualizeGraph
from qframework.graph.layer_norm_folding import LayerNormToRMS, MergeLnAffine
from qframework.graph.rotation import extract_trainable_rotation_matrices, fuse_parametrizations
from qframework.graph.rotation_equalization import (
    GraphRotationEqualization,
    LayerwiseActivationRotation,
)

__all__ = [
    "EqualizeGraph",
    "GraphRotationEqualization",
    "LayerNormToRMS",
    "LayerwiseActivationRotation",
    "MergeLnAffine",
    "activation_equalization_mode",
    "extract_trainable_rotation_matrices",
    "fuse_parametrizations",
]
