"""The proof: the pruned model computes what the masked original computes."""
