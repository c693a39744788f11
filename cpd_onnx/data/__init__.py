"""Samples, and the metrics that score what a model makes of them."""
