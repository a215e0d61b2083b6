"""`moe-peer`: the way in. Importing is most of a start, so nothing is imported before Ctrl-C can be caught."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> None:
    """The command; leaves by SystemExit: 0 after a clean stop, 1 when the swarm refused, 2 for a user's mistake, 130
    when interrupted before it had begun (or, training, a second time)."""
    try:
        from moe_net.entry import LeaveAtOnce

        with LeaveAtOnce():
            from moe_peer.command_line import run_command

            code = run_command(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code)


if __name__ == "__main__":
    main()
