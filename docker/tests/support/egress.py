"""A way out of a network namespace that has none: an HTTP CONNECT proxy that listens inside it and dials outside.

An engine that the tests start lives in a namespace of its own, so that its bridges, rules and routes end with it; but
pip has to reach its index while an image is built.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
# Nothing else listens inside a namespace that is ours.
PORT = 3128
URL = f"http://127.0.0.1:{PORT}"


def socket_inside(namespace: Path) -> socket.socket:
    """A socket that listens in a network namespace (`/proc/PID/ns/net`), whoever accepts from it."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            with namespace.open("rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}")
            made.append(socket.create_server(("127.0.0.1", PORT)))
        except OSError as error:
            failed.append(error)

    # It is a thread that is in a namespace, and this one ends in there.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        # Either end is gone: so is the connection.
        for end in (source, sink):
            end.close()


def _serve(client: socket.socket) -> None:
    with closing(client):
        request = b""
        while b"\r\n\r\n" not in request:
            data = client.recv(4096)
            if not data:
                return
            request += data
        method, target = request.split(b" ", 2)[:2]
        host, _, port = target.decode().rpartition(":")
        if method != b"CONNECT":
            client.sendall(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
            return
        try:
            server = socket.create_connection((host, int(port)), timeout=30.0)
        except OSError:
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        server.settimeout(None)
        with closing(server):
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()


@contextmanager
def egress(namespace: Path) -> Iterator[None]:
    """While within, processes of the network namespace have a proxy at `URL`."""
    listening = socket_inside(namespace)

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:  # shut down
                return
            threading.Thread(target=_serve, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        listening.close()
