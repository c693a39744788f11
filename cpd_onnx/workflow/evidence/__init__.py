"""Evidence: files are traced back to their original, and runs are repeated and compared."""
