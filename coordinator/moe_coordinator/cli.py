"""`moe-coordinator`: the way in. Importing is most of a start, so nothing is imported before Ctrl-C can be caught."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> None:
    """The command; leaves by SystemExit: 0 after a clean stop, 1 when the swarm refused or failed, 2 for a user's
    mistake, 130 when interrupted before it had begun, 128 + the signal when that stopped a local swarm."""
    try:
        from moe_net.entry import LeaveAtOnce

        with LeaveAtOnce():
            from moe_coordinator.command_line import run_command

            code = run_command(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code)


if __name__ == "__main__":
    main()
