"""The channel algebra: which indices of axes must be removed together, and which survive."""
