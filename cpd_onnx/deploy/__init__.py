"""From the pruned model to the target: fixed sizes, opsets, 16 and 8 bits, .ort files."""
