"""`moe-peer` once it is loaded: its command line and what that starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from moe_net.config import load_toml
from moe_net.errors import MoeNetError
from moe_net.garbage import tune_collector
from moe_net.rpc.poller import choose_poller
from moe_peer.config import HealthConfig, ServeConfig, TokenizerConfig, TrainConfig

DESCRIPTION = "Host experts of a run, train its trunk, make its tokenizer, or ask whether a member is well."
COMMANDS: dict[str, type[Any]] = {"serve": ServeConfig, "train": TrainConfig, "tokenizer": TokenizerConfig}


def run_command(arguments: list[str] | None = None) -> int:
    """The command of `arguments` (None: the process's own); its exit code: 0 after a clean stop, 1 when the swarm
    refused or a member is not well, 2 for a user's mistake."""
    try:
        config = read_command_line(sys.argv[1:] if arguments is None else arguments)
        if isinstance(config, TokenizerConfig):
            from moe_peer.tokenizer import run_tokenizer

            return run_tokenizer(config)
        choose_poller()
        # Imported here, so that --help starts neither torch nor grpc nor an event loop.
        if isinstance(config, ServeConfig):
            from moe_peer.serve import run_serve

            tune_collector()
            return run_serve(config)
        if isinstance(config, HealthConfig):
            from moe_peer.health import run_health

            return run_health(config)
        from moe_peer.train import run_train

        tune_collector()
        return run_train(config)
    except (ValueError, OSError, MoeNetError) as error:
        print(f"moe-peer: {error}", file=sys.stderr)
        return 1 if isinstance(error, MoeNetError) else 2


def read_command_line(arguments: list[str]) -> ServeConfig | TrainConfig | TokenizerConfig | HealthConfig:
    """Options over those of the TOML file of `--config`, over the defaults. ValueError names the file's mistakes."""
    command = arguments[0] if arguments else ""
    file = _config_file(arguments)
    kinds: list[Any] = []
    for name, kind in COMMANDS.items():
        default = load_toml(kind, file) if file is not None and name == command else kind()
        kinds.append(Annotated[kind, tyro.conf.subcommand(name=name, default=default)])
    kinds.append(Annotated[HealthConfig, tyro.conf.subcommand(name="health")])
    # A union made at run time: the defaults are the file's.
    either: Any = Union[tuple(kinds)]  # noqa: UP007
    return tyro.cli(either, args=arguments, prog="moe-peer", description=DESCRIPTION)


def _config_file(arguments: Sequence[str]) -> Path | None:
    """The value of `--config`, which must be read before the other options are."""
    for position, text in enumerate(arguments):
        if text.startswith("--config="):
            return Path(text.removeprefix("--config="))
        if text == "--config" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
    return None
