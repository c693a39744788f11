"""Operators on images: pooling, resizing, regions."""
