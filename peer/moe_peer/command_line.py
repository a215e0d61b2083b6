"""`moe-peer` once it is loaded: its command line and what that starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moe_net.command_line import parse
from moe_net.config import load_toml
from moe_net.errors import MoeNetError
from moe_net.garbage import tune_collector
from moe_net.preflight import must_read_file
from moe_net.rpc.poller import choose_poller
from moe_net.screen import lossy_screen
from moe_peer.config import HealthConfig, ServeConfig, TokenizerConfig, TrainConfig
from moe_peer.preflight import check_serve, check_tokenizer, check_train

DESCRIPTION = "Host experts of a run, train its trunk, make its tokenizer, or ask whether a member is well."
COMMANDS: dict[str, type[Any]] = {
    "serve": ServeConfig,
    "train": TrainConfig,
    "tokenizer": TokenizerConfig,
    "health": HealthConfig,
}


def run_command(arguments: list[str] | None = None) -> int:
    """The command of `arguments` (None: the process's own); its exit code: 0 after a clean stop, 1 when the swarm
    refused or a member is not well, 2 for a user's mistake."""
    with ExitStack() as stack:
        try:
            config = read_command_line(sys.argv[1:] if arguments is None else arguments)
            # Imported here, so that --help and a mistake start neither torch nor grpc nor an event loop.
            if isinstance(config, TokenizerConfig):
                check_tokenizer(config)
                from moe_peer.tokenizer import run_tokenizer

                return run_tokenizer(config)
            if isinstance(config, HealthConfig):
                from moe_peer.health import run_health

                return run_health(config)
            stack.enter_context(lossy_screen())  # from here on it works for hours, and not for what it says
            if isinstance(config, ServeConfig):
                check_serve(config)
                choose_poller()
                from moe_peer.serve import run_serve

                tune_collector()
                return run_serve(config)
            check_train(config)
            choose_poller()
            from moe_peer.train import run_train

            tune_collector()
            return run_train(config)
        except (ValueError, OSError, MoeNetError) as error:
            print(f"moe-peer: {error}", file=sys.stderr)
            return 1 if isinstance(error, MoeNetError) else 2


def read_command_line(arguments: list[str]) -> ServeConfig | TrainConfig | TokenizerConfig | HealthConfig:
    """Options over those of the TOML file of `--config`, over the defaults. ValueError names the file's mistakes, and
    what options do not allow."""
    kind = COMMANDS.get(arguments[0]) if arguments else None
    file = None if kind is None else _config_file(arguments)
    default = None
    if kind is not None and file is not None:
        must_read_file("--config", file)
        default = load_toml(kind, file)
    return parse("moe-peer", COMMANDS, arguments, description=DESCRIPTION, default=default)


def _config_file(arguments: Sequence[str]) -> Path | None:
    """The value of `--config`, which must be read before the other options are."""
    for position, text in enumerate(arguments):
        if text.startswith("--config="):
            return Path(text.removeprefix("--config="))
        if text == "--config" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
    return None
