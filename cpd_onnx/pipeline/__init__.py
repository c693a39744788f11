"""Pipelines of passes, and the state that passes exchange."""
