"""Bytes in and out: files, the standard streams, what a file may name."""
