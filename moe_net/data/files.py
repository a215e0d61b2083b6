"""The files below a folder, by the names that people see: links are followed, each file comes once, loops end."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file, or what cannot be read as one."""

    name: str
    """Relative to the folder, `/` between its parts: the same on every machine."""
    path: Path
    size_bytes: int
    fault: str = ""
    """Why it cannot be read: a link to nothing, a pipe, a folder that may not be listed."""


def words(error: OSError) -> str:
    """What the system says, in lower case: `permission denied`."""
    return (error.strerror or type(error).__name__).lower()


def find_files(root: Path, *, without: frozenset[str] = frozenset()) -> list[FoundFile]:
    """What is below `root`, ascending by name, without hidden names, Python's caches, and folders called as in
    `without`.

    Only the name that is seen may not be hidden, not that which a link leads to: the files of a ConfigMap are links
    into `..data`. Of several names of one file that with a suffix counts (in a Hugging Face cache the blobs have none),
    then the first. A folder has its own name rather than that of a link to it, and is entered once.
    """
    names: dict[tuple[int, int], list[FoundFile]] = {}
    faults: list[FoundFile] = []
    for file, identity in _entries(root, without):
        if file.fault:
            faults.append(file)
        else:
            names.setdefault(identity, []).append(file)
    files = [min(same, key=lambda file: (not file.path.suffix, file.name)) for same in names.values()]
    return sorted([*files, *faults], key=lambda file: file.name)


def _entries(root: Path, without: frozenset[str]) -> Iterator[tuple[FoundFile, tuple[int, int]]]:
    """Every name of a file below `root`, and which file it is (device and inode)."""
    folders: deque[tuple[Path, str]] = deque([(root, "")])
    links: deque[tuple[Path, str]] = deque()
    entered: set[tuple[int, int]] = set()
    while folders or links:
        folder, prefix = folders.popleft() if folders else links.popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield FoundFile(name=prefix or folder.name, path=folder, size_bytes=0, fault=words(error)), (0, 0)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name, path = prefix + entry.name, Path(entry.path)
            try:
                status = entry.stat()
            except OSError as error:
                fault = "a link to nothing" if isinstance(error, FileNotFoundError) else words(error)
                yield FoundFile(name=name, path=path, size_bytes=0, fault=fault), (0, 0)
                continue
            if stat.S_ISDIR(status.st_mode):
                if entry.name not in without and entry.name != "__pycache__":
                    (links if entry.is_symlink() else folders).append((path, name + "/"))
            else:
                fault = "" if stat.S_ISREG(status.st_mode) else "neither a file nor a folder"
                file = FoundFile(name=name, path=path, size_bytes=status.st_size, fault=fault)
                yield file, (status.st_dev, status.st_ino)
