"""Presentation of results: tables, figures, and the report of a run as one file."""
