"""A local swarm that is resumed can be prolonged, and have another wire; nothing else of its manifest changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_coordinator.config import RUN_FILE, LocalOptions, run_config, to_toml
from moe_coordinator.local import trainer_spec
from moe_net.config import RunConfig
from moe_net.optim import OptimizerConfig
from moe_peer.command_line import read_command_line
from moe_peer.config import TrainConfig

RUN = RunConfig(name="before", seed=5, optimizer=OptimizerConfig(total_steps=300), wire="fp32")


@pytest.mark.parametrize(
    ("steps", "total_steps"), [(600, 600), (None, 300), (200, 300)], ids=["prolonged", "as it was", "stopped earlier"]
)
def test_more_steps_prolong_the_schedule_of_a_run_that_is_resumed(
    tmp_path: Path, steps: int | None, total_steps: int
) -> None:
    (tmp_path / RUN_FILE).write_text(to_toml(RUN))
    run = run_config(LocalOptions(resume=tmp_path, steps=steps))
    assert run == replace(RUN, optimizer=replace(RUN.optimizer, total_steps=total_steps))


def test_a_run_that_is_resumed_may_have_another_wire_but_no_other_seed(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(to_toml(RUN))
    assert run_config(LocalOptions(resume=tmp_path, wire="int8")) == replace(RUN, wire="int8")
    with pytest.raises(ValueError, match="--seed: the manifest"):
        LocalOptions(resume=tmp_path, seed=1)
    with pytest.raises(ValueError, match="--wire: the manifest"):
        LocalOptions(config=tmp_path / RUN_FILE, wire="int8")


def test_what_a_trainer_asks_for_can_be_said_to_a_local_swarm(tmp_path: Path) -> None:
    """The remedies that a trainer's messages name are options here, too."""
    options = LocalOptions(text_field="body", max_data_mib=7, allow_fresh_experts=True, out=tmp_path)
    argv = trainer_spec(options, RUN, 0, join="here:1", cores=1).argv
    config = read_command_line([str(argument) for argument in argv[argv.index("train") :]])
    assert isinstance(config, TrainConfig)
    assert (config.text_field, config.max_data_mib, config.allow_fresh_experts) == ("body", 7, True)
    with pytest.raises(ValueError, match="max_data_mib"):
        LocalOptions(max_data_mib=0)
