"""The algebra of channels: indices of axes that can only be deleted together, and what survives."""
