"""Training an imported model: batches, losses, normalisation, the loop, and several processes."""
