"""Where checkpoints lie, and which of them count."""

from __future__ import annotations

from pathlib import Path

from moe_net.checkpoint_folder import (
    STATE,
    after,
    all_checkpoints_of,
    checkpoint_at,
    checkpoints_of,
    expert_file,
    expert_files,
    newest_in,
    trainer_folder,
)


def make(checkpoints: Path, step: int, *, whole: bool = True) -> Path:
    path = checkpoint_at(checkpoints, step)
    path.mkdir(parents=True)
    if whole:
        (path / STATE).touch()
    return path


def test_the_newest_is_the_last_whole_one(tmp_path: Path) -> None:
    assert newest_in(tmp_path / "nowhere") is None
    older, newer, cut = make(tmp_path, 20), make(tmp_path, 100), make(tmp_path, 300, whole=False)
    (tmp_path / f"replaced-{cut.name}").mkdir()
    (tmp_path / "step-by-step").mkdir()
    assert newest_in(tmp_path) == newer
    assert after(tmp_path, 20) == [newer, cut]
    assert after(tmp_path, 0) == [older, newer, cut]


def test_the_trainers_of_a_local_run_have_a_folder_each(tmp_path: Path) -> None:
    folders = [checkpoints_of(trainer_folder(tmp_path, index)) for index in range(2)]
    make(folders[1], 5)
    make(folders[0], 7)
    trainer_folder(tmp_path, 2).mkdir()  # has none yet
    assert all_checkpoints_of(tmp_path) == folders


def test_files_of_layers_are_found_in_the_order_of_the_layers(tmp_path: Path) -> None:
    assert expert_files(tmp_path) == []
    files = [expert_file(tmp_path, layer) for layer in (2, 10, 100)]
    files[0].parent.mkdir()
    for file in reversed(files):
        file.touch()
    assert expert_files(tmp_path) == files
