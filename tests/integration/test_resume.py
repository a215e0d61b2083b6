"""A resumed run continues the curve of the uninterrupted one, with no sample skipped or repeated."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
from swarms import make_trainer, remote_link, small_run, text_batches

from moe_net.client import host_here, make_banks
from moe_net.config import RunConfig
from moe_net.errors import CheckpointError
from moe_net.types import ExpertId
from moe_net.wire.snapshot import unpack
from moe_peer.checkpoint import (
    CheckpointMeta,
    completed,
    load_checkpoint,
    newest_checkpoint,
    read_meta,
    save_checkpoint,
    saved_versions,
    set_aside_later,
    versions_of,
)
from moe_peer.resume import compare_experts, live_versions
from moe_peer.trainer import Trainer

RUN = small_run(jitter=0.05, bias_update_rate=0.01)


def save(trainer: Trainer, link, folder: Path, run: RunConfig = RUN) -> Path:
    experts = link.runner.run(link.swarm.fetch_experts(RUN.model.expert_ids, timeout_s=10))
    meta = CheckpointMeta(
        run=run, step=trainer.step, data_fingerprint="d", tokenizer_fingerprint="t", trainers=1, sequences=4
    )
    return save_checkpoint(folder, meta, trainer.model, trainer.optimizer, experts)


def test_a_resumed_run_goes_on_to_the_bit_with_other_peers(tmp_path: Path) -> None:
    with remote_link(RUN, n_peers=3) as (link, _):
        trainer = make_trainer(RUN, link)
        first = [trainer.train_step().loss for _ in range(6)]
        path = save(trainer, link, tmp_path)
        expected = [trainer.train_step().loss for _ in range(6)]
    # Everything is gone. New peers take the experts from the checkpoint, a new trainer the trunk.
    with remote_link(RUN, n_peers=3, load=path) as (link, _):
        resumed = make_trainer(RUN, link)
        load_checkpoint(path, resumed.model, resumed.optimizer)
        resumed.step = read_meta(path).step
        losses = [resumed.train_step().loss for _ in range(6)]
    assert losses == expected
    assert losses != first


def test_a_run_resumed_in_the_middle_of_a_global_batch_goes_on_to_the_bit(tmp_path: Path) -> None:
    run = replace(RUN, global_batch_tokens=2 * RUN.global_batch_tokens)
    with remote_link(run, n_peers=3) as (link, _):
        trainer = make_trainer(run, link)
        for _ in range(5):
            trainer.train_step()
        path = save(trainer, link, tmp_path, run)
        expected = [trainer.train_step().loss for _ in range(4)]
    with remote_link(run, n_peers=3, load=path) as (link, _):
        resumed = make_trainer(run, link)
        load_checkpoint(path, resumed.model, resumed.optimizer)
        resumed.step = 5
        assert [resumed.train_step().loss for _ in range(4)] == expected


def test_a_checkpoint_without_the_experts_would_not_do(tmp_path: Path) -> None:
    """The test above compares something: fresh experts under a trained trunk give other losses."""
    with host_here(RUN) as link:
        trainer = make_trainer(RUN, link)
        for _ in range(6):
            trainer.train_step()
        path = save(trainer, link, tmp_path)
        expected = trainer.train_step().loss
    with host_here(RUN) as link:
        resumed = make_trainer(RUN, link)
        load_checkpoint(path, resumed.model, resumed.optimizer)
        resumed.step = 6
        assert resumed.train_step().loss != expected


def test_no_sample_is_skipped_or_repeated_across_a_resume() -> None:
    from moe_net.data.batches import BatchId

    uninterrupted, resumed = text_batches(RUN), text_batches(RUN)
    steps = uninterrupted.n_windows // 4
    seen = [w for step in range(steps // 2) for w in uninterrupted.windows(BatchId(step)).tolist()]
    seen += [w for step in range(steps // 2, steps) for w in resumed.windows(BatchId(step)).tolist()]
    assert len(seen) == len(set(seen)) == steps * 4


def test_damage_and_half_written_checkpoints_are_noticed(tmp_path: Path) -> None:
    with host_here(RUN) as link:
        trainer = make_trainer(RUN, link)
        trainer.train_step()
        path = save(trainer, link, tmp_path)
        trainer.train_step()
        newer = save(trainer, link, tmp_path)
    assert newest_checkpoint(tmp_path) == newer
    # A crash in the middle of the third: only a hidden folder without state.json.
    (tmp_path / ".step-00000003.partial").mkdir()
    assert newest_checkpoint(tmp_path) == newer
    expert_file = next((newer / "experts").iterdir())
    data = bytearray(expert_file.read_bytes())
    data[-1] ^= 1
    expert_file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read_meta(newer)
    assert read_meta(path).step == 1
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        newest_checkpoint(tmp_path / "nothing")


def test_a_full_disk_leaves_the_checkpoint_of_before_and_no_half_of_a_new_one(tmp_path: Path) -> None:
    with remote_link(RUN, n_peers=1) as (link, _):
        trainer = make_trainer(RUN, link)
        first = save(trainer, link, tmp_path)
        trainer.train_step()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # no file of this process can be longer
        try:
            with pytest.raises(CheckpointError, match="step-00000001 cannot be written"):
                save(trainer, link, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest_checkpoint(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_a_training_anew_is_never_resumed_from_its_predecessor(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    set_aside_later(tmp_path, 100)
    assert newest_checkpoint(tmp_path).name == "step-00000100"
    set_aside_later(tmp_path, 0)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)
    # Aside, not away.
    assert (tmp_path / "replaced-step-00000300" / "state.json").exists()
    set_aside_later(tmp_path / "not there yet", 0)


def test_the_experts_of_a_checkpoint_are_those_of_the_peers(tmp_path: Path) -> None:
    with remote_link(RUN, n_peers=2) as (link, _):
        trainer = make_trainer(RUN, link)
        trainer.train_step()
        path = save(trainer, link, tmp_path)
    state = {}
    for file in sorted((path / "experts").iterdir()):
        state |= unpack(file.read_bytes(), run=RUN.name, shape=RUN.model.expert_shape)
    assert {name.rsplit(".", 1)[0] for name in state} == {str(e) for e in RUN.model.expert_ids}
    assert all(int(value) == 1 for name, value in state.items() if name.endswith("version"))
    fresh = make_banks(RUN, RUN.model.expert_ids)[0].state()
    assert any(not state[name].equal(fresh[name]) for name in fresh if name.endswith("w_in"))


def test_a_swarm_that_lived_on_or_fell_back_is_noted_and_one_of_fresh_experts_refused(tmp_path: Path) -> None:
    with remote_link(RUN, n_peers=2) as (link, transport):

        def live() -> dict[ExpertId, int]:
            return link.runner.run(live_versions(link.swarm.view(), transport))

        trainer = make_trainer(RUN, link)
        fresh = live()
        assert fresh == dict.fromkeys(RUN.model.expert_ids, 0)
        trainer.train_step()
        older = live()
        trainer.train_step()
        path = save(trainer, link, tmp_path)
        saved = saved_versions(path)
        assert saved == live() == dict.fromkeys(RUN.model.expert_ids, 2)
        assert compare_experts(path, saved, live(), allow_fresh=False) is None
        trainer.train_step()
        newer = live()
    for other, words in ((older, "12 behind (up to 1 steps)"), (newer, "12 ahead (up to 1 steps)")):
        event = compare_experts(path, saved, other, allow_fresh=False)
        assert event is not None
        assert event.what == "experts_differ"
        assert words in event.detail
    with pytest.raises(CheckpointError, match=rf"start the peers with --load {path}"):
        compare_experts(path, saved, fresh, allow_fresh=False)
    assert compare_experts(path, saved, fresh, allow_fresh=True) is not None
    # One peer that came back empty is no reason to refuse; a checkpoint of the very start has nothing to lose.
    assert compare_experts(path, saved, {**saved, ExpertId(0, 0): 0}, allow_fresh=False) is not None
    assert compare_experts(path, fresh, fresh, allow_fresh=False) is None


def test_experts_that_nobody_answers_for_are_carried_over_from_the_checkpoint_before(tmp_path: Path) -> None:
    with host_here(RUN) as link:
        trainer = make_trainer(RUN, link)
        trainer.train_step()
        first = save(trainer, link, tmp_path)
        trainer.train_step()
        now = link.runner.run(link.swarm.fetch_experts(RUN.model.expert_ids, timeout_s=10))
    answered = {name: value for name, value in now.items() if not name.startswith(("0.2.", "1.5."))}
    state, (event,) = completed(answered, RUN, first)
    assert state.keys() == now.keys()
    versions = {str(expert): version for expert, version in versions_of(state).items()}
    assert {expert for expert, version in versions.items() if version == 1} == {"0.2", "1.5"}
    assert event.what == "experts_carried_over"
    assert "0.2 of version 1, 1.5 of version 1" in event.detail
    # Nothing is missing, nothing is said; found nowhere, they are named; and a damaged file is no reason to stop.
    assert completed(now, RUN, first) == (now, [])
    state, (event,) = completed(answered, RUN, None)
    assert state == answered
    assert (event.what, event.detail.endswith("0.2, 1.5")) == ("checkpoint_incomplete", True)
    (first / "experts" / "layer-000.safetensors").write_bytes(b"junk")
    assert [event.what for event in completed(answered, RUN, first)[1]] == [
        "checkpoint_damaged",
        "checkpoint_incomplete",
    ]
