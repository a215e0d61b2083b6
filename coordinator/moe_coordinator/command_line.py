"""`moe-coordinator` once it is loaded: its command line and what that starts."""

from __future__ import annotations

import sys

import tyro

from moe_coordinator.config import ChaosOptions, LocalOptions, ProxyOptions, ServeOptions
from moe_net.config import RunConfig, load_toml
from moe_net.errors import MoeNetError


def run_command() -> int:
    """The command's exit code: 0 after a clean stop, 1 when the swarm refused or failed, 2 for a user's mistake, 128 +
    the signal that stopped a local swarm."""
    try:
        options = tyro.extras.subcommand_cli_from_dict(
            {"serve": ServeOptions, "local": LocalOptions, "proxy": ProxyOptions, "chaos": ChaosOptions},
            prog="moe-coordinator",
            description="First contact for a run; a whole swarm as local processes; what goes wrong, on demand.",
        )
        # The commands are imported here, so that --help starts neither grpc nor an event loop.
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
        run = load_toml(RunConfig, options.config)
        from moe_coordinator import serve

        return serve.main(options, run)
    except (ValueError, OSError, MoeNetError) as error:
        print(f"moe-coordinator: {error}", file=sys.stderr)
        return 1 if isinstance(error, MoeNetError) else 2
