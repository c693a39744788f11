"""What a user asks for from end to end: compress, and what records and repeats a run."""
