"""Run a trained network over everything in a bucket, a folder or a table, and account for every input."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from infermill.errors import InfermillError, JobMismatchError, ModelError, SourceError, StoreError, UsageError
    from infermill.job import Estimate, estimate, run
    from infermill.models.card import ModelCard
    from infermill.output import read, read_batches
    from infermill.predict import Label, Prediction, load_model
    from infermill.types import CardOptions, Failure, Options, Summary

_HOMES = {
    "CardOptions": "types",
    "Estimate": "job",
    "Failure": "types",
    "InfermillError": "errors",
    "JobMismatchError": "errors",
    "Label": "predict",
    "ModelCard": "models.card",
    "ModelError": "errors",
    "Options": "types",
    "Prediction": "predict",
    "SourceError": "errors",
    "StoreError": "errors",
    "Summary": "types",
    "UsageError": "errors",
    "estimate": "job",
    "load_model": "predict",
    "read": "output",
    "read_batches": "output",
    "run": "job",
}

__all__ = [
    "CardOptions",
    "Estimate",
    "Failure",
    "InfermillError",
    "JobMismatchError",
    "Label",
    "ModelCard",
    "ModelError",
    "Options",
    "Prediction",
    "SourceError",
    "StoreError",
    "Summary",
    "UsageError",
    "estimate",
    "load_model",
    "read",
    "read_batches",
    "run",
]


def __getattr__(name: str) -> Any:
    # Names are imported when they are used: Arrow, NumPy and pydantic cost half a second, `--help` has 0.3 s.
    if name not in _HOMES:
        raise AttributeError(f"module 'infermill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"infermill.{_HOMES[name]}"), name)
