"""What the images hold, and what they must not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from container_engine import Engine
from container_images import BASE, ROOT, TARGETS

pytestmark = pytest.mark.timeout(720)


def config_of(engine: Engine, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine.run("inspect", image))[0]["Config"]
    return found


def history_of(engine: Engine, image: str) -> list[str]:
    return engine.run("history", "--no-trunc", "--format", "{{.CreatedBy}} {{.Comment}}", image).splitlines()


def in_a_container(engine: Engine, image: str, script: str, *, user: str = "10001:10001") -> str:
    """What a shell prints in the image, started as a member is: no writable root, no network."""
    return engine.run(
        "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", "--user", user, "--entrypoint", "sh",
        image, "-ec", script,
    )  # fmt: skip


def test_the_dockerfile_is_clean() -> None:
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=here)
    assert hadolint is not None, "it comes with the project's `dev` extra"
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_shows_no_secret_no_certificate_and_no_registry(
    engine: Engine, images: dict[str, str], target: str
) -> None:
    history = history_of(engine, images[target])
    ours = "\n".join(history[: len(history) - len(history_of(engine, BASE))])
    assert "useradd" in ours
    assert not [word for word in ("://", "secret", "pip.conf", "ca.crt", "CERTIFICATE", "PROXY") if word in ours]
    places = "find / -xdev -name pip.conf -o -name ca.crt -o -path '/run/secrets*'"
    assert in_a_container(engine, images[target], places, user="root") == ""


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_says_how_it_is_run(engine: Engine, images: dict[str, str], target: str) -> None:
    config = config_of(engine, images[target])
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["Volumes"]) == ["/state"]
    assert config["Entrypoint"] == ["dumb-init", "--single-child", "--", f"moe-{target}"]
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "moe-peer", "health"]
    assert "PYTHONUNBUFFERED=1" in config["Env"]
    labels = config["Labels"]
    assert {"title", "description", "version", "revision"} <= {name.rpartition(".")[2] for name in labels}


def test_both_images_share_all_layers(engine: Engine, images: dict[str, str]) -> None:
    layers = [json.loads(engine.run("inspect", image))[0]["RootFS"]["Layers"] for image in images.values()]
    assert layers[0] == layers[1]


def test_an_image_has_no_compiler_and_no_installer(engine: Engine, images: dict[str, str]) -> None:
    tools = "for tool in cc gcc g++ make /opt/moe-net/bin/pip; do command -v $tool || true; done"
    places = "find / -xdev -path '*/.cache/pip' -o -path /opt/pip -o -path /build -o -path /wheels"
    assert in_a_container(engine, images["peer"], f"{tools}; {places}", user="root") == ""


def test_who_runs_in_a_container_is_not_root_and_owns_its_state(engine: Engine, images: dict[str, str]) -> None:
    found = in_a_container(engine, images["peer"], "id -u; touch /state/key; ls -ldn /state; touch /tmp/x; ! touch /x")
    uid, state = found.splitlines()
    assert uid == "10001"
    assert state.split()[:4] == ["drwx------", "2", "10001", "10001"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_of_an_image_answers(engine: Engine, images: dict[str, str], target: str) -> None:
    assert f"usage: moe-{target}" in engine.run("run", "--rm", "--read-only", "--network", "none", images[target])
