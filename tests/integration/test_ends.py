"""Every way in which a program can end, for every program: its exit code, what is saved, what is withdrawn, what its
screen says.

A pipe that nobody reads any more and a disk that is full end nothing: the program goes on, and a SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import pytest_asyncio
from processes import RUN, SEQUENCES, module, trainer_spec
from programs import Program, Screen, on_screen, until

from moe_coordinator.config import to_toml
from moe_coordinator.state import State
from moe_net.checkpoint_folder import checkpoints_of, newest_in, trainer_folder
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.record import Identity
from moe_peer.checkpoint import read_meta, saved_versions
from moe_peer.config import HealthConfig
from moe_peer.health import run_health

MEMBERS = ("train", "serve", "coordinator")
"""In the order in which they end here: who uses others goes before them."""
SWARMS = ("local", "local with faults")
ENDS = ("Ctrl-C", "SIGTERM", "SIGHUP", "terminal closed", "pipe closed", "full disk", "SIGKILL")
SCREENS: dict[str, Screen] = {"Ctrl-C": "terminal", "terminal closed": "terminal", "full disk": "disk"}
"""What a program that ends so has for a screen; the others have a pipe."""
FAULTS = "[network]\nround_trip_s = 0.002\n"

FOR_EVER = 100_000
LEAVE_S = 10.0
"""Whoever asks a program to stop kills it after that: docker does. A local swarm stops three kinds of members so, one
after the other."""
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(slots=True, kw_only=True)
class Case:
    """One program that ends, and what is around it."""

    program: Program
    out: Path
    """Its folder; of a trainer, also that of a local swarm, its --out."""
    tmp: Path
    """The folder of its temporary files."""
    address: str = ""
    """Of a server."""
    watcher: DhtDiscovery | None = None
    """Another member of its directory."""
    peer_id: str = ""
    """Of the peer that was in the directory before anybody ended."""
    checkpoint_every: int = 0
    again: Callable[[int], tuple[str, ...]] | None = None
    """The command that goes on with a training, until this step."""

    def made(self) -> int:
        """Steps that its metrics have."""
        path = self.out / "metrics.jsonl"
        return path.read_text().count('{"event": "step"') if path.exists() else 0

    @property
    def newest(self) -> Path:
        found = newest_in(checkpoints_of(self.out))
        assert found is not None, f"no checkpoint in {self.out}"
        return found

    async def due(self, how: str) -> None:
        """Wait until it has something to lose: a trainer's steps, and a checkpoint where it cannot make another at its
        end; those whom a coordinator has met."""
        if self.checkpoint_every:
            last = how in ("full disk", "SIGKILL")
            await self.program.until(
                lambda: self.made() > 2 and (not last or newest_in(checkpoints_of(self.out)) is not None)
            )
        elif (members := State(self.out)).dht_key.exists():
            await until(lambda: bool(members.members()))

    async def goes_on(self) -> None:
        """A trainer makes steps, others answer."""
        if self.address:
            assert await asyncio.to_thread(run_health, HealthConfig(what=self.address)) == 0
        else:
            made = self.made()
            await self.program.until(lambda: self.made() > made + 2)

    async def seen(self) -> list[str]:
        """Peers that the directory has."""
        assert self.watcher is not None
        return [peer.peer_id for peer in await self.watcher.peers()]


# What ends it -------------------------------------------------------------------------------------------------------


async def end(case: Case, how: str) -> None:
    program = case.program
    match how:
        case "Ctrl-C":
            program.press_ctrl_c()
        case "SIGTERM":  # nohup has started it
            program.signal(signal.SIGHUP)
            await case.goes_on()
            program.signal(signal.SIGTERM)
        case "terminal closed":
            program.close()
        case "pipe closed":
            program.close()
            await case.goes_on()
            program.signal(signal.SIGTERM)
        case "full disk":
            program.fill_disk()
            if case.address:
                await case.goes_on()
            else:
                said = ("metrics_not_written", "going on without it")
                await program.until(lambda: all(words in program.screen for words in said))
            program.signal(signal.SIGTERM)
        case _:
            program.signal(signal.Signals[how])


# What is saved ------------------------------------------------------------------------------------------------------


def check_whole(checkpoint: Path, *, step: int) -> None:
    assert read_meta(checkpoint).step == step
    assert saved_versions(checkpoint) == dict.fromkeys(RUN.model.expert_ids, step)


async def every_step(case: Case) -> None:
    check_whole(case.newest, step=case.made())


async def all_until_a_checkpoint(case: Case) -> None:
    step = read_meta(case.newest).step
    assert step % case.checkpoint_every == 0
    assert step > case.made() - 2 * case.checkpoint_every, "the last but one, if it was being written"
    check_whole(case.newest, step=step)


async def all_until_a_checkpoint_to_go_on_from(case: Case) -> None:
    """Who starts it again makes the steps after that one."""
    await all_until_a_checkpoint(case)
    assert case.again is not None
    step = read_meta(case.newest).step
    async with on_screen("pipe", case.again(step + 3), tmp=case.tmp) as again:
        assert await again.ended(within_s=60.0) == 0, again.screen
    assert read_meta(case.newest).step == step + 3
    assert set(saved_versions(case.newest)) == set(RUN.model.expert_ids)


async def who_it_is(case: Case) -> None:
    """A peer's key. Its experts are in the trainer's checkpoint."""
    assert Identity.load(case.out / "key").peer_id == case.peer_id


async def who_it_is_and_whom_it_met(case: Case) -> None:
    state = State(case.out)
    assert state.dht_key.exists()
    assert case.watcher is not None
    assert set(case.watcher.addresses) & set(state.members())


# What is withdrawn --------------------------------------------------------------------------------------------------


async def nothing(case: Case) -> None:
    """A trainer is in no directory, and its peers serve on; a run goes on without its coordinator, and whoever joins
    finds what it is."""
    assert case.watcher is not None
    assert await case.watcher.get_manifest() is not None
    if case.checkpoint_every:
        assert await case.seen() == [case.peer_id]


async def its_record(case: Case) -> None:
    assert await case.seen() == []


async def its_record_when_it_expires(case: Case) -> None:
    assert await case.seen() == [case.peer_id]
    async with asyncio.timeout(RUN.record_ttl_s + LEAVE_S):
        while await case.seen():  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def all_that_it_started(case: Case) -> None:
    """Processes, for which `Program.ended` waits, and their temporary files."""
    assert list(case.tmp.iterdir()) == []


# The table ----------------------------------------------------------------------------------------------------------

LEAVES = "leaving: withdraw, finish what runs"
SAVED = "stopping: step "
GOES_ON = "leaving: the run goes on"
STOPS = "stopping (once more: kill)"
LOST = "cannot be written: "
UNSEEN = ""
"""Nobody reads it, or it has no time to say anything."""


@dataclass(frozen=True, slots=True)
class Expected:
    code: int
    saved: Callable[[Case], Awaitable[None]]
    withdrawn: Callable[[Case], Awaitable[None]]
    says: str


TABLE: dict[tuple[str, str], Expected] = {
    ("Ctrl-C", "train"): Expected(0, every_step, nothing, SAVED),
    ("Ctrl-C", "serve"): Expected(0, who_it_is, its_record, LEAVES),
    ("Ctrl-C", "coordinator"): Expected(0, who_it_is_and_whom_it_met, nothing, GOES_ON),
    ("Ctrl-C", "local"): Expected(130, every_step, all_that_it_started, STOPS),
    ("Ctrl-C", "local with faults"): Expected(130, every_step, all_that_it_started, STOPS),
    ("SIGTERM", "train"): Expected(0, every_step, nothing, SAVED),
    ("SIGTERM", "serve"): Expected(0, who_it_is, its_record, LEAVES),
    ("SIGTERM", "coordinator"): Expected(0, who_it_is_and_whom_it_met, nothing, GOES_ON),
    ("SIGTERM", "local"): Expected(143, every_step, all_that_it_started, STOPS),
    ("SIGTERM", "local with faults"): Expected(143, every_step, all_that_it_started, STOPS),
    ("SIGHUP", "train"): Expected(0, every_step, nothing, SAVED),
    ("SIGHUP", "serve"): Expected(0, who_it_is, its_record, LEAVES),
    ("SIGHUP", "coordinator"): Expected(0, who_it_is_and_whom_it_met, nothing, GOES_ON),
    ("SIGHUP", "local"): Expected(129, every_step, all_that_it_started, STOPS),
    ("SIGHUP", "local with faults"): Expected(129, every_step, all_that_it_started, STOPS),
    ("terminal closed", "train"): Expected(0, every_step, nothing, UNSEEN),
    ("terminal closed", "serve"): Expected(0, who_it_is, its_record, UNSEEN),
    ("terminal closed", "coordinator"): Expected(0, who_it_is_and_whom_it_met, nothing, UNSEEN),
    ("terminal closed", "local"): Expected(129, every_step, all_that_it_started, UNSEEN),
    ("terminal closed", "local with faults"): Expected(129, every_step, all_that_it_started, UNSEEN),
    ("pipe closed", "train"): Expected(0, every_step, nothing, UNSEEN),
    ("pipe closed", "serve"): Expected(0, who_it_is, its_record, UNSEEN),
    ("pipe closed", "coordinator"): Expected(0, who_it_is_and_whom_it_met, nothing, UNSEEN),
    ("pipe closed", "local"): Expected(143, every_step, all_that_it_started, UNSEEN),
    ("pipe closed", "local with faults"): Expected(143, every_step, all_that_it_started, UNSEEN),
    ("full disk", "train"): Expected(1, all_until_a_checkpoint, nothing, LOST),
    ("full disk", "serve"): Expected(0, who_it_is, its_record, LEAVES),
    ("full disk", "coordinator"): Expected(0, who_it_is_and_whom_it_met, nothing, GOES_ON),
    ("full disk", "local"): Expected(1, all_until_a_checkpoint, all_that_it_started, LOST),
    ("full disk", "local with faults"): Expected(1, all_until_a_checkpoint, all_that_it_started, LOST),
    ("SIGKILL", "train"): Expected(-9, all_until_a_checkpoint_to_go_on_from, nothing, UNSEEN),
    ("SIGKILL", "serve"): Expected(-9, who_it_is, its_record_when_it_expires, UNSEEN),
    ("SIGKILL", "coordinator"): Expected(-9, who_it_is_and_whom_it_met, nothing, UNSEEN),
    ("SIGKILL", "local"): Expected(-9, all_until_a_checkpoint_to_go_on_from, all_that_it_started, UNSEEN),
    ("SIGKILL", "local with faults"): Expected(-9, all_until_a_checkpoint_to_go_on_from, all_that_it_started, UNSEEN),
}


async def test_no_cell_is_empty() -> None:
    assert set(TABLE) == set(product(ENDS, (*MEMBERS, *SWARMS)))


@pytest.mark.parametrize("program", [*MEMBERS, *SWARMS])
async def test_how_a_program_ends(program: str, cells: Mapping[str, asyncio.Task[None]]) -> None:
    await cells[program]


async def check(how: str, program: str, case: Case) -> None:
    expected = TABLE[how, program]
    await case.due(how)
    case.program.remember_family()
    await end(case, how)
    code = await case.program.ended(within_s=3 * LEAVE_S if program in SWARMS else LEAVE_S)
    screen = case.program.screen
    assert code == expected.code, screen
    assert "Traceback" not in screen
    if expected.says:
        assert expected.says in screen
    else:
        assert not any(words in screen for words in (LEAVES, SAVED, GOES_ON, STOPS, LOST)), screen
    await expected.saved(case)
    await expected.withdrawn(case)


# The programs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ENDS)
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cells(how: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mapping[str, asyncio.Task[None]]]:
    """Program -> its `check`, which is over. All are started at the same time, and each ends as soon as it is due: a
    trainer takes what there is of processors from those that start still."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "run.toml").write_text(to_toml(RUN))
    (folder / "faults.toml").write_text(FAULTS)
    async with AsyncExitStack() as stack:
        members = asyncio.create_task(start_members(how, folder, stack))

        async def member(program: str, before: asyncio.Task[None] | None) -> None:
            case = (await members)[program]
            if before is not None:
                await asyncio.wait([before])
            await check(how, program, case)

        async def swarm(program: str) -> None:
            await check(how, program, await start_local(how, program, folder, stack))

        checks = {program: asyncio.create_task(swarm(program)) for program in SWARMS}
        before = None
        for program in MEMBERS:
            checks[program] = before = asyncio.create_task(member(program, before))
        await asyncio.wait(checks.values())
        yield checks


