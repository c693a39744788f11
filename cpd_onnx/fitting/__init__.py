"""Linear units of a graph, and least squares on their activations."""
