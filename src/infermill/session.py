"""The Spark session that `--master`, `--remote` and `--conf` ask for."""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pyspark
from py4j.protocol import Py4JError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from infermill.errors import InfermillError, UsageError
from infermill.java import Java, find_java
from infermill.limits import usable_cores
from infermill.types import Options

CONNECT_PORT = 15_002
_CONNECT_SECONDS = 10.0
HANDSHAKE_SECONDS = 30.0
"For a Connect server to speak; Spark itself would ask what does not for ten minutes."
_STDERR = 2
_LOGGING = Path(__file__).with_name("log4j2.properties")


def spark_session(options: Options) -> AbstractContextManager[SparkSession]:
    """A context in which Spark is started, or connected to; what can be told before, is told at once.

    A session that this process has already is taken as it is where no option asks for another one.

    Raises:
        UsageError: a `--conf` is not `key=value`, Spark refuses a setting, or this process has a session and another
            one is asked for.
        InfermillError: there is no Java, or Spark does not start, or nothing answers at `--remote` or `--master`.
    """
    conf = parsed_conf(options.conf)
    active = SparkSession.getActiveSession()
    if active is not None:
        if options.master or options.remote or conf:
            raise UsageError(
                "this process has a Spark session, and can have no other",
                "pass it as engine=session, or stop it first",
            )
        return nullcontext(active)
    return _ending(_connector(options.remote, conf) if options.remote else _starter(options.master or "local[*]", conf))


@contextmanager
def _ending(start: Callable[[], SparkSession]) -> Iterator[SparkSession]:
    """What is started ends with the context."""
    with ExitStack() as ending:
        if SparkContext._gateway is None:
            ending.callback(_end_java)
        # A remote session leaves it, and no other can start with it.
        ending.callback(os.environ.pop, "SPARK_CONNECT_MODE_ENABLED", None)
        session = start()
        ending.callback(session.stop)
        yield session


def _end_java() -> None:
    """End the JVM, which a session leaves behind, and which would give its settings to the next one."""
    gateway = SparkContext._gateway
    if gateway is not None:
        gateway.shutdown()
        gateway.proc.stdin.close()
        gateway.proc.wait()
        SparkContext._gateway = SparkContext._jvm = None


def parsed_conf(settings: tuple[str, ...]) -> dict[str, str]:
    """`("spark.executor.cores=4",)` as a mapping.

    Raises:
        UsageError: one is not `key=value`.

    Example:
        >>> parsed_conf(("spark.executor.cores=4",))
        {'spark.executor.cores': '4'}
    """
    pairs = [setting.partition("=") for setting in settings]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise UsageError(f"--conf {key} is not key=value", "write --conf spark.executor.cores=4")
    return {key: value for key, _, value in pairs}


def _connector(remote: str, conf: Mapping[str, str]) -> Callable[[], SparkSession]:
    address = re.match(r"sc://(\[[^]]*\]|[^:/;]+)(?::(\d+))?(?=[/;]|$)", remote)
    if address is None:
        raise UsageError(f"--remote {remote.partition(';')[0]} is no Spark Connect server", "write sc://HOST:15002")
    # Spark itself would ask for ten minutes.
    _reach(
        [f"{address[1]}:{address[2] or CONNECT_PORT}"],
        "Spark Connect server",
        "start one with sbin/start-connect-server.sh of Spark or of the package pyspark, or check --remote",
    )
    return partial(_connect, remote, conf, f"--remote {address[0]}")


def _connect(remote: str, conf: Mapping[str, str], where: str) -> SparkSession:
    _greet(remote, where)
    session = _built(SparkSession.builder.remote(remote), {}, where)
    for key, value in conf.items():  # the builder would only warn where the server refuses one
        try:
            session.conf.set(key, value)
        except PySparkException as error:
            session.stop()
            raise UsageError(
                f"{where} does not take --conf {key}: {first_line(error)}",
                "set it where the server is started; a client sets what begins with spark.sql, and not all of that",
            ) from None
    return session


