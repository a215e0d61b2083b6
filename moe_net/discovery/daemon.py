"""hivemind's libp2p daemon: a process of its own with two sockets in a folder of their own, ended whatever happens."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from moe_net.machine import processors

with warnings.catch_warnings():
    # hivemind compiles two functions with torch.jit.script, which torch has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind.p2p import P2P, PeerID
    from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
    from hivemind.utils.multiaddr import Multiaddr

log = logging.getLogger(__name__)

# An AF_UNIX path has at most 107 bytes; the daemon's file names take up to 32.
_MAX_SOCKET_DIR_BYTES = 70
SHUTDOWN_TIMEOUT_S = 1.0
"""Seconds that the daemon has to stop before it is killed: it takes some 20 ms, and has nothing to lose."""


class Daemon(P2P):
    """hivemind's handle on its libp2p daemon, so that it can be ended from every state of its start.

    Use a subclass made by `in_directory`: hivemind reads the paths of its two sockets from the class. In a
    directory of our own with mode 0700 they are private, and go with it.
    """

    made: ClassVar[list[Daemon]]

    def __init__(self) -> None:
        super().__init__()
        type(self).made.append(self)

    @staticmethod
    def in_directory(directory: str) -> type[Daemon]:
        """A class whose daemons have their sockets there, and that remembers those it made."""
        return type("_DaemonIn", (Daemon,), {"_UNIX_SOCKET_PREFIX": f"/unix{directory}/", "made": []})

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        # A session of its own: the terminal's Ctrl-C must not end the daemon before our withdrawal is out. And it ends
        # with us: one that outlives its process by half a minute would keep the port from the next. Go counts the cores
        # of the machine, not those of a container.
        setsid, setpriv = shutil.which("setsid"), shutil.which("setpriv")
        return [
            *([setsid] if setsid else []),
            *([setpriv, "--pdeathsig", "KILL"] if setpriv else []),
            "env",
            f"GOMAXPROCS={processors()}",
            *P2P._make_process_args(*args, **kwargs),
        ]

    @property
    def has_exited(self) -> bool:
        return self._child is None or self._child.returncode is not None

    async def connections(self) -> dict[PeerID, list[str]]:
        """The members that the daemon is connected with, and the multiaddrs at the other ends."""
        peers = await cast(Client, self._client).list_peers()
        return {peer.peer_id: [str(address) for address in peer.addrs] for peer in peers}

    async def reconnect(self, member: PeerID, addresses: Sequence[str]) -> None:
        """Leave what connection there is, which may be dead, and make a new one. P2PDaemonError when that fails."""
        client = cast(Client, self._client)
        if member in await self.connections():
            await client.disconnect(member)
        await client.connect(member, [Multiaddr(address) for address in addresses])

    async def end(self) -> None:
        """Stop the daemon and wait for it; kill it when it does not stop."""
        try:
            async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                await self.shutdown()
                # hivemind cancels its reader and does not wait; and until the pipe is at its end, asyncio keeps the
                # transport of a process open.
                reader, child = cast("tuple[asyncio.Task[None] | None, Any]", (self._reader_task, self._child))
                if reader is not None:
                    await asyncio.wait([reader])
                    await child.stdout.read()
        except TimeoutError:
            log.warning("the libp2p daemon did not stop within %.0f s and is killed", SHUTDOWN_TIMEOUT_S)
        finally:
            # Also when cancelled: the loop is going down and nobody will wait any more.
            if self._child is not None and self._child.returncode is None:
                self._child.kill()


async def start_daemon(
    directory: str,
    *,
    join: Sequence[str],
    listen: str,
    announce: str | None,
    identity: Path | None,
    client_mode: bool,
    timeout_s: float,
) -> Daemon:
    """A daemon that listens, or in `client_mode` does not, and knows those to `join`; its sockets lie in `directory`.

    It tells others the multiaddr `announce`, or where it listens. `identity` is the file of its key, made when there
    is none. When it raises, or is cancelled, no daemon is left.
    """
    if identity is not None:
        await asyncio.to_thread(_ensure_key, identity)
    kind = Daemon.in_directory(directory)
    # importlib.resources.path, which hivemind calls, warns in Python 3.11 and 3.12, and no more in 3.13.
    warnings.filterwarnings("ignore", "path is deprecated", DeprecationWarning, r"hivemind\.p2p\.")
    creating = kind.create(
        initial_peers=list(join) or None,
        host_maddrs=None if client_mode else [listen],
        announce_maddrs=None if announce is None else [announce],
        identity_path=None if identity is None else str(identity),
        # Asking the others would start a second daemon, and find this one's dead predecessor.
        check_if_identity_free=False,
        no_listen=client_mode,
        # Only who listens beyond this machine needs a port of the router.
        nat_port_map=not client_mode and not listen.startswith("/ip4/127."),
        dht_mode="client" if client_mode else "server",
        startup_timeout=timeout_s,
    )
    starting = asyncio.create_task(creating)
    try:
        # Not cancelled half-way: the process must be known to us before it can be ended.
        return cast(Daemon, await asyncio.shield(starting))
    except BaseException:
        await asyncio.wait([starting], timeout=SHUTDOWN_TIMEOUT_S)
        starting.cancel()
        await asyncio.wait([starting])
        if not starting.cancelled():
            starting.exception()
        for daemon in kind.made:
            await daemon.end()
        raise


def _ensure_key(path: Path) -> None:
    """A libp2p key is at `path`: the one that was there, or a new one, whole or not at all."""
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    P2P.generate_identity(str(unfinished))
    unfinished.replace(path)


def socket_directory() -> str:
    """A new folder of our own, with a path that is short enough."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="moe-net-", dir=base if len(base.encode()) <= _MAX_SOCKET_DIR_BYTES else "/tmp")


async def dismantle(daemon: Daemon | None, directory: str) -> None:
    """End `daemon`, and remove its folder."""
    try:
        if daemon is not None:
            await daemon.end()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
