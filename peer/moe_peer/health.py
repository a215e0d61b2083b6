"""`moe-peer health`: whether a peer, a coordinator or a trainer is well, cheap enough to be asked often."""

from __future__ import annotations

import os
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_peer.config import HealthConfig
from moe_peer.metrics import StepMetrics, from_line

METRICS = "metrics.jsonl"
LAST_BYTES = 64 * 1024
"""Bytes read from the end of metrics.jsonl, which grows all the time: the last steps are in there."""


def run_health(config: HealthConfig) -> int:
    """0 when it is well, 1 when not. ValueError when `what` is neither an address nor a folder."""
    if Path(config.what).is_dir():
        return _trainer_health(Path(config.what), config.within_s)
    host, _, port = config.what.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{config.what!r} is neither host:port of a peer or coordinator nor the --out of a trainer")
    return _server_health(config.what, config.timeout_s)


def _server_health(address: str, timeout_s: float) -> int:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=timeout_s)
        except grpc.RpcError as error:
            detail = " ".join((error.details() or "").split())
            print(f"{address}: {error.code().name}: {detail}")
            return 1
    print(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


def _trainer_health(folder: Path, within_s: float) -> int:
    step = _last_step(folder / METRICS)
    if step is None:
        print(f"{folder}: no step yet")
        return 1
    age_s = time.time() - step.at_s
    print(f"{folder}: step {step.step} was {age_s:.1f} s ago")
    return int(age_s > within_s)


def _last_step(path: Path) -> StepMetrics | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
        lines = file.read().split(b"\n")
    # The first is cut off, unless the file is short; the last one is empty, or still being written.
    for line in reversed(lines[:-1]):
        if line.startswith(b"{") and isinstance(record := from_line(line.decode()), StepMetrics):
            return record
    return None
