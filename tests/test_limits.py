"""The limits of control groups, in trees of files as Linux shows them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infermill.limits import free_memory, usable_cores

MANY = 64


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))


def proc(tmp_path: Path, groups: str, *mounts: str) -> Path:
    folder = tmp_path / "proc" / "self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))
    return folder.parent


def v2_mount(tmp_path: Path, root: str = "/") -> str:
    where = str(tmp_path / "v2").replace(" ", "\\040")
    return f"31 23 0:28 {root} {where} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def v1_mount(tmp_path: Path, root: str = "/") -> str:
    return f"32 31 0:29 {root} {tmp_path}/v1 rw,relatime - cgroup cgroup rw,cpu,cpuacct,memory"


def write_v2(tmp_path: Path, group: str, content: str) -> None:
    folder = tmp_path / "v2" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(content)


def write_v1(tmp_path: Path, group: str, quota: int, period: int = 100_000) -> None:
    folder = tmp_path / "v1" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("max 100000\n", MANY),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("6400000 50000\n", MANY),  # 128
        ("nonsense\n", MANY),
        ("1 0\n", MANY),
        ("", MANY),
    ],
)
def test_the_quota_of_the_group_counts(tmp_path: Path, content: str, cores: int) -> None:
    write_v2(tmp_path, "job", content)
    assert usable_cores(proc(tmp_path, "0::/job\n", v2_mount(tmp_path))) == cores


def test_the_narrowest_of_the_groups_above_counts(tmp_path: Path) -> None:
    write_v2(tmp_path, "slice/pod/container", "max 100000\n")
    write_v2(tmp_path, "slice/pod", "300000 100000\n")
    write_v2(tmp_path, "slice", "800000 100000\n")
    assert usable_cores(proc(tmp_path, "0::/slice/pod/container\n", v2_mount(tmp_path))) == 3


def test_in_a_container_its_own_group_is_the_top(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    write_v2(folder, ".", "400000 100000\n")
    folder = proc(folder, "0::/\n", v2_mount(folder))
    assert usable_cores(folder) == 4


@pytest.mark.parametrize("group", ["/../other", "/elsewhere"])
def test_a_group_outside_of_what_is_mounted_has_the_limits_of_the_top(tmp_path: Path, group: str) -> None:
    write_v2(tmp_path, ".", "200000 100000\n")
    assert usable_cores(proc(tmp_path, f"0::{group}\n", v2_mount(tmp_path))) == 2


def test_quotas_of_version_1(tmp_path: Path) -> None:
    groups = "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n0::/\n"
    write_v1(tmp_path, "docker/abc", 250_000)
    write_v1(tmp_path, ".", -1)
    assert usable_cores(proc(tmp_path, groups, v1_mount(tmp_path))) == 3


def test_version_1_in_a_container_that_sees_the_path_of_its_host(tmp_path: Path) -> None:
    write_v1(tmp_path, ".", 100_000)
    groups = "3:cpu,cpuacct:/docker/abc\n"
    assert usable_cores(proc(tmp_path, groups, v1_mount(tmp_path, "/docker/abc"))) == 1


def test_other_controllers_and_file_systems_do_not_count(tmp_path: Path) -> None:
    write_v1(tmp_path, ".", 100_000)
    mounts = (f"32 31 0:29 / {tmp_path}/v1 rw - cgroup cgroup rw,cpuset", "33 1 0:30 / /tmp rw - tmpfs tmpfs rw", "odd")
    assert usable_cores(proc(tmp_path, "3:cpuset:/\n2:cpu:/\n", *mounts)) == MANY


def test_a_system_without_control_groups_has_its_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none") == MANY


def test_affinity_counts() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from infermill.limits import usable_cores; print(usable_cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "1\n"


GIB = 1 << 30


def write_memory(group: Path, v1: bool, limit: str, used: int, cache: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
    (group / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\n{'total_inactive_file' if v1 else 'inactive_file'} {cache}\n")


def test_free_memory_is_what_the_narrowest_group_leaves(tmp_path: Path) -> None:
    folder = proc(tmp_path, "3:cpu,cpuacct,memory:/job\n0::/job\n", v2_mount(tmp_path), v1_mount(tmp_path))
    assert free_memory(folder) is None
    (folder / "meminfo").write_text("MemTotal:  33554432 kB\nMemAvailable:   8388608 kB\nHugePages_Total: 0\n")
    assert free_memory(folder) == 8 * GIB
    write_memory(tmp_path / "v2" / "job", v1=False, limit="max", used=GIB, cache=0)
    assert free_memory(folder) == 8 * GIB
    write_memory(tmp_path / "v2", v1=False, limit=str(4 * GIB), used=2 * GIB, cache=GIB)
    assert free_memory(folder) == 3 * GIB
    write_memory(tmp_path / "v1" / "job", v1=True, limit=str(2 * GIB), used=GIB, cache=0)
    assert free_memory(folder) == GIB
    write_memory(tmp_path / "v1" / "job", v1=True, limit=str(GIB), used=2 * GIB, cache=0)
    assert free_memory(folder) == 0


def test_this_machine_has_memory() -> None:
    assert (free_memory() or 0) > 0
