"""`moe-coordinator`: serve a run, or run a whole swarm on this machine."""

from __future__ import annotations

import sys

import tyro

from moe_coordinator.config import LocalOptions, ServeOptions
from moe_net.errors import MoeNetError


def main() -> None:
    try:
        options = tyro.extras.subcommand_cli_from_dict(
            {"serve": ServeOptions, "local": LocalOptions},
            prog="moe-coordinator",
            description="First contact for a run, and a whole swarm as local processes.",
        )
        # Imported here, so that --help starts neither grpc nor an event loop.
        if isinstance(options, LocalOptions):
            from moe_coordinator import local

            code = local.main(options)
        else:
            from moe_coordinator import serve

            code = serve.main(options)
    except (ValueError, OSError, MoeNetError) as error:
        print(f"moe-coordinator: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, MoeNetError) else 2) from None
    except KeyboardInterrupt:  # before the command took the signals over: nothing had begun
        raise SystemExit(130) from None
    raise SystemExit(code)


if __name__ == "__main__":
    main()
