# pyright: basic, reportAttributeAccessIssue=false
"""What hivemind 1.1.12 needs to finish a benchmark, patched at run time; nothing here makes its hot path slower.

1. Its DHT process registers the command pipe with uvloop, which makes the pipe non-blocking; a command larger than
   the pipe's buffer (64 KiB; from 512 rows on) is then read in half, and the call hangs (its pull request 660).
2. Its client formats the list of all pending futures into a debug message for every finished one, also when nothing
   is logged: quadratic in the number of calls.
3. Its MoE server announces experts from a thread while it still forks handlers and task pools; a fork that copies a
   held lock deadlocks (its issue 634). Announcing waits for the last fork here.
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing as mp
import os
import tempfile
import textwrap
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from hivemind.dht import DHT
from hivemind.moe import Server
from hivemind.moe.client import moe as client_moe
from hivemind.moe.server.dht_handler import DHTHandlerThread
from hivemind.p2p import P2P

DESCRIPTION = (
    "hivemind patched at run time: blocking DHT pipe (its PR 660: hangs from 512 rows on), no formatting of unused "
    "debug messages (quadratic in calls), experts announced after the last fork (its issue 634: deadlock at start)"
)


class _BlockingPipe:
    """The reading end of the DHT's command pipe, switched back to blocking before each message."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.fileno, self.poll, self.close = pipe.fileno, pipe.poll, pipe.close

    def recv(self) -> Any:
        os.set_blocking(self._pipe.fileno(), True)
        return self._pipe.recv()


class _WithoutDebugLines(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        is_debug = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "logger.debug"
        return ast.copy_location(ast.Pass(), node) if is_debug else node


def _without_debug_lines(function: Callable[..., Any]) -> Callable[..., Any]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    code = compile(ast.fix_missing_locations(_WithoutDebugLines().visit(tree)), inspect.getfile(function), "exec")
    names: dict[str, Any] = {}
    exec(code, function.__globals__, names)
    return names[definition.name]


def sockets_in_tmpdir() -> None:
    """Its Unix sockets lie in /tmp whatever TMPDIR says, and stay there when a process is killed."""
    P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/hivemind-"


def apply() -> None:
    """Patch the classes, before any of them is used."""
    sockets_in_tmpdir()
    dht_run = DHT.run

    def run_with_blocking_pipe(self: DHT) -> None:
        self._inner_pipe = _BlockingPipe(self._inner_pipe)
        dht_run(self)

    DHT.run = run_with_blocking_pipe
    call_many = client_moe._RemoteCallMany
    call_many._collect_responses = staticmethod(_without_debug_lines(call_many._collect_responses))

    server_init, announce = Server.__init__, DHTHandlerThread.run
    all_forked = mp.Event()

    def init(self: Server, *arguments: Any, start: bool = False, **named: Any) -> None:
        server_init(self, *arguments, start=False, **named)
        if start:
            self.run_in_background(await_ready=True)
            all_forked.set()

    def announce_after_forks(self: DHTHandlerThread) -> None:
        all_forked.wait()
        announce(self)

    Server.__init__, DHTHandlerThread.run = init, announce_after_forks