def _greet(remote: str, where: str) -> None:
    """Raise InfermillError where what listens is no Spark Connect server."""
    try:
        from grpc import FutureTimeoutError, channel_ready_future
        from pyspark.sql.connect.client import DefaultChannelBuilder

        channel = DefaultChannelBuilder(remote).toChannel()
    except ImportError as error:
        raise UsageError(
            f"Spark Connect cannot be used: {first_line(error)}", "pip install 'infermill[spark]'"
        ) from None
    except PySparkException as error:
        raise UsageError(f"Spark does not start with {where}: {first_line(error)}", _HINT) from None
    try:
        channel_ready_future(channel).result(HANDSHAKE_SECONDS)
    except FutureTimeoutError:
        raise InfermillError(
            f"what listens at {where} does not answer as a Spark Connect server",
            "check the port, which is 15002 where nothing else is set, and use_ssl; a spark:// address is for --master",
        ) from None
    finally:
        channel.close()


def _reach(places: Iterable[str], what: str, hint: str) -> None:
    """Raise InfermillError where nothing listens at any of these `host:port`."""
    reasons = []
    for place in places:
        host, _, port = place.rpartition(":")
        if not port.isdecimal():
            raise UsageError(f"{place} is no host:port", "write spark://one:7077,other:7077")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            reasons.append(f"{place}: {error.strerror or error}")
        else:
            return
    raise InfermillError(f"no {what} answers at {', '.join(reasons)}", hint) from None


def _starter(master: str, conf: Mapping[str, str]) -> Callable[[], SparkSession]:
    java = find_java()
    if re.fullmatch(r"spark://[^/]+:\d+", master):  # Spark itself would ask for a minute
        masters = master.removeprefix("spark://").split(",")
        start = "spark-class org.apache.spark.deploy.master.Master --host NAME"
        _reach(masters, "Spark master", f"start one with `{start}`, or check --master")
    return partial(_start, master, conf, java)


