"""Pipelines: passes one after another, and the state that they hand on."""
