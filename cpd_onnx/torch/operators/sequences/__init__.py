"""Operators on sequences: attention, recurrences, lists of tensors."""
