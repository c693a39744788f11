"""The coupled channels of a model: combing, groups, weights, costs."""
