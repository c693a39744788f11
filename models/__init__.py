"""Example models, their training data, and the scripts that create them."""
