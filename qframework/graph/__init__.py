"""Algorithms on whole models."""

from qframework.graph.calibrate import calibration_mode

__all__ = ["calibration_mode"]