async def start(how: str, argv: tuple[str, ...], stack: AsyncExitStack, tmp: Path) -> Program:
    """A program that is to end as `how` says; one for SIGTERM by nohup, so that a SIGHUP before it changes nothing."""
    by = ("nohup",) if how == "SIGTERM" else ()
    return await stack.enter_async_context(on_screen(SCREENS.get(how, "pipe"), (*by, *argv), tmp=tmp))


def temporary(stack: AsyncExitStack) -> Path:
    """A folder whose name is short: sockets lie in there."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-")))


async def start_members(how: str, folder: Path, stack: AsyncExitStack) -> Mapping[str, Case]:
    """A coordinator, a peer with all experts, and a trainer, each on a screen of its own."""
    tmp, config = temporary(stack), folder / "run.toml"
    outs = {name: folder / name for name in ("coordinator", "serve", "train")}
    argv = module("moe_coordinator.cli", "serve", "--config", config, "--state", outs["coordinator"])
    coordinator = await start(how, argv, stack, tmp)
    begun = await coordinator.ready()
    join = str(begun["address"])
    watcher = await stack.enter_async_context(await DhtDiscovery.create(run=RUN.name, join=begun["dht"]))
    key = outs["serve"] / "key"
    argv = module("moe_peer.cli", "serve", "--join", join, "--threads", 1, "--identity", key)
    peer = await start(how, argv, stack, tmp)

    def train(steps: int) -> tuple[str, ...]:
        return trainer_spec(join, outs["train"], steps, "--go-on").argv

    trainer = await start(how, train(FOR_EVER), stack, tmp)
    serving = await peer.ready()
    members = {
        "coordinator": Case(program=coordinator, out=outs["coordinator"], tmp=tmp, address=join),
        "serve": Case(program=peer, out=outs["serve"], tmp=tmp, address=str(serving["address"])),
        "train": Case(program=trainer, out=outs["train"], tmp=tmp, checkpoint_every=10, again=train),
    }
    for case in members.values():
        case.watcher, case.peer_id = watcher, str(serving["peer_id"])
    return members


async def start_local(how: str, program: str, folder: Path, stack: AsyncExitStack) -> Case:
    tmp, out = temporary(stack), folder / program

    def command(steps: int, *source: object) -> tuple[str, ...]:
        faults = ("--faults", folder / "faults.toml") if program == "local with faults" else ()
        return module(
            "moe_coordinator.cli", "local", *source, "--out", out, "--steps", steps, "--peers", 1,
            "--sequences", SEQUENCES, "--max-data-mib", 1, *faults,
        )  # fmt: skip

    running = await start(how, command(FOR_EVER, "--config", folder / "run.toml"), stack, tmp)
    return Case(
        program=running, out=trainer_folder(out, 0), tmp=tmp, checkpoint_every=100,
        again=lambda steps: command(steps, "--resume", out),
    )  # fmt: skip
