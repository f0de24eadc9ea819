"""Run a trained network over everything in a bucket, a folder or a table, and account for every input."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from infermill.audit import JobStatus, Verification, status, verify
    from infermill.errors import (
        BudgetError,
        InfermillError,
        JobMismatchError,
        ModelError,
        SourceError,
        StoreError,
        UsageError,
    )
    from infermill.estimation import Estimate, estimate
    from infermill.job import retry, run
    from infermill.models.card import ModelCard
    from infermill.models.card_file import parse_card
    from infermill.predict import Box, Detected, Label, Prediction, load_model
    from infermill.rows import read, read_batches
    from infermill.types import CardOptions, Failure, Options, Summary

_HOMES = {
    "Box": "predict",
    "BudgetError": "errors",
    "CardOptions": "types",
    "Detected": "predict",
    "Estimate": "estimation",
    "Failure": "types",
    "InfermillError": "errors",
    "JobMismatchError": "errors",
    "JobStatus": "audit",
    "Label": "predict",
    "ModelCard": "models.card",
    "ModelError": "errors",
    "Options": "types",
    "Prediction": "predict",
    "SourceError": "errors",
    "StoreError": "errors",
    "Summary": "types",
    "UsageError": "errors",
    "Verification": "audit",
    "estimate": "estimation",
    "load_model": "predict",
    "parse_card": "models.card_file",
    "read": "rows",
    "read_batches": "rows",
    "retry": "job",
    "run": "job",
    "status": "audit",
    "verify": "audit",
}

__all__ = [
    "Box",
    "BudgetError",
    "CardOptions",
    "Detected",
    "Estimate",
    "Failure",
    "InfermillError",
    "JobMismatchError",
    "JobStatus",
    "Label",
    "ModelCard",
    "ModelError",
    "Options",
    "Prediction",
    "SourceError",
    "StoreError",
    "Summary",
    "UsageError",
    "Verification",
    "estimate",
    "load_model",
    "parse_card",
    "read",
    "read_batches",
    "retry",
    "run",
    "status",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Names are imported when they are used: Arrow, NumPy and pydantic cost half a second, `--help` has 0.3 s.
    if name not in _HOMES:
        raise AttributeError(f"module 'infermill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"infermill.{_HOMES[name]}"), name)
