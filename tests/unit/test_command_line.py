"""What the screen says to who types something wrong, and to who asks."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import moe_coordinator.cli
import moe_peer.cli
from moe_coordinator.fields import docstrings, manifest
from moe_net.config import RunConfig, from_dict, load_toml
from moe_net.model.config import PRESETS, ModelConfig, RouterConfig
from moe_net.optim import OptimizerConfig

MAINS = {"moe-peer": moe_peer.cli.main, "moe-coordinator": moe_coordinator.cli.main}


def leave(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        MAINS[arguments[0]](arguments[1:])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("program", list(MAINS))
def test_both_say_their_version(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave([program, "--version"]) == 0
    name, version = capsys.readouterr().out.split()
    assert (name, version.count(".")) == (program, 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["moe-peer", "serve", "--lissten", "h:1"], "--listen"),
        (["moe-peer", "serve", "--threads", "many"], "--threads"),
        (["moe-peer", "train", "--steps"], "--steps"),
        (["moe-coordinator", "local", "--sed", "3"], "--seed"),
        (["moe-coordinator", "local", "--wire", "fp8"], "--wire"),
        (["moe-coordinator", "serve"], "--config"),
        (["moe-coordinator", "fields", "--preset", "huge"], "--preset"),
    ],
)
def test_a_wrong_word_names_the_option_and_the_help_of_its_command(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(arguments) == 2
    said = capsys.readouterr().err
    assert named in said
    assert " ".join(arguments[:2]) + " --help" in said
    assert f"{arguments[0]} --help" not in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["moe-peer", "serve", "--max-queue-rows", "-2"], "moe-peer: max_queue_rows must be positive, not -2"),
        (["moe-peer", "train", "--steps", "0"], "moe-peer: steps must be at least 1, not 0"),
        (["moe-coordinator", "local", "--peers", "0"], "moe-coordinator: peers and trainers must be at least 1"),
        (
            ["moe-coordinator", "proxy", "--listen", "h:0", "--target", "h"],
            "moe-coordinator: target='h' is not host:port",
        ),
    ],
)
def test_a_value_that_cannot_be_is_said_without_the_names_of_our_classes(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(arguments) == 2
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"sed": 1}, "sed: unexpected keyword (is seed meant?)"),
        ({"model": {"n_expert": 8}}, "model.n_expert: unexpected keyword (is n_experts meant?)"),
        ({"model": {"router": {"top_k": 2}}}, "model.router.top_k: unexpected keyword"),
        ({"name": ""}, "name must not be empty, and record_ttl_s positive"),
        ({"model": {"n_layers": 0}}, "model: n_layers must be at least 1, not 0"),
        ({"optimizer": {"beta1": 2.0}}, "optimizer: beta1=2.0 and beta2=0.95 must be in 0..1, without 1"),
    ],
)
def test_a_wrong_field_of_a_file_is_said_in_our_own_words(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=r"unexpected|must") as refused:
        from_dict(RunConfig, values)
    assert str(refused.value) == complaint


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_manifest_that_is_printed_is_one(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(["moe-coordinator", "fields", "--preset", name]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(printed)
    assert load_toml(RunConfig, tmp_path / "run.toml") == RunConfig(model=PRESETS[name])
    assert printed.strip() == manifest(RunConfig(model=PRESETS[name]))
    # A field that is absent by default stands there as a comment.
    assert set(tomllib.loads(printed.replace("# tokenizer_sha256 =", "tokenizer_sha256 = ''"))) == set(
        RunConfig.__dataclass_fields__
    )


@pytest.mark.parametrize("kind", [RunConfig, OptimizerConfig, ModelConfig, RouterConfig])
def test_every_field_says_what_it_is(kind: type[RunConfig]) -> None:
    docs = docstrings(kind)
    assert list(docs) == list(kind.__dataclass_fields__)
    assert all(docs.values()), docs
