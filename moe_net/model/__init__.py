"""The model a trainer runs: Qwen3-MoE trunk, router, remote experts."""
