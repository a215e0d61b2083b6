"""The experts of one peer: weights, gradients, optimizer, snapshots."""
