"""What this process may use of the machine, by its affinity and its control groups: cores and memory.

Control groups of both versions count, with the groups above them: cgroup v2
(https://docs.kernel.org/admin-guide/cgroup-v2.html), and v1 with the controllers `cpu` and `memory`.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

PROC = Path("/proc")
Controller = Literal["cpu", "memory"]
_ESCAPE = re.compile(r"\\([0-7]{3})")


class _Group(NamedTuple):
    """The files of a control group."""

    folder: Path
    is_v2: bool


def usable_cores(proc: Path = PROC) -> int:
    """The cores that this process may run on, at least 1; a limit of 1.5 cores is 2, each of them held up at times.

    Args:
        proc: where Linux shows its processes.

    Example:
        >>> usable_cores() >= 1
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits: list[float] = [cores]
    for group in _groups(proc, "cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            limits.append(_cores_of(group))
    return max(math.ceil(min(limits)), 1)


def _cores_of(group: _Group) -> float:
    if group.is_v2:
        quota, period = (group.folder / "cpu.max").read_text().split()
    else:
        quota, period = ((group.folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    cores = math.inf if quota == "max" else int(quota) / int(period)
    return cores if cores > 0 else math.inf  # -1: there is none


def free_memory(proc: Path = PROC) -> int | None:
    """The bytes that this process can still take before the system or a control group runs out; None: not known.

    Args:
        proc: where Linux shows its processes.

    Example:
        >>> free_memory()  # doctest: +SKIP
        6120328192
    """
    free: list[int] = []
    with suppress(OSError, ValueError, KeyError):
        free.append(int(_fields(proc / "meminfo")["MemAvailable:"]) * 1024)
    for group in _groups(proc, "memory"):
        with suppress(OSError, ValueError, KeyError):
            free.append(_memory_of(group))
    return max(min(free), 0) if free else None


def _memory_of(group: _Group) -> int:
    limit, used, cache = (
        ("memory.max", "memory.current", "inactive_file")
        if group.is_v2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    left = int((group.folder / limit).read_text()) - int((group.folder / used).read_text())  # ValueError: max
    return left + int(_fields(group.folder / "memory.stat")[cache])  # which the kernel takes back first


def _fields(path: Path) -> dict[str, str]:
    return {words[0]: words[1] for line in path.read_text().splitlines() if len(words := line.split()) > 1}


def _groups(proc: Path, controller: Controller) -> Iterator[_Group]:
    """The control groups that this process is in, for one controller, and those above them."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except (OSError, ValueError):  # no Linux
        return
    paths = {names: path for _, names, path in (line.split(":", 2) for line in lines if line.count(":") > 1)}
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        where, kind = before.split(" "), after.split(" ")
        if len(where) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        is_v2 = kind[0] == "cgroup2"
        for names, path in paths.items():
            is_of_mount = controller in names.split(",") and controller in kind[2].split(",")
            if names == "" if is_v2 else is_of_mount:
                for group in _upwards(_unescaped(where[3]), path):
                    yield _Group(Path(_unescaped(where[4]), group), is_v2)


def _upwards(root: str, path: str) -> Iterator[PurePosixPath]:
    """A group and those above it, from the place where `root` is mounted: in a container, that may be the group."""
    below = PurePosixPath(path)
    below = below.relative_to(root) if below.is_relative_to(root) else PurePosixPath()
    if ".." in below.parts:  # above what is mounted here
        below = PurePosixPath()
    yield from (below, *below.parents)


def _unescaped(path: str) -> str:
    """A path of mountinfo, where spaces are written \\040."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), path)
