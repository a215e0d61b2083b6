"""Generate moe_net/proto/v1 from protos/; with --check, fail when the committed code differs."""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "protos"
PACKAGE = Path("moe_net/proto/v1")


def generate(out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py for every proto below `out`."""
    # protoc finds the mypy plug-in on PATH; it lies beside the running interpreter.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    includes = Path(str(protoc.__file__)).parent / "_proto"
    names = sorted(str(path.relative_to(SOURCES)) for path in (SOURCES / PACKAGE).glob("*.proto"))
    arguments = ["protoc", f"-I{SOURCES}", f"-I{includes}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    if protoc.main([*arguments, *names]) != 0:
        raise SystemExit("protoc failed")
    for path in (out / PACKAGE).glob("*_pb2_grpc.py*"):
        if "Servicer" not in path.read_text():
            path.unlink()  # no service in this file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed code, write nothing")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {p.name for p in (Path(folder) / PACKAGE).iterdir()}
        committed = {p.name for p in (ROOT / PACKAGE).glob("*_pb2*")}
        common = sorted(fresh & committed)
        _, changed, _ = filecmp.cmpfiles(Path(folder) / PACKAGE, ROOT / PACKAGE, common, shallow=False)
        drifted = sorted({*changed, *(fresh ^ committed)})
    if drifted:
        raise SystemExit(f"generated code differs from protos/: {', '.join(drifted)}. Run `make protos`.")
    print("generated code matches protos/")


if __name__ == "__main__":
    main()
