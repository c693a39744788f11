"""The model as it lies in the file."""
