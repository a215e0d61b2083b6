"""Where the files of a checkpoint lie: both apps look for checkpoints. What is in them, `moe_peer.checkpoint` knows.

trainer-0/    of a local run; a trainer that was started alone has any name
    checkpoints/
        step-00000120/
            state.json             what this is, and the SHA-256 of every other file
            trunk.safetensors      parameters and buffers
            optimizer.safetensors  AdamW's moments and step counters
            tokenizer.json         of a run whose tokenizer is a BPE
            experts/layer-003.safetensors   as in moe_net.wire.snapshot; `moe-peer serve --load` reads them
"""

from __future__ import annotations

from pathlib import Path

STATE = "state.json"
TRUNK = "trunk.safetensors"
OPTIMIZER = "optimizer.safetensors"
TOKENIZER = "tokenizer.json"
ANY_STATE = f"step-N/{STATE}"
"""For messages: what is missing in a folder of checkpoints without one."""


def trainer_folder(run: Path, index: int) -> Path:
    """Of a trainer of the local run in `run`."""
    return run / f"trainer-{index}"


def checkpoints_of(trainer: Path) -> Path:
    """The folder of checkpoints of the trainer that writes to `trainer`."""
    return trainer / "checkpoints"


def all_checkpoints_of(run: Path) -> list[Path]:
    """The same of each trainer of the local run in `run`."""
    return sorted(checkpoints_of(trainer) for trainer in run.glob("trainer-*") if checkpoints_of(trainer).exists())


def checkpoint_at(checkpoints: Path, step: int) -> Path:
    """Where the one of `step` is, or will be."""
    return checkpoints / f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Whether it is a whole one: `state.json` is written last."""
    return (path / STATE).exists()


def newest_in(checkpoints: Path) -> Path | None:
    """None when there is none."""
    return max(whole_ones(checkpoints), default=None)


def whole_ones(checkpoints: Path) -> list[Path]:
    """Ascending by step."""
    return sorted(filter(is_checkpoint, checkpoints.glob("step-*")))


def after(checkpoints: Path, step: int) -> list[Path]:
    """Those of later steps, whole or not."""
    numbers = {path: path.name.removeprefix("step-") for path in sorted(checkpoints.glob("step-*"))}
    return [path for path, number in numbers.items() if number.isdecimal() and int(number) > step]


def expert_file(checkpoint: Path, layer: int) -> Path:
    """The state of all experts of `layer`; it is missing when nobody answered for any of them."""
    return checkpoint / "experts" / f"layer-{layer:03d}.safetensors"


def expert_files(checkpoint: Path) -> list[Path]:
    """Those that are there, ascending by layer."""
    return sorted((checkpoint / "experts").glob("layer-*.safetensors"))
