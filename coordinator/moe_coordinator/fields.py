"""`moe-coordinator fields`: a run's manifest with every field, what it means and what it is by default, as TOML."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from moe_coordinator.config import FieldsOptions, toml_value
from moe_net.config import RunConfig
from moe_net.model.config import PRESETS

WIDTH = 120


def main(options: FieldsOptions) -> int:
    """Print it; exit code 0."""
    print(manifest(RunConfig(model=PRESETS[options.preset])))
    return 0


def manifest(run: RunConfig) -> str:
    """The TOML that `load_toml` reads back as `run`, with a comment before each field."""
    return "\n".join(_table(run, ())).strip()


def _table(values: Any, path: tuple[str, ...]) -> Iterator[str]:
    docs = docstrings(type(values))
    nested = [f.name for f in dataclasses.fields(values) if dataclasses.is_dataclass(getattr(values, f.name))]
    if path:
        yield f"\n[{'.'.join(path)}]"
    for field in dataclasses.fields(values):
        if field.name not in nested:
            yield from textwrap.wrap(docs[field.name], WIDTH, initial_indent="# ", subsequent_indent="# ")
            value = getattr(values, field.name)
            # TOML has no word for what is absent.
            yield f"# {field.name} =" if value is None else f"{field.name} = {toml_value(value)}"
    for name in nested:
        yield from _table(getattr(values, name), (*path, name))


def docstrings(kind: type[Any]) -> dict[str, str]:
    """Field -> the text below it in the source, and its choices."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        text = ""
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            text = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
        if isinstance(field.annotation, ast.Subscript):  # Literal
            choices = ast.literal_eval(field.annotation.slice)
            text += f" One of {', '.join(map(json.dumps, choices))}."
        docs[field.target.id] = text
    return docs
