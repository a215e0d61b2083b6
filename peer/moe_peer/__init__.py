"""The peer daemon (moe-peer serve) and the trainer (moe-peer train)."""
