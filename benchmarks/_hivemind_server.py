# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""hivemind's server command with the fixes, on loopback; prints one ready line with its addresses.

Arguments are those of `hivemind-server`. Its `--host_maddrs` splits an address into letters (argparse type=list), so
the loopback address is passed below the command line.
"""

from __future__ import annotations

from typing import Any

import _hivemind_fixes
import torch
from _processes import die_with_parent, say
from hivemind.hivemind_cli import run_server
from hivemind.moe import Server
from hivemind.moe.server.dht_handler import get_experts


def main() -> None:
    die_with_parent()
    torch.set_num_threads(1)
    _hivemind_fixes.apply()
    create = Server.create

    def create_on_loopback(*, host_maddrs: object, expert_uids: list[str], **named: Any) -> Server:
        del host_maddrs
        server = create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], expert_uids=expert_uids, **named)
        # A question to the DHT behind the announcement, which goes through the same pipe.
        while any(found is None for found in get_experts(server.dht, expert_uids)):
            pass
        say(event="ready", addresses=[str(address) for address in server.dht.get_visible_maddrs()])
        return server

    Server.create = create_on_loopback
    run_server.main()


if __name__ == "__main__":
    main()
