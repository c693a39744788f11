"""Bytes in and out: files, the standard streams, and which paths and code a recipe or manifest may name."""
