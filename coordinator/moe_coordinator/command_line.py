"""`moe-coordinator` once it is loaded: its command line and what that starts."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from moe_coordinator.config import ChaosOptions, FieldsOptions, LocalOptions, ProxyOptions, ServeOptions, check_manifest
from moe_net.command_line import parse
from moe_net.config import RunConfig, load_toml
from moe_net.discovery.listen import check_join, check_unused
from moe_net.errors import MoeNetError
from moe_net.preflight import must_read_file, must_write_folder
from moe_net.screen import lossy_screen

COMMANDS: dict[str, type[Any]] = {
    "serve": ServeOptions,
    "local": LocalOptions,
    "proxy": ProxyOptions,
    "chaos": ChaosOptions,
    "fields": FieldsOptions,
}


def run_command(arguments: list[str] | None = None) -> int:
    """The command of `arguments` (None: the process's own); its exit code: 0 after a clean stop, 1 when the swarm
    refused or failed, 2 for a user's mistake, 128 + the signal that stopped a local swarm."""
    with ExitStack() as stack:
        try:
            options = parse(
                "moe-coordinator",
                COMMANDS,
                sys.argv[1:] if arguments is None else arguments,
                description="First contact for a run; a whole swarm as local processes; what goes wrong, on demand.",
            )
            # The commands are imported here, so that --help starts neither grpc nor an event loop.
            if isinstance(options, FieldsOptions):
                from moe_coordinator import fields

                return fields.main(options)
            stack.enter_context(lossy_screen())  # from here on it works for hours, and not for what it says
            if isinstance(options, LocalOptions):
                from moe_coordinator import local

                return local.main(options)
            if isinstance(options, ProxyOptions):
                from moe_coordinator import proxy_command

                return proxy_command.main(options)
            if isinstance(options, ChaosOptions):
                from moe_coordinator import chaos

                return chaos.main(options)
            # hivemind and its torch take seconds: a wrong manifest is reported before.
            run = _check_serve(options)
            from moe_coordinator import serve

            return serve.main(options, run)
        except (ValueError, OSError, MoeNetError) as error:
            print(f"moe-coordinator: {error}", file=sys.stderr)
            return 1 if isinstance(error, MoeNetError) else 2


def _check_serve(options: ServeOptions) -> RunConfig:
    """The manifest; ValueError or OSError names the first option with which the coordinator could not begin."""
    must_read_file("--config", options.config)
    run = check_manifest(load_toml(RunConfig, options.config))
    for address in options.join:
        check_join(address)
    if options.state is not None:
        must_write_folder("--state", options.state)
    check_unused(options.listen)
    return run
