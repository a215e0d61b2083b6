"""An engine with both images for all tests here, and the proof that nothing of ours stays on the machine."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from composed_swarm import wait_for
from container_engine import CGROUPS, Engine, running_engine
from container_images import built_images

OURS = "moe-engine-"


def traces() -> set[str]:
    """What there is of engines that tests start, and what any engine changes of a machine's network."""
    commands = {
        path.parent.name: path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline")
    }
    found = {f"process {pid}: {text}" for pid, text in commands.items() if OURS in text}
    found |= {f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines() if OURS in line}
    found |= {f"cgroup {path}" for path in CGROUPS.glob(f"**/{OURS}*")}
    found |= {
        f"file {path}"
        for path in Path(tempfile.gettempdir()).glob("moe-*")
        if path.name.startswith((OURS, "moe-base-", "moe-pip-", "moe-wheels-"))
    }
    found |= {f"interface {path.name}" for path in Path("/sys/class/net").iterdir()}
    found.add(f"ip_forward {Path('/proc/sys/net/ipv4/ip_forward').read_text().strip()}")
    return found


def holdings(engine: Engine) -> set[str]:
    """What a borrowed engine holds."""
    kinds = {
        "container": ["ps", "--all"],
        "network": ["network", "ls"],
        "volume": ["volume", "ls"],
        "image": ["images"],
    }
    return {f"{kind} {name}" for kind, listing in kinds.items() for name in engine.run(*listing, "--quiet").split()}


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    before = traces()
    with running_engine() as found:
        held = holdings(found)
        yield found
        if found.borrowed:
            left = holdings(found) - held
            assert not left, f"left in the engine: {left}"
    wait_for("the end of all that the engine was", lambda: traces() <= before, timeout_s=10.0)


@pytest.fixture(scope="session")
def tag() -> str:
    """The tag of our images, so that those that somebody uses keep their name."""
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture(scope="session")
def images(engine: Engine, tag: str) -> Iterator[dict[str, str]]:
    """Both images, target -> name."""
    with built_images(engine, tag=tag) as names:
        yield names
