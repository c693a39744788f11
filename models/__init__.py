"""The example models, the data that they were trained on, and the scripts that made them."""
