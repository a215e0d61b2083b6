"""Tensors and calls as bytes: limits first, one copy, plain protobuf for everybody else."""
