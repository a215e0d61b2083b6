"""AdamW settings and the learning-rate schedule, the same for the trunk and for every expert."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) with linear warm-up and cosine decay."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    total_steps: int = 1000
    """Step at which the cosine reaches its floor; later steps stay there."""
    min_lr_ratio: float = 0.1
    """Floor of the cosine, as a fraction of the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (not on norms, biases and embeddings)."""
    clip_norm: float = 1.0
    """Largest gradient norm: of the whole trunk, and of each single expert. 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.warmup_steps < 0:
            raise ValueError("warmup_steps must not be negative, total_steps at least 1")
        for name in ("learning_rate", "min_lr_ratio", "eps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:  # false of a NaN
                raise ValueError(f"{name}={getattr(self, name)} must be a number, and not negative")
        if not self.learning_rate:
            raise ValueError("learning_rate=0 learns nothing")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be in 0..1, without 1")

    def lr_at(self, step: int) -> float:
        """Learning rate of the update number `step` (0 is the first)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        floor = self.min_lr_ratio
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
