"""What a volunteer types: experts, options, TOML files, and where a checkpoint is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.discovery.listen import advertised_address
from moe_net.errors import CheckpointError
from moe_net.experts.host import ExpertHost
from moe_net.model.config import ModelConfig
from moe_net.types import ExpertId
from moe_peer.checkpoint import CheckpointMeta, find_checkpoint, save_checkpoint
from moe_peer.cli import main
from moe_peer.command_line import read_command_line
from moe_peer.config import ServeConfig, TrainConfig, parse_experts
from moe_peer.serve import describe, load_experts

MODEL = ModelConfig(d_model=8, d_ff_expert=4, n_layers=4, moe_every=2, n_experts=4, n_heads=1, n_kv_heads=1, head_dim=8)
RUN = RunConfig(name="cli", model=MODEL)


@pytest.mark.parametrize(
    ("spec", "experts"),
    [
        ("1.0", "1.0"),
        ("1.0-2,3.3", "1.0-2,3.3"),
        ("*.1", "1.1,3.1"),
        ("3.*", "3.0-3"),
        ("*.*", "1.0-3,3.0-3"),
        ("1-1.2, 3.0-0,1.2", "1.2,3.0"),
    ],
)
def test_a_specification_of_experts_reads_as_written(spec: str, experts: str) -> None:
    chosen = parse_experts(spec, MODEL)
    assert list(chosen) == sorted(set(chosen))
    assert describe(chosen) == experts
    assert parse_experts(experts, MODEL) == chosen


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "'' is not layer.index"),
        ("1", "no dot"),
        ("1.x", "'1.x' is not layer.index"),
        ("1.-1", "not layer.index"),
        ("1.3-1", "3-1 runs backwards"),
        ("0.1", "the run has no layer 0 .* it has 1, 3"),
        ("1.2,3.4", "the run has no index 4 .* it has 0-3"),
        ("*.0-99999999999", "the run has no index 4"),
        ("0-99999999999.1", "the run has no layer 0"),
    ],
)
def test_a_wrong_specification_is_named_with_what_there_is(spec: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_experts(spec, MODEL)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"listen": "8000"}, "not host:port"),
        ({"listen": "::1:0"}, r"an IPv6 address stands in brackets, as in \[::1\]:0"),
        ({"dht_advertise": "/ip4/0.0.0.0/tcp/1"}, r"dht_advertise=.* is not like"),
        ({"advertise": "home.example:"}, "neither a host nor host:port"),
        ({"advertise": "home.example:70000"}, "neither a host nor host:port"),
        ({"listen": "127.0.0.1:99999"}, "a port is 65535 at most"),
        ({"listen": "home.example:1"}, "names no IP address: say --dht-listen as well"),
        ({"experts": "0.1", "max_experts": 2}, "exclude each other"),
        ({"threads": 0}, r"threads=0 is not in 1\.\.1024"),
        ({"threads": 1_000_000}, r"threads=1000000 is not in 1\.\.1024"),
        ({"join_timeout_s": float("nan")}, "join_timeout_s must be positive, not nan"),
        ({"catch_up_timeout_s": float("inf")}, "catch_up_timeout_s must be positive, not inf"),
        ({"grace_s": float("nan")}, "must be numbers of seconds"),
        ({"stage_mib": -1}, "must not be negative"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ServeConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("advertise", "address"),
    [
        (None, "0.0.0.0:50"),
        ("home.example", "home.example:50"),
        ("home.example:7", "home.example:7"),
        ("10.0.0.1:7", "10.0.0.1:7"),
        ("[::1]", "[::1]:50"),
        ("[::1]:7", "[::1]:7"),
    ],
)
def test_others_are_told_the_host_that_is_advertised_and_the_port_too(advertise: str | None, address: str) -> None:
    assert advertised_address(advertise, "0.0.0.0:50") == address


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"sample_tokens": -1}, "sample_tokens must not be negative"),  # not found out at the end of a training
        ({"wait_s": float("nan")}, "wait_s must be positive, not nan"),
        ({"call_timeout_s": 0.0}, "call_timeout_s must be positive, not 0"),
        ({"fetch_timeout_s": float("inf")}, "fetch_timeout_s must be positive, not inf"),
        ({"hedge_fraction": 1.5}, r"hedge_fraction=1\.5 is not in 0\.\.1"),
        ({"max_dropped_fraction": float("nan")}, r"max_dropped_fraction must be in 0\.\.1"),
        ({"threads": -1}, r"threads=-1 is not in 1\.\.1024"),
        ({"go_on": True, "resume": Path("runs")}, "go_on and resume exclude each other"),
    ],
)
def test_a_training_that_cannot_work_is_refused_before_anything_starts(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TrainConfig(**wrong)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "peer.toml"
    file.write_text('experts = "1.*"\nstage_mib = 7\njoin = ["host:1"]\n')
    config = read_command_line(["serve", "--config", str(file), "--stage-mib", "9"])
    assert config == ServeConfig(config=file, experts="1.*", stage_mib=9, join=("host:1",))
    assert read_command_line(["serve", f"--config={file}"]) == ServeConfig(
        config=file, experts="1.*", stage_mib=7, join=("host:1",)
    )


def test_addresses_add_up_and_each_command_has_its_own_options() -> None:
    config = read_command_line(["serve", "--join", "a:1", "--join", "b:2"])
    assert config == ServeConfig(join=("a:1", "b:2"))
    assert read_command_line(["train", "--join", "a:1", "--steps", "3"]) == TrainConfig(join=("a:1",), steps=3)


def test_a_typo_in_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peer.toml"
    file.write_text("cach_mib = 7\n")
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--config", str(file)])
    assert stop.value.code == 2
    assert "cach_mib: unexpected keyword" in capsys.readouterr().err


def test_a_peer_without_an_address_is_told_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve"])
    assert stop.value.code == 2
    assert "give an address to join by" in capsys.readouterr().err


def checkpoint(folder: Path, step: int, host: ExpertHost, experts: list[ExpertId]) -> Path:
    model = torch.nn.Linear(2, 2)
    state: dict[str, torch.Tensor] = {}
    for layer in MODEL.moe_layers:
        indices = [e.index for e in experts if e.layer == layer]
        state |= host.fetch(layer, indices) if indices else {}
    meta = CheckpointMeta(run=RUN, step=step, data_fingerprint="d", tokenizer_fingerprint="t", trainers=1, sequences=1)
    return save_checkpoint(folder, meta, model, torch.optim.AdamW(model.parameters()), state)


def test_experts_are_loaded_from_the_newest_checkpoint_of_a_local_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = ExpertHost(make_banks(RUN, MODEL.expert_ids))
    for bank in old._banks.values():
        bank.step(bank.close([], RUN.global_batch_tokens))
    checkpoint(tmp_path / "trainer-0" / "checkpoints", 5, old, list(MODEL.expert_ids))
    some = [e for e in MODEL.expert_ids if e != ExpertId(3, 2)]
    newest = checkpoint(tmp_path / "trainer-1" / "checkpoints", 7, old, some)
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(tmp_path / "trainer-0").name == "step-00000005"
    fresh = ExpertHost(make_banks(RUN, [ExpertId(1, 0), ExpertId(3, 1), ExpertId(3, 2)]))
    assert load_experts(fresh, RUN, tmp_path) == 2
    assert fresh.versions == {1: {0: 1}, 3: {1: 1, 2: 0}}
    assert "1 experts are not in" in caplog.text
    other = RunConfig(name="another", model=MODEL)
    with pytest.raises(CheckpointError, match="another"):
        load_experts(fresh, other, tmp_path)


def test_a_run_without_a_checkpoint_yet_is_begun_and_a_folder_that_is_not_there_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = ExpertHost(make_banks(RUN, [ExpertId(1, 0), ExpertId(3, 1)]))
    # As it is when the first training was killed before its first checkpoint.
    (tmp_path / "checkpoints" / ".step-00000010.partial").mkdir(parents=True)
    assert load_experts(fresh, RUN, tmp_path) == 0
    assert caplog.messages == [f"no checkpoint in {tmp_path} yet: 2 experts start afresh"]
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        load_experts(fresh, RUN, tmp_path / "nowhere")


def test_a_training_that_is_over_has_nothing_to_go_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = ExpertHost(make_banks(RUN, MODEL.expert_ids))
    path = checkpoint(tmp_path / "checkpoints", 7, host, list(MODEL.expert_ids))
    for steps in (5, 7):
        with pytest.raises(SystemExit) as stop:  # and asks nobody
            main(["train", "--join", "127.0.0.1:1", "--out", str(tmp_path), "--steps", str(steps), "--go-on"])
        assert stop.value.code == 0
        assert capsys.readouterr().err == f"{path} has 7 of {steps} steps: nothing is left to train\n"
