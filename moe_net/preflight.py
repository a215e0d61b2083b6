"""What options name on this machine, looked at before anything starts: without torch, without the network, and without
writing. Each function raises ValueError, naming the option and what is wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from moe_net.checkpoint_folder import ANY_STATE, checkpoints_of, is_checkpoint, newest_in


def must_read_file(option: str, path: Path) -> None:
    """A file, or a pipe, that can be read."""
    found = _look(option, path)
    if found is None:
        raise ValueError(f"{option} {path}: there is no such file")
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{option} {path}: that is a folder, not a file")
    _must_be_allowed(option, path, os.R_OK, "read")


def must_read_text(option: str, path: Path) -> None:
    """A file of text, or a folder with at least one file in it."""
    found = _look(option, path)
    if found is None:
        raise ValueError(f"{option} {path}: there is no such file or folder")
    if not stat.S_ISDIR(found.st_mode):
        _must_be_allowed(option, path, os.R_OK, "read")
        return
    _must_be_allowed(option, path, os.R_OK | os.X_OK, "read")
    # A link to a folder counts as well: the reader decides about it.
    if not any(names or any(os.path.islink(Path(place, name)) for name in folders)
               for place, folders, names in os.walk(path)):  # fmt: skip
        raise ValueError(f"{option} {path}: there is no file in that folder")


def must_write_folder(option: str, folder: Path) -> None:
    """A folder that can be written to, or can be made."""
    for place in (folder, *folder.absolute().parents):
        found = _look(option, place)
        if found is not None:
            if not stat.S_ISDIR(found.st_mode):
                raise ValueError(f"{option} {folder}: {place} is a file, not a folder")
            _must_be_allowed(option, place, os.W_OK | os.X_OK, "write to")
            return


def must_be_folder(option: str, folder: Path) -> None:
    """A folder that is there."""
    found = _look(option, folder)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{option} {folder}: there is no such folder")


def must_hold_checkpoint(option: str, folder: Path) -> None:
    """A whole checkpoint, or a folder that has one: of checkpoints, or a trainer's."""
    must_be_folder(option, folder)
    if not is_checkpoint(folder) and newest_in(folder) is None and newest_in(checkpoints_of(folder)) is None:
        raise ValueError(f"{option} {folder}: nothing to resume: no {checkpoints_of(folder)}/{ANY_STATE}")


def _look(option: str, path: Path) -> os.stat_result | None:
    """What is there, or None."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"{option} {str(path)!r}: {error}") from error


def _must_be_allowed(option: str, path: Path, mode: int, what: str) -> None:
    if not os.access(path, mode):
        raise ValueError(f"{option} {path}: this user may not {what} it")
