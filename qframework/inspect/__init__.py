"""Looking at a model: distributions, errors, the integers of a layer, logs of training, reports."""

from qframework.inspect.anomaly import Anomaly, AnomalyError, detect_anomaly
from qframework.inspect.compare import Comparison, LayerComparison, compare
from qframework.inspect.findings import Finding, findings
from qframework.inspect.histogram import Histogram
from qframework.inspect.layer_integers import LayerIntegers, TensorIntegers, integers
from qframework.inspect.logger import QuantizationLogger
from qframework.inspect.plots import MissingExtraError
from qframework.inspect.report import Report, report
from qframework.inspect.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from qframework.inspect.statistics import ModelStatistics, TensorStatistics, collect_statistics

__all__ = [
    "Anomaly",
    "AnomalyError",
    "Comparison",
    "Finding",
    "Histogram",
    "LayerComparison",
    "LayerIntegers",
    "LayerSensitivity",
    "MissingExtraError",
    "ModelStatistics",
    "QuantizationLogger",
    "Report",
    "Sensitivity",
    "TensorIntegers",
    "TensorStatistics",
    "collect_statistics",
    "compare",
    "detect_anomaly",
    "findings",
    "integers",
    "report",
    "sensitivity",
]
