"""Passes for other tools' pipelines."""
