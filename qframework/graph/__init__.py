"""Whole models: conversion of float ones, calibration, a summary, penalties."""

from qframework.graph.calibrate import calibration_mode
from qframework.graph.conversion_report import FunctionEntry, QuantizationReport, ReportEntry
from qframework.graph.conversion_rule import Rule
from qframework.graph.loss import (
    ActivationBitWidthWeightedBySize,
    BitWidthWeighted,
    QuantLayerOutputBitWidthWeightedByOps,
    WeightBitWidthWeightedBySize,
)
from qframework.graph.quantize_model import quantize_model
from qframework.graph.summary import LayerSummary, ModelSummary, TensorSummary, summary

__all__ = [
    "ActivationBitWidthWeightedBySize",
    "BitWidthWeighted",
    "FunctionEntry",
    "LayerSummary",
    "ModelSummary",
    "QuantLayerOutputBitWidthWeightedByOps",
    "QuantizationReport",
    "ReportEntry",
    "Rule",
    "TensorSummary",
    "WeightBitWidthWeightedBySize",
    "calibration_mode",
    "quantize_model",
    "summary",
]
