"""Expert weights depend on (run, seed, layer, index) and on nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch

from moe_net.experts.init import init_expert
from moe_net.types import Activation, ExpertId, ExpertShape

SHAPE = ExpertShape(d_model=64, d_ff=96)


def test_two_peers_that_never_spoke_create_the_same_weights() -> None:
    torch.manual_seed(1)
    ours = init_expert(ExpertId(3, 17), SHAPE, run="demo", seed=5, init_std=0.02)
    torch.manual_seed(2)
    init_expert(ExpertId(3, 16), SHAPE, run="demo", seed=5, init_std=0.02)
    theirs = init_expert(ExpertId(3, 17), SHAPE, run="demo", seed=5, init_std=0.02)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_bytes_are_those_that_every_release_makes() -> None:
    w_in, w_out = init_expert(ExpertId(3, 17), SHAPE, run="demo", seed=5, init_std=0.02)
    digest = hashlib.sha256(w_in.numpy().tobytes() + w_out.numpy().tobytes()).hexdigest()
    assert digest == "a832ccea331bd53a25dd0737c319a28b0fe2d60d9a48827cd3b5b2f455e3f813"


@pytest.mark.parametrize(
    ("expert", "run", "seed"),
    [
        (ExpertId(3, 16), "demo", 5),
        (ExpertId(2, 17), "demo", 5),
        (ExpertId(3, 17), "demo2", 5),
        (ExpertId(3, 17), "demo", 6),
    ],
)
def test_any_other_expert_run_or_seed_gives_other_weights(expert: ExpertId, run: str, seed: int) -> None:
    w_in, w_out = init_expert(ExpertId(3, 17), SHAPE, run="demo", seed=5, init_std=0.02)
    other_in, other_out = init_expert(expert, SHAPE, run=run, seed=seed, init_std=0.02)
    # Not even a part in common: independent normals agree in no more than a handful of places.
    assert (w_in == other_in).sum() < 3
    assert (w_out == other_out).sum() < 3


@pytest.mark.parametrize("activation", Activation)
def test_values_are_normal_with_the_given_deviation(activation: Activation) -> None:
    shape = ExpertShape(d_model=256, d_ff=256, activation=activation)
    w_in, w_out = init_expert(ExpertId(0, 0), shape, run="demo", seed=0, init_std=0.02)
    assert w_in.shape == (256, shape.d_hidden)
    assert w_out.shape == (256, 256)
    for weight in (w_in, w_out):
        assert weight.dtype is torch.float32
        # Of 65536 values the mean deviates by 1/256 of the deviation, the deviation itself by 1/362: 4 sigma.
        assert abs(weight.mean().item()) < 4 * 0.02 / 256
        assert abs(weight.std().item() / 0.02 - 1) < 4 / 362
        assert abs((weight.abs() < 0.02).float().mean().item() - 0.6827) < 0.008
        assert 3.5 < weight.abs().max().item() / 0.02 < 6.5


def test_the_two_matrices_of_an_expert_are_independent() -> None:
    shape = ExpertShape(d_model=64, d_ff=64, activation=Activation.GELU)
    w_in, w_out = init_expert(ExpertId(0, 0), shape, run="demo", seed=0, init_std=0.02)
    assert (w_in == w_out).sum() < 3
