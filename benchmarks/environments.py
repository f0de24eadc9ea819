"""An environment for each peer, with the versions that its program pins, in .make/peers; made once.

    python benchmarks/environments.py

What cannot be installed is no error: the table of results says so, and why.
"""

import hashlib
import os
import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = HERE / "peers"
ENVIRONMENTS = HERE.parent / ".make" / "peers"
HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a peer's Python is, or why there is none."""

    python: Path
    reason: str = ""
    versions: str = ""


def names() -> list[str]:
    """The peers: the programs that say what they need."""
    return [path.stem for path in sorted(PROGRAMS.glob("*.py")) if HEADER.search(path.read_text())]


def environment(name: str, install: bool = False) -> Environment:
    """The environment of a peer; made anew if asked, and where its pins are others than they were."""
    header = _header(PROGRAMS / f"{name}.py")
    folder = ENVIRONMENTS / name
    python, stamp, reason = folder / "bin" / "python", folder / "installed", ENVIRONMENTS / f"{name}.txt"
    digest = hashlib.sha256(repr(header).encode()).hexdigest()
    versions = ", ".join(pin.replace("==", " ") for pin in header["dependencies"])
    if stamp.exists() and stamp.read_text() == digest:
        return Environment(python, versions=versions)
    if install:
        ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
        reason.write_text(_install(folder, name, header))
        if not reason.read_text():
            stamp.write_text(digest)
            return Environment(python, versions=versions)
    return Environment(python, reason.read_text() if reason.exists() else "run benchmarks/environments.py", versions)


def _header(program: Path) -> dict[str, Any]:
    """A program's inline metadata (PEP 723)."""
    found = HEADER.search(program.read_text())
    if found is None:
        raise SystemExit(f"{program} does not say what it needs")
    return tomllib.loads("".join(line[2:] or "\n" for line in found[1].splitlines(keepends=True)))


def _install(folder: Path, name: str, header: dict[str, Any]) -> str:
    """Make the environment; return what went wrong, in a line, or nothing."""
    uv, program = os.environ.get("UV", "uv"), str(PROGRAMS / f"{name}.py")
    # uv does not read pip's settings: where pip finds wheels on this machine, uv shall, too.
    inherited = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", header["requires-python"], str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), "-r", program],
    ):
        done = subprocess.run(command, env=inherited | os.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            return " ".join(done.stderr.split())[:300]
    return ""


def main() -> None:
    for name in names():
        made = environment(name, install=True)
        print(f"{name}: {made.reason or made.versions}", flush=True)


if __name__ == "__main__":
    main()
