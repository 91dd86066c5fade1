"""Evaluations of SAEs, one file each."""

from saekit.evals._base import EvalConfig, evaluate

__all__ = ["EvalConfig", "evaluate"]
