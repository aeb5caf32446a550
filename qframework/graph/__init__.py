"""Whole models: conversion of float ones, calibration, post-training quantization, a summary, penalties."""

from qframework.graph.built_in_recipes import built_in_recipes
from qframework.graph.calibrate import (
    bias_correction_mode,
    calibration_mode,
    norm_correction_mode,
)
from qframework.graph.conversion_report import FunctionEntry, QuantizationReport, ReportEntry
from qframework.graph.conversion_rule import Rule
from qframework.graph.loss import (
    ActivationBitWidthWeightedBySize,
    BitWidthWeighted,
    QuantLayerOutputBitWidthWeightedByOps,
    WeightBitWidthWeightedBySize,
)
from qframework.graph.ptq import ptq
from qframework.graph.ptq_report import LayerRecord, PTQReport, StepRecord
from qframework.graph.quantize_model import quantize_model
from qframework.graph.recipe import LayerRule, Layers, Recipe
from qframework.graph.search import (
    BitWidths,
    Sensitivity,
    SensitivityReport,
    search_bit_widths,
    sensitivity,
)
from qframework.graph.summary import LayerSummary, ModelSummary, TensorSummary, summary

__all__ = [
    "ActivationBitWidthWeightedBySize",
    "BitWidthWeighted",
    "BitWidths",
    "FunctionEntry",
    "LayerRecord",
    "LayerRule",
    "LayerSummary",
    "Layers",
    "ModelSummary",
    "PTQReport",
    "QuantLayerOutputBitWidthWeightedByOps",
    "QuantizationReport",
    "Recipe",
    "ReportEntry",
    "Rule",
    "Sensitivity",
    "SensitivityReport",
    "StepRecord",
    "TensorSummary",
    "WeightBitWidthWeightedBySize",
    "bias_correction_mode",
    "built_in_recipes",
    "calibration_mode",
    "norm_correction_mode",
    "ptq",
    "quantize_model",
    "search_bit_widths",
    "sensitivity",
    "summary",
]
