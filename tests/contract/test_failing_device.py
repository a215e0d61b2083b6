"""A GPU that fails while a peer serves: its errors stay as long as the process lives, so the peer leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_calls import forward_call, new_host, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moe_net.errors import DeviceError, MoeNetError
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.base import CallError
from moe_peer.server import SERVICE

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(f"{ILLEGAL}\nSearch for `cudaErrorIllegalAddress' ..."),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
async def test_a_device_that_computes_no_more_ends_the_serving(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = new_host()
    monkeypatch.setattr(host, "forward_many", raising(error))
    async with serving(host, check=raising(torch.AcceleratorError(ILLEGAL))) as (server, client):
        waiting = asyncio.create_task(server.failed())
        with pytest.raises(CallError, match="INTERNAL"):
            await client.transport.forward(client.peer, forward_call(), timeout_s=10)
        with pytest.raises(DeviceError, match=str(error).partition("\n")[0].partition("[")[0]):
            await asyncio.wait_for(waiting, 10)
        assert issubclass(DeviceError, MoeNetError)  # exit code 1, by which a service manager starts it again
        await server.leave()
        status = await health_pb2_grpc.HealthStub(client.channel).Check(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=10
        )
        assert status.status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("error", "check"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), lambda: None),
        (torch.OutOfMemoryError("CUDA out of memory"), raising(torch.OutOfMemoryError("still"))),
        (RuntimeError("a bug of ours"), lambda: None),
    ],
)
async def test_an_error_after_which_the_device_computes_on_fails_one_call(
    error: Exception, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = new_host()
    monkeypatch.setattr(host, "forward_many", raising(error))
    async with serving(host, check=check) as (server, client):
        waiting = asyncio.create_task(server.failed())
        with pytest.raises(CallError, match="INTERNAL"):
            await client.transport.forward(client.peer, forward_call(), timeout_s=10)
        # By the device's thread, after the look.
        assert (await client.stub.Info(expert_pb2.InfoRequest(), timeout=10)).peer_id == "p"
        assert not waiting.done()
        waiting.cancel()
