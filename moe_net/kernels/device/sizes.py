"""Sizes of grids and tiles."""

from __future__ import annotations


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def power_of_2(value: int) -> int:
    """The smallest power of 2 that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
