"""Evaluate class probabilities: calibration reports, plots, and baselines to compare with.

Works with any callable from a batch to class probabilities, whether or not a posterior made them.
"""

from laplace_lora.evaluation.baselines import MAP, MCDropout, TemperatureScaling
from laplace_lora.evaluation.ensemble import LoraEnsemble
from laplace_lora.evaluation.evaluator import evaluate
from laplace_lora.evaluation.laplace_baselines import diagonal_laplace, last_layer_laplace
from laplace_lora.evaluation.plots import plot_reports
from laplace_lora.evaluation.report import CalibrationReport, compare
from laplace_lora.evaluation.training_free import TrainingFreeBayes

__all__ = [
    "MAP",
    "CalibrationReport",
    "LoraEnsemble",
    "MCDropout",
    "TemperatureScaling",
    "TrainingFreeBayes",
    "compare",
    "diagonal_laplace",
    "evaluate",
    "last_layer_laplace",
    "plot_reports",
]
