"""Object stores for the tests: real servers as child processes, and a scripted one for what real ones do rarely."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3

from infermill.types import StoreOptions

START_SECONDS = 60
REGION = "us-east-1"
USER = "reader"


@dataclass(frozen=True)
class Bucket:
    """A bucket on a server, and the way to it."""

    endpoint: str
    name: str
    client: Any

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    @property
    def options(self) -> StoreOptions:
        return StoreOptions(endpoint_url=self.endpoint, region=REGION)

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def keys(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name).get("Contents", ())]


@dataclass(frozen=True)
class AuthServer:
    """A server that checks signatures and policies; the user may list the bucket, and read all but `secret.jpg`."""

    endpoint: str
    bucket: str
    access_key_id: str
    secret_access_key: str

    @property
    def options(self) -> StoreOptions:
        return StoreOptions(endpoint_url=self.endpoint, region=REGION)


@contextmanager
def run_ministack(folder: Path) -> Iterator[str]:
    """An S3 server without authentication; the value is its URL."""
    port = free_port()
    settings = {
        "GATEWAY_PORT": str(port),
        "BIND_HOST": "127.0.0.1",
        "SERVICES": "s3",
        "LOG_LEVEL": "WARNING",
        "IOT_MTLS_ENABLED": "0",
        "TMPDIR": str(folder),
    }
    with _run([sys.executable, "-m", "ministack"], settings, port, folder / "ministack.log") as url:
        yield url


@contextmanager
def run_moto_with_authentication(folder: Path) -> Iterator[AuthServer]:
    """An S3 server that refuses whoever is not its one user."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _run(command, {"INITIAL_NO_AUTH_ACTION_COUNT": "1000"}, port, folder / "moto.log") as url:
        s3, iam = connect(url), connect(url, "iam")
        bucket = f"guarded-{uuid.uuid4().hex}"
        s3.create_bucket(Bucket=bucket)
        for key in ("open.jpg", "secret.jpg"):
            s3.put_object(Bucket=bucket, Key=key, Body=key.encode())
        allowed = {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"}
        denied = {"Effect": "Deny", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/secret.jpg"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed, denied]})
        iam.create_user(UserName=USER)
        iam.put_user_policy(UserName=USER, PolicyName="read", PolicyDocument=policy)
        key = iam.create_access_key(UserName=USER)["AccessKey"]
        require_authentication = urllib.request.Request(
            f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(require_authentication, timeout=START_SECONDS).close()
        yield AuthServer(url, bucket, key["AccessKeyId"], key["SecretAccessKey"])


def connect(url: str, service: str = "s3") -> Any:
    """A boto3 client for a server; its keys are those of the tests, whatever the environment says."""
    return boto3.client(
        service, endpoint_url=url, region_name=REGION, aws_access_key_id="testing", aws_secret_access_key="testing"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _run(command: list[str], settings: Mapping[str, str], port: int, log: Path) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=sink, stderr=subprocess.STDOUT)
        try:
            _wait_until_up(url, process, log)
            yield url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            answer.read()
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Answer:
    """A scripted reply: instead of the request's effect, or after it (`late`), as when the true reply is lost."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    late: bool = False

    @property
    def body(self) -> bytes:
        # On one line, and with what a careless server would echo.
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{self.code}</Code><Message>told by a script</Message>'
            "<AWSAccessKeyId>AKIAECHOED</AWSAccessKeyId><StringToSign>echoed</StringToSign></Error>"
        ).encode()


class ScriptedStore:
    """GET, HEAD, PUT and DELETE of objects as S3 has them, without listing.

    Args:
        honours_conditions: whether a PUT with If-None-Match is refused where the object exists.
    """

    def __init__(self, honours_conditions: bool = True) -> None:
        self.honours_conditions = honours_conditions
        self.objects: dict[str, bytes] = {}
        self.answers: dict[str, deque[Answer]] = {}
        self.credentials: list[str | None] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def options(self) -> StoreOptions:
        return StoreOptions(endpoint_url=f"http://127.0.0.1:{self._server.server_port}", region=REGION)

    def answer(self, path: str, *answers: Answer) -> None:
        """Give these answers, one after the other, to requests for `bucket/key`; the last one for ever."""
        self.answers[f"/{path}"] = deque(answers)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, method: str, path: str, condition: str | None, content: bytes) -> tuple[Answer, bytes]:
        with self._lock:
            scripted = self.answers.get(path)
            answer = None
            if scripted:
                answer = scripted.popleft() if len(scripted) > 1 else scripted[0]
                if not answer.late:
                    return answer, answer.body
            done = self._done(method, path, condition, content)
            return (answer, answer.body) if answer else done

    def _done(self, method: str, path: str, condition: str | None, content: bytes) -> tuple[Answer, bytes]:
        known = self.objects.get(path)
        if method == "PUT":
            if condition and self.honours_conditions and known is not None:
                refusal = Answer(412, "PreconditionFailed")
                return refusal, refusal.body
            known = self.objects[path] = content
        elif known is None:
            missing = Answer(404, "NoSuchKey")
            return missing, missing.body
        elif method == "DELETE":
            del self.objects[path]
            return Answer(204), b""
        headers = {"ETag": f'"{sha256(known).hexdigest()}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        return Answer(200, headers=headers), b"" if method == "PUT" else known

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
                store.credentials.append(signed[1] if signed else None)
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = unquote(self.path.partition("?")[0])
                answer, body = store._serve(self.command, path, self.headers.get("If-None-Match"), content)
                self.send_response(answer.status)
                for name, value in ({"Content-Length": str(len(body))} | dict(answer.headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    with suppress(ConnectionError):
                        self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_DELETE = reply

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Nothing: the tests say what went wrong."""

        return Handler
