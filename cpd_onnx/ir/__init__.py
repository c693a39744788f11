"""The model as stored in its file: the proto, its tensors, and the differences between two models."""
