"""Shape inference: shapes, values and symbolic sizes of the tensors of a model."""
