"""Text as batches of tokens, addressed by number: deterministic, resumable, disjoint."""
