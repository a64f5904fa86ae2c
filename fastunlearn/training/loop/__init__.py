"""The training loop: batches, loss terms, optimizer, checkpoints, processes."""
