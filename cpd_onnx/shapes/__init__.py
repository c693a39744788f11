"""What is known of tensors: shapes, values, sizes."""
