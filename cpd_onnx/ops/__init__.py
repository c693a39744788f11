"""Facts about operators: traits, evaluation, output shapes, symbolic sizes, and linear operators as matrix products."""
