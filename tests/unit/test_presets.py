"""The presets build, have the sizes their comments state, and follow their papers' recipes."""

# pyright: basic
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from moe_net.config import RunConfig, from_json, to_json
from moe_net.model.config import PRESETS, ModelConfig, RouterConfig, preset
from moe_net.model.local_moe import LocalMoE
from moe_net.model.transformer import Transformer
from moe_net.optim import OptimizerConfig

# Total and active parameters, in millions: the figures of the comments in `model/config.py`.
STATED = {
    "tiny": (1.808, 0.628),
    "small": (207.9, 31.7),
    "switch-base-like": (3710, 110.1),
    "glam-like": (1890, 138.1),
    "st-moe-like": (1990, 431.7),
}


def test_every_preset_has_a_stated_size() -> None:
    assert set(STATED) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_on_the_meta_device_with_the_stated_parameter_counts(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = Transformer(config, lambda layer: LocalMoE(config, layer))
    total = sum(parameter.numel() for parameter in model.parameters())
    trunk = sum(parameter.numel() for parameter in model.trunk_parameters().values())
    assert all(parameter.is_meta for parameter in model.parameters())
    active = trunk + (total - trunk) * config.router.experts_per_token / config.n_experts
    total_millions, active_millions = STATED[name]
    assert total / 1e6 == pytest.approx(total_millions, rel=3e-3)
    assert active / 1e6 == pytest.approx(active_millions, rel=3e-3)


def test_sparse_layers_are_those_of_the_papers() -> None:
    assert preset("switch-base-like").moe_layers == (1, 3, 5, 7, 9, 11)
    assert preset("glam-like").moe_layers == (1, 3, 5, 7, 9, 11)
    assert preset("st-moe-like").moe_layers == (3, 7, 11, 15, 19, 23)


@pytest.mark.parametrize(
    ("name", "train", "evaluation"),
    [("switch-base-like", 1.25, 2.0), ("glam-like", 2.0, 2.0), ("st-moe-like", 1.25, 2.0)],
)
def test_capacities_counted_in_tokens_are_those_of_the_papers(name: str, train: float, evaluation: float) -> None:
    router = preset(name).router
    assert router.capacity_factor * router.experts_per_token == train
    assert router.eval_capacity_factor * router.experts_per_token == evaluation


def test_switch_is_raw_top_1_with_jitter_and_st_moe_has_the_z_loss() -> None:
    switch, st_moe = preset("switch-base-like").router, preset("st-moe-like").router
    assert (switch.experts_per_token, switch.combine, switch.jitter, switch.z_loss) == (1, "raw", 0.01, 0.0)
    assert (st_moe.experts_per_token, st_moe.balance_loss, st_moe.z_loss) == (2, 0.01, 0.001)


def test_an_unknown_preset_names_the_choices() -> None:
    with pytest.raises(ValueError, match="tiny, small"):
        preset("huge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": RouterConfig(overflow="lowest_gate")}, "leaks the future"),
        ({"head_dim": 33}, "head_dim=33"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"router": RouterConfig(experts_per_token=9)}, "experts_per_token=9"),
        ({"moe_every": 0}, "moe_every"),
        ({"router": RouterConfig(experts_per_token=1)}, 'Use combine = "raw"'),
        ({"init_std": 0.0}, "init_std=0.0 must be positive"),
    ],
)
def test_a_model_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ModelConfig(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"seq_len": -1}, "seq_len must be at least 1"),
        ({"expert_width": 0}, "expert_width must be at least 1, not 0"),
        ({"expert_width": -4}, "expert_width must be at least 1, not -4"),
        ({"expert_width": 2**31}, "expert_width=2147483648 is more than"),
        ({"n_layers": 2, "moe_every": 3}, "none of the n_layers=2 blocks has experts"),
        ({"init_std": math.nan}, "init_std=nan"),
        ({"rms_eps": -1e-6}, "rms_eps=-1e-06"),
    ],
)
def test_a_model_that_cannot_exist_is_refused(wrong: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelConfig(**wrong)


@pytest.mark.parametrize(
    ("kind", "wrong", "complaint"),
    [
        (OptimizerConfig, {"learning_rate": math.nan}, "learning_rate=nan"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate=0 learns nothing"),
        (OptimizerConfig, {"weight_decay": math.inf}, "weight_decay=inf"),
        (OptimizerConfig, {"beta1": 1.0}, "beta1=1.0"),
        (RouterConfig, {"balance_loss": math.nan}, "balance_loss=nan"),
        (RouterConfig, {"capacity_factor": -1.0}, "capacity_factor=-1.0"),
        (RunConfig, {"seed": -1}, "seed=-1"),
        (RunConfig, {"record_ttl_s": math.nan}, "record_ttl_s"),
    ],
)
def test_what_is_no_number_or_out_of_range_is_refused_by_name(
    kind: type[Any], wrong: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        kind(**wrong)


def test_experts_have_the_models_width_or_the_one_that_a_manifest_says() -> None:
    run = RunConfig()
    old = to_json(run).replace('"expert_width":null,', "")
    assert "expert_width" not in old
    assert from_json(RunConfig, old) == run
    assert run.model.expert_shape.d_model == run.model.d_model
    said = dataclasses.replace(run, model=dataclasses.replace(run.model, expert_width=32))
    assert from_json(RunConfig, to_json(said)) == said
    assert (said.model.expert_shape.d_model, said.model.d_model) == (32, 128)


def test_a_layer_of_one_expert_has_nothing_to_route() -> None:
    assert ModelConfig(n_experts=1, router=RouterConfig(experts_per_token=1)).n_experts == 1


@pytest.mark.parametrize(
    ("trainers", "sequences", "note"),
    [
        (1, 16, None),
        (2, 8, None),
        (1, 8, "make 1024 tokens a step, and experts step once global_batch_tokens=2048 are committed: every 2 steps"),
        (1, 3, "every 5.33 steps"),
        (4, 16, "4 times a step"),
    ],
)
def test_how_often_experts_step_is_said_when_it_is_not_once_a_step(
    trainers: int, sequences: int, note: str | None
) -> None:
    said = RunConfig().batch_note(trainers=trainers, sequences=sequences)
    assert said is None if note is None else said is not None and note in said
