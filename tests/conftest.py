"""Fixtures that several test files share; servers are started when the first test asks for them."""

import functools
import json
import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import botocore.session
import pytest

from tests.clusters import StandaloneCluster, run_connect_server, run_standalone
from tests.fault_proxy import FaultProxy
from tests.mxnet_checkpoints import CARDS, card_of
from tests.servers import AuthServer, Bucket, ScriptedStore, connect, run_ministack, run_moto_with_authentication

NOBODY = 65534
MXNET_PYTHON = Path(__file__).parents[1] / ".make" / "mxnet" / "bin" / "python"
# They import MXNet, which only its own Python has.
collect_ignore = ["mxnet_operators.py", "mxnet_small.py", "mxnet_symbols.py", "mxnet_zoo.py"]
# Tests that were started in the background ignore Ctrl-C, and so would the commands that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server that takes every credential."""
    with run_ministack(tmp_path_factory.mktemp("ministack")) as url:
        yield url


@pytest.fixture(scope="session")
def moto_auth_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuthServer]:
    """An S3 server that refuses wrong credentials."""
    with run_moto_with_authentication(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def fast_boto3() -> Iterator[None]:
    """Let boto3 parse its description of S3 once rather than for every client: 5 ms instead of 60."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        yield


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fast_boto3: None) -> pytest.MonkeyPatch:
    """Credentials as environment variables, and nothing else that this machine knows of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    return monkeypatch


@pytest.fixture
def bucket(s3_server: str, aws_environment: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A new, empty bucket."""
    client = connect(s3_server)
    name = f"bucket-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    yield Bucket(s3_server, name, client)
    client.close()


@pytest.fixture
def fault_proxy(s3_server: str) -> Iterator[FaultProxy]:
    """The way to the S3 server on which a test can break requests."""
    with FaultProxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def scripted_store(aws_environment: pytest.MonkeyPatch) -> Iterator[ScriptedStore]:
    """A store that answers as a test tells it to."""
    store = ScriptedStore()
    yield store
    store.close()


@pytest.fixture
def careless_store(aws_environment: pytest.MonkeyPatch) -> Iterator[ScriptedStore]:
    """A store that ignores If-None-Match when it is written to."""
    store = ScriptedStore(honours_conditions=False)
    yield store
    store.close()


@pytest.fixture
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """While it is entered, file permissions count, even where the tests are run as root."""

    @contextmanager
    def as_nobody() -> Iterator[None]:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)

    return as_nobody if os.geteuid() == 0 else nullcontext


@pytest.fixture
def shared_path() -> Iterator[Path]:
    """A new folder like `tmp_path`, which others may enter, too."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneCluster]:
    """A standalone Spark cluster with two workers; a test that kills executors leaves the workers running."""
    with run_standalone(tmp_path_factory.mktemp("standalone")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def connect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Spark Connect server."""
    with run_connect_server(tmp_path_factory.mktemp("connect")) as url:
        yield url


@pytest.fixture(scope="session")
def mxnet_python() -> Path:
    """A Python that has the real MXNet: that of INFERMILL_MXNET_PYTHON, or the one that `make mxnet-env` installs."""
    python = Path(os.environ.get("INFERMILL_MXNET_PYTHON") or MXNET_PYTHON)
    if not python.is_file():
        pytest.skip(f"no MXNet: {python} is missing; `make mxnet-env` says why it cannot be installed")
    return python


@pytest.fixture(scope="session")
def small_checkpoints(mxnet_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of `mxnet_small`, a card for each, and MXNet's own answers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    subprocess.run([mxnet_python, Path(__file__).with_name("mxnet_small.py"), folder], check=True, capture_output=True)
    for name in CARDS:
        (folder / f"{name}.yaml").write_text(json.dumps(card_of(folder / name)))
    return folder
