"""What inspect shows of a model: findings as text, the drawing of its graph, and the page."""
