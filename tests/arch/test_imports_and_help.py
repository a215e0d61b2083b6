"""Rules of the tree that no single module can keep by itself."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "hivemind", "grpc"}
HELP_LIMIT_S = 1.0
MAX_LINES = 500
GENERATED = "moe_net/proto/v1/"

COMMANDS = [
    ("moe_coordinator.cli", ()),
    ("moe_coordinator.cli", ("serve",)),
    ("moe_coordinator.cli", ("local",)),
    ("moe_coordinator.cli", ("proxy",)),
    ("moe_coordinator.cli", ("chaos",)),
    ("moe_coordinator.cli", ("fields",)),
    ("moe_peer.cli", ()),
    ("moe_peer.cli", ("serve",)),
    ("moe_peer.cli", ("train",)),
    ("moe_peer.cli", ("tokenizer",)),
    ("moe_peer.cli", ("health",)),
]

HELP = """
import json, sys
from importlib import import_module
try:
    import_module(sys.argv[1]).main()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def python_files() -> list[Path]:
    """The project's own Python files: tracked ones, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in sorted(names) if name and not name.startswith(GENERATED) and (ROOT / name).exists()]


@pytest.mark.parametrize(
    ("module", "command"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_help_answers_within_a_second_and_imports_nothing_heavy(module: str, command: tuple[str, ...]) -> None:
    # The one timing in the tests, because "--help in under a second" is a promise to users. The best of three counts:
    # a machine busy with something else makes single starts slow.
    took_s: list[float] = []
    while len(took_s) < 3 and (not took_s or min(took_s) >= HELP_LIMIT_S):
        started_s = time.perf_counter()
        answer = subprocess.run(
            [sys.executable, "-c", HELP, module, *command, "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        took_s.append(time.perf_counter() - started_s)
        assert answer.returncode == 0, answer.stderr
        assert "usage:" in answer.stdout
        loaded = set(json.loads(answer.stderr.splitlines()[-1]))
        assert not loaded & HEAVY
    assert min(took_s) < HELP_LIMIT_S


def test_imports_point_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("package", ["moe_net.types", "moe_net.config", "moe_net.model.config", "moe_net.optim"])
def test_what_a_command_line_needs_imports_no_torch(package: str) -> None:
    code = f"import sys, {package}\nassert not {HEAVY!r} & set(sys.modules), set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_stay_short_enough_to_read() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: n for name, n in lengths.items() if n >= MAX_LINES} == {}


def sets_exception(call: ast.AST) -> bool:
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "set_exception"


def handed_on(handler: ast.ExceptHandler, tree: ast.AST) -> bool:
    """The error is given whole to whoever awaits a future, whatever else the handler does: it ends with that."""
    call = handler.body[-1].value if isinstance(handler.body[-1], ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    if not any(isinstance(argument, ast.Name) and argument.id == handler.name for argument in call.args):
        return False
    if call.func.attr == "call_soon_threadsafe":  # from a thread, by a function of the same file
        settling = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and any(map(sets_exception, ast.walk(node)))
        }
        return isinstance(call.args[0], ast.Name) and call.args[0].id in settling
    return sets_exception(call)


def is_everything(kind: ast.AST | None) -> bool:
    return kind is None or ast.unparse(kind).rpartition(".")[2] in {"Exception", "BaseException"}


def broad_handlers(tree: ast.AST) -> list[int]:
    """Lines of handlers that catch everything, and neither raise it again nor hand it on; and of such a `suppress`."""
    lines: list[int] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "suppress":
            lines += [node.lineno] * any(map(is_everything, node.args))
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(map(is_everything, kinds))
        raised = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        left = any(isinstance(part, ast.Return | ast.Break | ast.Continue) for part in ast.walk(node))
        if broad and (left or not (raised or handed_on(node, tree))):
            lines.append(node.lineno)
    return lines


def test_nobody_catches_everything() -> None:
    found = {str(path.relative_to(ROOT)): broad_handlers(ast.parse(path.read_text())) for path in python_files()}
    # One boundary has to: kernels' packages of other versions fail in any way, and are left out.
    assert {name: len(lines) for name, lines in found.items() if lines} == {"moe_net/kernels/dispatch.py": 1}


def test_the_search_for_broad_handlers_finds_them() -> None:
    def found(handler: str, *body: str) -> bool:
        lines = ["try:", "  pass", f"{handler}:", *(f"  {line}" for line in body)]
        return broad_handlers(ast.parse("\n".join(lines))) == [3]

    assert found("except (OSError, Exception)", "pass")
    assert found("except", "pass")
    assert found("except builtins.Exception", "pass")
    assert broad_handlers(ast.parse("with contextlib.suppress(OSError, Exception):\n  pass")) == [1]
    assert not broad_handlers(ast.parse("with suppress(OSError):\n  pass"))
    assert not found("except BaseException", "raise")
    handler = "except Exception as e"
    assert not found(handler, "f.set_exception(e)")
    assert found(handler, "log.error(e)")
    assert found(handler, "if x:", "  return", "raise"), "not always raised"
    assert found(handler, "if x:", "  return", "f.set_exception(e)"), "not always handed on"
    assert found(handler, "if x:", "  f.set_exception(e)"), "only now and then"
    assert found(handler, "f.set_exception(x)"), "another error"
    assert found(handler, "loop.call_soon_threadsafe(log.error, e)"), "to nobody's future"


def calls(tree: ast.AST) -> set[str]:
    """Dotted names that are called."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of imported modules."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_nobody_sleeps_on_a_thread_or_unpickles() -> None:
    found: dict[str, set[str]] = {}
    for path in python_files():
        tree = ast.parse(path.read_text())
        forbidden = {"time.sleep", "torch.load", "torch.save"}
        if (ROOT / "docker" / "tests") in path.parents:
            forbidden -= {"time.sleep"}  # they ask docker's command line again and again, on no loop
        wrong = calls(tree) & forbidden | imported(tree) & {
            "pickle",
            "dill",
            "cloudpickle",
        }
        if wrong:
            found[str(path.relative_to(ROOT))] = wrong
    assert found == {}


def at_import(tree: ast.Module) -> list[ast.AST]:
    """Every node that runs at import: not what stands in functions."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def test_no_import_of_the_library_reads_the_environment_or_writes_files() -> None:
    found: dict[str, set[str]] = {}
    for path in python_files():
        name = str(path.relative_to(ROOT))
        if not name.startswith(("moe_net/", "peer/", "coordinator/")):
            continue
        nodes = at_import(ast.parse(path.read_text()))
        text = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute | ast.Name)}
        wrong = text & {"os.environ", "os.getenv", "os.putenv", "open", "os.makedirs", "logging.basicConfig"}
        if wrong:
            found[name] = wrong
    assert found == {}
