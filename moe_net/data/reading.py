"""What was read of a folder of text and what was left out, as one sentence for people."""

from __future__ import annotations

from dataclasses import dataclass, field

_NAMED = 5
"""What is left out is named up to here, the largest first."""
_UNITS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1))


@dataclass(slots=True, kw_only=True)
class LeftOut:
    """A file, or parts of one, for one reason."""

    name: str
    reason: str
    where: str
    """Place of the first part, like `line 17`; empty for a whole file."""
    is_fault: bool
    """The text is at fault; otherwise it is empty, or there is another copy of it."""
    count: int = 0
    size_bytes: int = 0

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        more = f"; and {self.count - 1} more" if self.count > 1 else ""
        return _printable(f"{self.name} ({place}{self.reason}{more})")


@dataclass(slots=True, kw_only=True)
class Reading:
    """Counts while a corpus is read. Bytes are those of files, as on the disk."""

    found_files: int
    found_bytes: int
    read_files: int = 0
    read_bytes: int = 0
    limit_bytes: int | None = None
    limit_reached: bool = False
    left_out: dict[tuple[str, str], LeftOut] = field(default_factory=dict[tuple[str, str], LeftOut])

    def leave(self, name: str, reason: str, size_bytes: int, *, where: str = "", is_fault: bool = True) -> None:
        """Count so many bytes of the file `name` as left out."""
        made = LeftOut(name=name, reason=reason, where=where, is_fault=is_fault)
        left = self.left_out.setdefault((name, reason), made)
        left.count += 1
        left.size_bytes += size_bytes

    @property
    def faulty_bytes(self) -> int:
        """Bytes that were left out for a fault of the text."""
        return sum(left.size_bytes for left in self.left_out.values() if left.is_fault)

    def __str__(self) -> str:
        """One line: `read 1 of 2 files, 30 of 520 KB; left out: big.txt (not UTF-8 at byte 480000)`."""
        unit, size = next((unit, size) for unit, size in _UNITS if self.found_bytes >= size or size == 1)
        text = f"read {self.read_files} of {_files(self.found_files)}, "
        text += f"{_in(self.read_bytes, size)} of {_in(self.found_bytes, size)} {unit}"
        left = sorted(self.left_out.values(), key=lambda left: (-left.size_bytes, left.name))
        parts = [str(one) for one in left[:_NAMED]]
        if len(left) > _NAMED:
            parts.append(
                f"and {len(left) - _NAMED} more, {_in(sum(one.size_bytes for one in left[_NAMED:]), size)} {unit}"
            )
        beyond = self.found_bytes - self.read_bytes - sum(one.size_bytes for one in left)
        if self.limit_bytes is not None and self.limit_reached and beyond > 0:
            limit = f"{self.limit_bytes / 2**20:g} MiB (--max-data-mib)"
            parts.insert(0, f"{_in(beyond, size)} {unit} beyond the limit of {limit}")
        return f"{text}; left out: {', '.join(parts)}" if parts else text


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _in(size_bytes: int, unit: int) -> str:
    return f"{size_bytes / unit:.3g}" if size_bytes < 100 * unit else f"{size_bytes / unit:.0f}"


def _printable(text: str) -> str:
    """Without control characters: a terminal would obey them."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
