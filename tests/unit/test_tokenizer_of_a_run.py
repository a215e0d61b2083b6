"""A BPE belongs to the run: made once, known by its hash, the same for every trainer, and in the checkpoint."""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_coordinator.config import LocalOptions, to_toml
from moe_coordinator.local import trainer_spec, with_tokenizer
from moe_net.config import RunConfig, from_dict, from_json, to_json
from moe_net.errors import CheckpointError
from moe_net.model.config import ModelConfig
from moe_peer.checkpoint import CheckpointMeta, read_meta, save_checkpoint
from moe_peer.cli import main
from moe_peer.config import TrainConfig
from moe_peer.text import Text, load_text, read_corpus

WORDS = "the quick brown fox jumps over the lazy dog and runs away\n"
MODEL = ModelConfig(
    vocab_size=320, seq_len=16, d_model=8, d_ff_expert=4, n_layers=1, n_experts=2, n_heads=1, n_kv_heads=1, head_dim=8
)
RUN = RunConfig(name="vocabulary", model=MODEL, tokenizer="bpe")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text {number}\n" + WORDS * 300)
    return folder


def made(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], name: str = "tokenizer.json"
) -> tuple[Path, str]:
    """A tokenizer's file, and the hash that the command prints."""
    file = tmp_path / name
    with pytest.raises(SystemExit) as exit_:
        main(["tokenizer", "--data", str(data), "--vocab-size", "300", "--out", str(file)])
    assert exit_.value.code == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert printed["tokenizer"] == "bpe"
    return file, printed["tokenizer_sha256"]


def text(tmp_path: Path, data: Path, run: RunConfig, resumed: Path | None = None, **settings: object) -> Text:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    config = TrainConfig(out=out, data=data, **settings)  # type: ignore[arg-type]
    return load_text(config, read_corpus(config), run, resumed)


def test_the_command_makes_a_file_and_prints_its_hash_and_leaves_one_that_is_there(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sha256 = made(tmp_path, data, capsys)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    with pytest.raises(SystemExit) as exit_:
        main(["tokenizer", "--data", str(data), "--out", str(file)])
    assert exit_.value.code == 2
    assert f"{file} exists, and a run may depend on it" in capsys.readouterr().err


def test_trainers_with_the_runs_file_have_one_vocabulary_whatever_their_texts(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sha256 = made(tmp_path, data, capsys)
    run = replace(RUN, tokenizer_sha256=sha256)
    (tmp_path / "other.txt").write_text("completely different things to read here\n" * 400)
    first = text(tmp_path, data, run, tokenizer=file, trainers=2)
    second = text(tmp_path, tmp_path / "other.txt", run, tokenizer=file, trainers=2, trainer_index=1)
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    assert first.tokenizer_file == file.read_bytes()


def test_a_file_of_another_hash_is_refused_with_both(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, sha256 = made(tmp_path, data, capsys)
    (tmp_path / "other.txt").write_text("completely different things to read here\n" * 400)
    other, other_sha256 = made(tmp_path, tmp_path / "other.txt", capsys, "other.json")
    run = replace(RUN, tokenizer_sha256=sha256)
    with pytest.raises(ValueError, match=f"{other_sha256}.*{sha256}"):
        text(tmp_path, data, run, tokenizer=other)
    with pytest.raises(ValueError, match=f"{other_sha256}.*{sha256}"):
        with_tokenizer(LocalOptions(tokenizer=other), run)


def test_a_run_that_names_a_hash_wants_its_file(tmp_path: Path, data: Path) -> None:
    run = replace(RUN, tokenizer_sha256="a" * 64)
    for refused in (lambda: text(tmp_path, data, run), lambda: with_tokenizer(LocalOptions(), run)):
        with pytest.raises(ValueError, match=f"SHA-256 {'a' * 64}: give its file by --tokenizer"):
            refused()


def test_several_trainers_without_a_tokenizer_of_the_run_are_refused_with_the_remedy(
    tmp_path: Path, data: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape("each of its 2 trainers would make its own")) as refusal:
        text(tmp_path, data, RUN, trainers=2)
    assert "moe-peer tokenizer --data" in str(refusal.value)


def test_one_trainer_alone_makes_its_own_and_says_so(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = text(tmp_path, data, RUN)
    said = capsys.readouterr().err
    assert "made of this trainer's text" in said
    assert loaded.tokenizer_file is not None
    assert hashlib.sha256(loaded.tokenizer_file).hexdigest() in said


def test_the_file_lies_in_the_checkpoint_and_a_resume_takes_it_from_there(tmp_path: Path, data: Path) -> None:
    first = text(tmp_path, data, RUN)
    model = torch.nn.Linear(2, 2)
    meta = CheckpointMeta(run=RUN, step=1, data_fingerprint="d", tokenizer_fingerprint="t", trainers=1, sequences=1)
    path = save_checkpoint(
        tmp_path / "saved", meta, model, torch.optim.AdamW(model.parameters()), {}, first.tokenizer_file
    )
    (data / "more.txt").write_text("it would have another vocabulary now, with many more words\n" * 500)
    resumed = text(tmp_path, data, RUN, path)
    assert resumed.tokenizer.fingerprint == first.tokenizer.fingerprint
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged"):
        read_meta(path)


def test_a_swarm_of_local_processes_makes_one_for_all_its_trainers(tmp_path: Path, data: Path) -> None:
    (tmp_path / "out").mkdir()
    options = LocalOptions(trainers=2, data=data, out=tmp_path / "out")
    run, options = with_tokenizer(options, RUN)
    assert options.tokenizer is not None
    assert run.tokenizer_sha256 == hashlib.sha256(options.tokenizer.read_bytes()).hexdigest()
    for index in range(2):
        argv = trainer_spec(options, run, index, join="here:1", cores=2).argv
        assert argv[argv.index("--tokenizer") + 1] == str(options.tokenizer)
    assert from_dict(RunConfig, tomllib.loads(to_toml(run))) == from_json(RunConfig, to_json(run)) == run
    assert with_tokenizer(LocalOptions(), RunConfig()) == (RunConfig(), LocalOptions())


def test_a_run_of_bytes_takes_no_file(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="tokens are bytes"):
        text(tmp_path, data, replace(RUN, tokenizer="bytes"), tokenizer=tmp_path / "x.json")
    with pytest.raises(ValueError, match="tokens are bytes"):
        with_tokenizer(LocalOptions(tokenizer=tmp_path / "x.json"), RunConfig())


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"tokenizer": "bpe", "tokenizer_sha256": "abc"}, "not 64 hexadecimal digits"),
        ({"tokenizer": "bpe", "tokenizer_sha256": "A" * 64}, "not 64 hexadecimal digits"),
        ({"tokenizer_sha256": "a" * 64}, 'tokenizer is "bytes"'),
    ],
)
def test_a_hash_that_is_none_is_named(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        from_dict(RunConfig, values)
