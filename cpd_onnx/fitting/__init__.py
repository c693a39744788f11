"""Linear units of a graph, and least squares on what runs through them."""
