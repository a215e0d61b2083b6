"""A resumed run continues the curve of the uninterrupted one, with no sample skipped or repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from disks import full_at
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
from moe_peer.resume import compare_experts, live_versions, resume_trunk
from moe_peer.trainer import Trainer

RUN = small_run(jitter=0.05, bias_update_rate=0.01)
EXPERTS = RUN.model.expert_ids


def save(trainer: Trainer, link, folder: Path, run: RunConfig = RUN) -> Path:
    experts = link.runner.run(link.swarm.fetch_experts(RUN.model.expert_ids, timeout_s=10))
    meta = CheckpointMeta(
        run=run, step=trainer.step, data_fingerprint="d", tokenizer_fingerprint="t", trainers=1, sequences=4
    )
    return save_checkpoint(folder, meta, trainer.model, trainer.optimizer, experts)


@pytest.mark.parametrize(
    "run", [RUN, replace(RUN, model=replace(RUN.model, expert_width=6))], ids=["", "narrow-experts"]
)
def test_a_resumed_run_goes_on_to_the_bit_with_other_peers(tmp_path: Path, run: RunConfig) -> None:
    with remote_link(run, n_peers=3) as (link, _):
        trainer = make_trainer(run, link)
        first = [trainer.train_step().loss for _ in range(6)]
        path = save(trainer, link, tmp_path, run)
        expected = [trainer.train_step().loss for _ in range(6)]
    # Everything is gone. New peers take the experts from the checkpoint, a new trainer the trunk.
    with remote_link(run, n_peers=3, load=path) as (link, _):
        resumed = make_trainer(run, link)
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
        with full_at(50_000), pytest.raises(CheckpointError, match="step-00000001 cannot be written"):
            save(trainer, link, tmp_path)
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
        assert compare_experts(path, saved, live(), EXPERTS, allow_fresh=False) is None
        trainer.train_step()
        newer = live()
    for other, words in ((older, "12 behind (up to 1 steps)"), (newer, "12 ahead (up to 1 steps)")):
        event = compare_experts(path, saved, other, EXPERTS, allow_fresh=False)
        assert event is not None
        assert event.what == "experts_differ"
        assert words in event.detail
    with pytest.raises(CheckpointError, match=rf"start the peers with --load {path}"):
        compare_experts(path, saved, fresh, EXPERTS, allow_fresh=False)
    event = compare_experts(path, saved, fresh, EXPERTS, allow_fresh=True)
    assert event is not None
    assert "12 begin afresh (0.0, 0.1, " in event.detail
    # One expert is lost as well as all; a checkpoint of the very start has nothing to lose.
    with pytest.raises(CheckpointError, match=r"1 experts that .* has trained are fresh at the peers \(0.0\): start"):
        compare_experts(path, saved, {**saved, ExpertId(0, 0): 0}, EXPERTS, allow_fresh=False)
    assert compare_experts(path, fresh, fresh, EXPERTS, allow_fresh=False) is None


def test_experts_that_a_checkpoint_lacks_are_named_and_want_the_flag() -> None:
    path, one = Path("step-00000007"), ExpertId(1, 3)
    saved = dict.fromkeys(EXPERTS, 7)
    lacking = {expert: version for expert, version in saved.items() if expert != one}
    for live in ({**saved, one: 0}, lacking):  # fresh at its peer; or nobody hosts it yet
        with pytest.raises(CheckpointError, match=r"1 of 12 experts are not in step-00000007 \(1.3\)"):
            compare_experts(path, lacking, live, EXPERTS, allow_fresh=False)
        event = compare_experts(path, lacking, live, EXPERTS, allow_fresh=True)
        assert event is not None
        assert "of 12 experts 1 begin afresh (1.3)" in event.detail
    # None was saved at all: a swarm whose network went before the trainer did.
    with pytest.raises(CheckpointError, match="12 of 12 experts are not in"):
        compare_experts(path, {}, dict.fromkeys(EXPERTS, 0), EXPERTS, allow_fresh=False)
    # The swarm lived on and has it; or none was trained by then.
    event = compare_experts(path, lacking, saved, EXPERTS, allow_fresh=False)
    assert event is not None
    assert "of 12 experts 1 not in it (up to 7 steps at the peers)" in event.detail
    untrained = dict.fromkeys(lacking, 0)
    assert compare_experts(path, untrained, dict.fromkeys(EXPERTS, 0), EXPERTS, allow_fresh=False) is None


def meta_of(run: RunConfig = RUN, **changes: object) -> CheckpointMeta:
    values = {"data_fingerprint": "d", "tokenizer_fingerprint": "t", "trainers": 1, "sequences": 4}
    return CheckpointMeta(run=run, step=0, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("run", "changes", "words"),
    [
        (
            replace(RUN, optimizer=replace(RUN.optimizer, total_steps=600)),
            {},
            "run.optimizer.total_steps: 60, not 600",
        ),
        (replace(RUN, optimizer=replace(RUN.optimizer, warmup_steps=7)), {}, "the new schedule"),
        (replace(RUN, optimizer=replace(RUN.optimizer, clip_norm=0.25)), {}, "run.optimizer.clip_norm: 0.5, not 0.25"),
        (replace(RUN, wire="int8"), {}, "run.wire: 'fp32', not 'int8'"),
        (replace(RUN, record_ttl_s=5.0), {}, "run.record_ttl_s: 30.0, not 5.0"),
        (replace(RUN, global_batch_tokens=4096), {}, "Experts step as often as the new batch says"),
        (RUN, {"sequences": 8}, "sequences: 4, not 8. The text goes on at another place"),
        (RUN, {"trainers": 2}, "trainers: 1, not 2. The text goes on at another place"),
    ],
)
def test_a_run_goes_on_with_other_settings_that_no_state_depends_on_and_names_them(
    tmp_path: Path, run: RunConfig, changes: dict[str, object], words: str
) -> None:
    with host_here(RUN) as link:
        trainer = make_trainer(RUN, link)
        trainer.train_step()
        path = save(trainer, link, tmp_path)
        resumed = make_trainer(run, link)
        event = resume_trunk(path, resumed, meta_of(run, **changes))
        assert event is not None
        assert words in event.detail
        assert resumed.step == 1
        for name, value in resumed.model.state_dict().items():
            assert value.equal(trainer.model.state_dict()[name])
        assert resume_trunk(path, make_trainer(RUN, link), meta_of()) is None


@pytest.mark.parametrize(
    ("run", "changes", "words"),
    [
        (replace(RUN, seed=1), {}, "run.seed: 3, not 1"),
        (replace(RUN, name="other"), {}, "not 'other'"),
        (replace(RUN, model=replace(RUN.model, init_std=0.5)), {}, "not 0.5"),
        (replace(RUN, optimizer=replace(RUN.optimizer, beta1=0.5)), {}, "run.optimizer.beta1: 0.9, not 0.5"),
        (RUN, {"data_fingerprint": "e"}, "data_fingerprint: d, not e (another text; --data,"),
        (RUN, {"tokenizer_fingerprint": "u"}, "tokenizer_fingerprint: t, not u (another tokenizer)"),
        (replace(RUN, seed=1), {"sequences": 8}, "cannot be continued here: run.seed: 3, not 1"),
    ],
)
def test_what_a_state_depends_on_is_refused_by_the_names_of_its_fields(
    tmp_path: Path, run: RunConfig, changes: dict[str, object], words: str
) -> None:
    with host_here(RUN) as link:
        trainer = make_trainer(RUN, link)
        path = save(trainer, link, tmp_path)
        with pytest.raises(CheckpointError) as refusal:
            resume_trunk(path, trainer, meta_of(run, **changes))
    assert words in str(refusal.value)
    assert "n_layers" not in str(refusal.value), "only what differs is named"


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
