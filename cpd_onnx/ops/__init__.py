"""What an operator is: its nature, its values, its output shapes, as a matrix product."""
