"""Run a trained network over everything in a bucket, a folder or a table, and account for every input."""

__version__ = "0.1.0"