def _start(master: str, conf: Mapping[str, str], java: Java) -> SparkSession:
    defaults = {
        "spark.app.name": "infermill",
        "spark.driver.defaultJavaOptions": f"-Dlog4j2.configurationFile={_LOGGING.as_uri()}",
        "spark.ui.showConsoleProgress": "false",
    }
    environment = {"JAVA_HOME": str(java.home)}
    cores = local_cores(master)
    if cores is not None:
        # One task at a time, whose worker has all cores; and nothing that listens is seen from outside.
        defaults |= {
            "spark.task.cpus": str(cores),
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
        }
        environment |= {"SPARK_LOCAL_IP": "127.0.0.1"}
    elif "spark.executor.cores" in conf:
        defaults |= {"spark.task.cpus": conf["spark.executor.cores"]}
    if "spark.pyspark.python" in conf:  # which only spark-submit would read
        environment |= {"PYSPARK_PYTHON": conf["spark.pyspark.python"]}
    elif master.startswith("local"):
        environment |= {"PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable)}
    settings = {**defaults, **conf, "spark.master": master}
    with _environment(environment):
        _start_java(settings, f"--master {master}")
        return _built(SparkSession.builder, settings, f"--master {master}")


def _start_java(settings: Mapping[str, str], what: str) -> None:
    """Start the JVM that a classic session is in; what it says before it gives up becomes an error."""
    if SparkContext._gateway is not None:
        return
    reading, writing = os.pipe()
    said = _JavaErrors(reading)
    said.start()
    try:
        gateway = launch_gateway(SparkConf(loadDefaults=False).setAll(list(settings.items())), {"stderr": writing})
    except PySparkException as error:
        os.close(writing)
        # This Java has started before; what it was given now are the settings.
        raise UsageError(f"Spark does not start with {what}: {said.reason() or error}", _SETTINGS_HINT) from None
    os.close(writing)
    said.show()
    SparkContext._ensure_initialized(gateway=gateway)


class _JavaErrors(threading.Thread):
    """Standard error of a JVM: kept back until it is known whether it starts, then passed on."""

    def __init__(self, reading: int) -> None:
        super().__init__(name="java-errors", daemon=True)
        self._reading = reading
        self._lock = threading.Lock()
        self._kept: list[bytes] | None = []

    def run(self) -> None:
        with os.fdopen(self._reading, "rb") as lines:
            for line in lines:
                with self._lock:
                    if self._kept is None:
                        os.write(_STDERR, line)
                    else:
                        self._kept.append(line)

    def show(self) -> None:
        """Pass on what was said, and what will be."""
        with self._lock:
            for line in self._kept or ():
                os.write(_STDERR, line)
            self._kept = None

    def reason(self) -> str:
        """Why it has ended, in a line."""
        self.join()
        text = b"".join(self._kept or ()).decode(errors="replace").strip()
        exception = re.search(r'^Exception in thread "main" (?:[\w.$]+: )?(.+)', text, re.MULTILINE)
        return exception[1] if exception else text.partition("\n")[0]


def local_cores(master: str) -> int | None:
    """The cores of `local[N]`, whose executor is the driver itself; None for a cluster.

    Example:
        >>> [local_cores(master) for master in ("local", "local[4]", "local[4, 2]", "local-cluster[2,1,1024]", "yarn")]
        [1, 4, 4, None, None]
    """
    found = re.fullmatch(r"local(?:\[\s*(\*|\d+)\s*(?:,[^]]*)?\])?", master)
    if found is None:
        return None
    return usable_cores() if found[1] == "*" else int(found[1] or 1)


def _built(builder: SparkSession.Builder, conf: Mapping[str, str], what: str) -> SparkSession:
    for key, value in conf.items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except (PySparkException, Py4JError, OSError, RuntimeError) as error:
        causes = re.findall(r"^Caused by: (.+)", str(error), re.MULTILINE)
        raise start_error(what, causes[-1] if causes else first_line(error)) from None


def start_error(what: str, reason: str) -> InfermillError:
    """Why Spark does not start with `--master …`, and what to do, by what it says itself.

    Example:
        >>> start_error("--master local[2]", "The number of cores has to be >= 3")
        UsageError('Spark does not start with --master local[2]: The number of cores has to be >= 3')
    """
    if "stopped SparkContext" in reason:  # what a master does not understand, it does not answer
        return InfermillError(
            f"Spark does not start with {what}, which does not answer PySpark {pyspark.__version__} as a master would",
            "the driver's PySpark must have the cluster's version, which the master's web page says: "
            "pip install 'pyspark[connect]==…'",
        )
    message = f"Spark does not start with {what}: {reason}"
    if _SETTING.search(reason):
        return UsageError(message, _SETTINGS_HINT)
    return InfermillError(message, _HINT)


_HINT = "check the address and the settings; `infermill doctor` says which Java is used"
_SETTINGS_HINT = "check --master, and the setting that this is about: --conf key=value, or spark-defaults.conf"
# How Spark and Java speak of a value that cannot be right, rather than of what does not answer.
_SETTING = re.compile(r"IllegalArgumentException|NumberFormatException| has to be | must be |master URL", re.IGNORECASE)

_LOST_TASK = re.compile(r"^.* most recent failure: Lost task \S+ in stage \S+ \(TID \d+\) \([^)]*\): ")


def first_line(error: BaseException) -> str:
    """The line of what Spark raises that says what happened: Python's, or Java's, or the first.

    Example:
        >>> first_line(RuntimeError("It failed:\\nTraceback (most recent call last):\\n  File …\\nValueError: no"))
        'ValueError: no'
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    tracebacks = [at for at, line in enumerate(lines) if line.startswith("Traceback ")]
    if tracebacks:
        raised = [line for line in lines[tracebacks[0] + 1 :] if not line.startswith(" ")]
        return raised[0] if raised else lines[0]
    java = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    return _LOST_TASK.sub("", (java or lines or [type(error).__name__])[0])


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What Spark reads from the environment when it starts."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for key in variables:
            if key in before:
                os.environ[key] = before[key]
            else:
                os.environ.pop(key, None)
