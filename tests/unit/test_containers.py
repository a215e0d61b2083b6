"""What is asked of docker for each fault: a stand-in for its command line writes down what it is asked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from moe_coordinator.containers import Containers, DockerError, Life
from moe_coordinator.faults import Action, Fault, FaultPlan, Network

# Every service has one container, named like it; peer-9 has none. A proxy takes what it is told but a cut of proxy-3.
DOCKER = """#!{python}
import json, sys
arguments = sys.argv[1:]
said = sys.stdin.readline() if arguments[0] == "attach" else ""
with open({log!r}, "a") as log:
    log.write(json.dumps([*arguments, *([json.loads(said)] if said else [])]) + "\\n")
match arguments:
    case ["ps", *_]:
        service = arguments[-1].rpartition("=")[2]
        print("" if service == "peer-9" else service)
    case ["inspect", service]:
        networks = {{"swarm_default": {{"Aliases": [service, "0123456789ab"]}}}}
        state = {{"StartedAt": "2030-01-01T00:00:00Z", "Running": True, "ExitCode": 0}}
        print(json.dumps([{{"State": state, "NetworkSettings": {{"Networks": networks}}}}]))
    case ["attach", _, "proxy-3"]:
        print(json.dumps({{"event": "refused", "error": "no"}}))
    case ["attach", *_]:
        print(json.dumps({{"event": "changed"}}), flush=True)
        sys.stdin.read()
    case ["kill", "coordinator"]:
        sys.exit("it does not run")
"""


class Asked:
    """What the stand-in was asked so far, without its look-ups."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def all(self) -> list[list[object]]:
        asked = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [words for words in asked if words[0] not in ("ps", "inspect")]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    log = tmp_path / "asked"
    log.touch()
    script = tmp_path / "docker"
    script.write_text(DOCKER.format(python=sys.executable, log=str(log)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    return Asked(log)


def fault(what: str, target: str = "peer-1", **details: object) -> Fault:
    return Fault(what=what, target=target, at_s=0.0, **details)  # type: ignore[arg-type]


async def begin_and_end(containers: Containers, what: Fault) -> None:
    await containers.perform(Action(fault=what, phase="began"), (what,))
    await containers.perform(Action(fault=what, phase="ended"), ())


@pytest.mark.parametrize(
    ("what", "commands"),
    [
        (fault("stop", duration_s=1.0), [["pause", "peer-1"], ["unpause", "peer-1"]]),
        (fault("restart"), [["kill", "peer-1"], ["start", "peer-1"]]),
        (
            fault("disconnect", duration_s=1.0),
            [
                ["network", "disconnect", "swarm_default", "peer-1"],
                ["network", "connect", "--alias=peer-1", "--alias=0123456789ab", "swarm_default", "peer-1"],
            ],
        ),
    ],
)
async def test_what_begins_ends_and_a_network_comes_back_with_its_names(
    asked: Asked, what: Fault, commands: list[list[object]]
) -> None:
    await begin_and_end(Containers("swarm", FaultPlan()), what)
    assert asked.all() == commands


async def test_a_proxy_is_told_all_of_its_state_each_time(asked: Asked) -> None:
    containers = Containers("swarm", FaultPlan(network=Network(round_trip_s=0.2)))
    slow, cut = fault("delay", round_trip_s=0.4), fault("cut")
    await containers.perform(Action(fault=cut, phase="began"), (slow, cut))
    await containers.perform(Action(fault=slow, phase="ended"), (cut,))
    told = [words[-1] for words in asked.all()]
    assert [words[:3] for words in asked.all()] == [["attach", "--sig-proxy=false", "proxy-1"]] * 2
    assert [(change["cut"], change["up"]["delay_s"]) for change in told] == [  # type: ignore[call-overload,index]
        (True, pytest.approx(0.3)),
        (True, pytest.approx(0.1)),
    ]


async def test_what_does_not_work_is_an_error_that_says_why(asked: Asked) -> None:
    containers = Containers("swarm", FaultPlan(fault=(fault("kill"), fault("stop", "peer-9"))))
    with pytest.raises(DockerError, match="docker kill coordinator: it does not run"):
        await containers.perform(Action(fault=fault("kill", "coordinator"), phase="began"), ())
    with pytest.raises(DockerError, match=r"proxy-3 does not take .*'error': 'no'"):
        await containers.perform(Action(fault=fault("cut", "peer-3"), phase="began"), ())
    with pytest.raises(ValueError, match=r"fault\.1\.target: project swarm: peer-9 has 0 containers"):
        await containers.check()


async def test_a_life_is_told_by_when_it_began(asked: Asked) -> None:
    life = await Containers("swarm", FaultPlan()).life("trainer")
    assert life == Life(started_at="2030-01-01T00:00:00Z", running=True, exit_code=0)
