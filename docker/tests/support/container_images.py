"""The images of the tests: built from the Dockerfile as a user's, from a base that is made here when none can be had.

`python docker/tests/support/container_images.py` does that by hand, on an engine of its own if none is there, and says
how to reach it.
"""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import egress
from container_engine import Engine, EngineError, command, running_engine

ROOT = Path(__file__).resolve().parents[3]
BASE = "python:3.11-slim-bookworm"
TARGETS = ("peer", "coordinator")
# pip's options that say where packages come from. Those that name folders of this machine mean nothing in a build.
REMOTE_OPTIONS = ("index-url", "extra-index-url", "trusted-host", "timeout", "retries")
BUILD_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipOptions:
    """What this machine's pip is configured to do."""

    remote: dict[str, str]
    certificates: Path | None
    wheels: tuple[Path, ...]

    @property
    def secrets(self) -> tuple[str, ...]:
        """Words that no image may have: hosts of indexes, and where the certificates lie."""
        urls = [word for option in ("index-url", "extra-index-url") for word in self.remote.get(option, "").split()]
        return tuple(url.split("/")[2].rpartition("@")[2] for url in urls)


def pip_options() -> PipOptions:
    """Reads `pip config list`; what stands in the environment wins over files."""
    listed = command([sys.executable, "-m", "pip", "config", "list"], os.environ, timeout_s=60.0)
    options: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        options[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    remote: dict[str, str] = {}
    for option in REMOTE_OPTIONS:
        words = [word for word in options.get(option, "").split() if not word.startswith(("file:", "/"))]
        if words:
            remote[option] = " ".join(words)
    folders = [Path(word) for word in options.get("find-links", "").split()]
    return PipOptions(
        remote=remote,
        certificates=Path(options["cert"]) if "cert" in options else None,
        wheels=tuple(wheel for folder in folders if folder.is_dir() for wheel in sorted(folder.glob("torch-*.whl"))),
    )


def has_image(engine: Engine, name: str) -> bool:
    return bool(engine.run("images", "--quiet", name).strip())


def import_image(engine: Engine, name: str, folder: Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """An image of one layer: the files of a folder."""
    excluded = [f"--exclude=./{path}" for path in leave_out]
    with subprocess.Popen(["tar", "-C", str(folder), *excluded, "-c", "."], stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        engine.run("import", "-", name, stdin=tar.stdout.fileno(), timeout_s=300.0)
    if tar.returncode != 0:
        raise EngineError(f"tar could not read {folder}")


def make_base(engine: Engine) -> None:
    """Debian stable with Python, under the name that a user's build takes from the registry."""
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise EngineError(f"{BASE} cannot be pulled, and to make it takes root and Debian's debootstrap")
    folder = Path(tempfile.mkdtemp(prefix="moe-base-"))
    try:
        packages = "python3,python3-venv,ca-certificates"
        command(
            ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder)],
            os.environ, timeout_s=BUILD_S,
        )  # fmt: skip
        unused = ("var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc", "usr/share/locale", "proc/*", "sys/*")
        import_image(engine, BASE, folder, leave_out=unused)
    finally:
        shutil.rmtree(folder)


def get_base(engine: Engine) -> bool:
    """Whether the base had to be brought here: pulled, or made where the registry cannot be reached."""
    if has_image(engine, BASE):
        return False
    try:
        engine.run("pull", BASE, timeout_s=300.0)
    except (EngineError, subprocess.TimeoutExpired):
        make_base(engine)
    return True


@contextmanager
def pip_secrets(options: PipOptions) -> Iterator[list[str]]:
    """The arguments that lend pip's configuration to a build."""
    with tempfile.TemporaryDirectory(prefix="moe-pip-") as folder:
        config = configparser.RawConfigParser()
        config["global"] = dict(options.remote)
        secrets = []
        if options.certificates is not None:
            config["global"]["cert"] = "/run/secrets/ca.crt"
            secrets += ["--secret", f"id=ca.crt,src={options.certificates}"]
        path = Path(folder) / "pip.conf"
        with path.open("w") as file:
            config.write(file)
        yield [*secrets, "--secret", f"id=pip.conf,src={path}"]


def build(engine: Engine, target: str, name: str, options: PipOptions, *, wheels: str | None) -> None:
    arguments = ["--build-arg", f"BASE={BASE}"]
    if wheels is not None:
        arguments += ["--build-arg", f"WHEELS={wheels}", "--build-arg", "TORCH_INDEX="]
    if not engine.borrowed:
        arguments += ["--build-arg", f"HTTPS_PROXY={egress.URL}"]
    with pip_secrets(options) as secrets:
        engine.run(
            "build", "--progress", "plain", "--network", "host", "--file", ROOT / "docker" / "Dockerfile",
            "--target", target, "--tag", name, *arguments, *secrets, ROOT, timeout_s=BUILD_S,
        )  # fmt: skip


@contextmanager
def built_images(engine: Engine, *, tag: str) -> Iterator[dict[str, str]]:
    """Both images, target -> name. A borrowed engine loses in the end all that was brought to it for them."""
    options = pip_options()
    with ExitStack() as cleaning:

        def remove_later(name: str) -> None:
            if engine.borrowed:
                cleaning.callback(lambda: engine.run("image", "rm", "--force", name))

        if get_base(engine):
            remove_later(BASE)
        wheels = f"moe-net-test-wheels:{tag}" if options.wheels else None
        if wheels is not None:
            with tempfile.TemporaryDirectory(prefix="moe-wheels-") as folder:
                for wheel in options.wheels:
                    shutil.copy(wheel, folder)
                import_image(engine, wheels, Path(folder))
            remove_later(wheels)
        names = {target: f"moe-net-{target}:{tag}" for target in TARGETS}
        for target, name in names.items():
            build(engine, target, name, options, wheels=wheels)
            remove_later(name)
        yield names


if __name__ == "__main__":
    # However it is told to end, it clears up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), running_engine() as found, built_images(found, tag="latest"):
        print(f"DOCKER_HOST={found.environment.get('DOCKER_HOST', '')} {found.client}  # until Ctrl-C", flush=True)
        signal.pause()
