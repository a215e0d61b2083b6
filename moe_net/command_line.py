"""A program of several commands, each with a dataclass of options: what all of ours do with a command line.

What is wrong with a single word (no such option, not a number) is said by tyro in a box; what a dataclass says of its
values is a ValueError, in its own words.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

import tyro


def parse(
    prog: str,
    kinds: Mapping[str, type[Any]],
    arguments: Sequence[str],
    *,
    description: str,
    default: object | None = None,
) -> Any:
    """The options of the command that `arguments` begin with, over those of `default`, which is of its kind.

    SystemExit: 0 after --help and --version, 2 after words that are no options. ValueError as the kind raises it.
    """
    if list(arguments) == ["--version"]:
        print(f"{prog} {importlib.metadata.version('moe-net')}")
        raise SystemExit(0)
    command = arguments[0] if arguments else ""
    if command not in kinds:
        named = [Annotated[kind, tyro.conf.subcommand(name=name)] for name, kind in kinds.items()]
        either: Any = Union[tuple(named)]  # noqa: UP007  a union made at run time
        return tyro.cli(either, args=arguments, prog=prog, description=f"{description} --version: which one this is.")
    kind = kinds[command]
    unchecked = _unchecked(kind)
    given = tyro.cli(
        unchecked,
        args=arguments[1:],
        prog=f"{prog} {command}",
        default=None if default is None else unchecked(**_values(default)),
    )
    return kind(**_values(given))


def _values(options: Any) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _unchecked(kind: type[Any]) -> type[Any]:
    """`kind` without its checks: tyro would put the class's name before what they say."""

    def check_nothing(options: object) -> None:
        pass

    return type(kind.__name__, (kind,), {"__post_init__": check_nothing, "__doc__": kind.__doc__})
