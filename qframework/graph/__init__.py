"""Algorithms on whole models."""

from qframework.graph.calibrate import calibration_mode
from qframework.graph.summary import LayerSummary, ModelSummary, TensorSummary, summary

__all__ = ["LayerSummary", "ModelSummary", "TensorSummary", "calibration_mode", "summary"]
