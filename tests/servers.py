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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import boto3
import pytest

from infermill.stores import locate, open_store
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

    def put_many(self, keys: Sequence[str], content: bytes) -> None:
        """Many at once, and faster; only keys that object_store can name."""
        location = locate(self.uri)
        store = open_store(location, self.options)
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda key: store.put(key, content), keys):
                pass

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


def write_profile(environment: pytest.MonkeyPatch, tmp_path: Path, settings: str, region: str = REGION) -> None:
    """An AWS profile `mine`, in the configuration file that the fixture `aws_environment` names."""
    (tmp_path / "aws-config").write_text(f"[profile mine]\nregion = {region}\n{settings}\n")
    environment.delenv("AWS_REGION")


def credential_process(tmp_path: Path, access_key_id: str, secret_access_key: str) -> str:
    """The setting for a program that tells credentials, and writes down each time that it was asked."""
    program = tmp_path / "tell"
    told = f'{{"Version": 1, "AccessKeyId": "{access_key_id}", "SecretAccessKey": "{secret_access_key}"}}'
    program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho '{told}'\n")
    program.chmod(0o755)
    return f"credential_process = {program}"


@dataclass(frozen=True)
class Answer:
    """A scripted reply."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        # On one line, and with what a careless server would echo.
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{self.code}</Code><Message>told by a script</Message>'
            "<AWSAccessKeyId>AKIAECHOED</AWSAccessKeyId><StringToSign>echoed</StringToSign></Error>"
        ).encode()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64


class ScriptedStore:
    """GET, HEAD, PUT and DELETE of objects, and listings of one level, as S3 has them; a script says what goes wrong.

    Attributes:
        honours_conditions: whether a PUT with If-None-Match is refused where the object exists.
        conflicts: how many PUTs will be answered with 409, and done nothing about.
        lost_replies: how many PUTs will be answered with 503, and done all the same.
        objects: the content by `/bucket/key`.
        credentials: the access keys of all requests, None for one without.
    """

    def __init__(self, honours_conditions: bool = True) -> None:
        self.honours_conditions = honours_conditions
        self.conflicts = 0
        self.lost_replies = 0
        self.objects: dict[str, bytes] = {}
        self.credentials: list[str | None] = []
        self._answers: dict[str, deque[Answer]] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def options(self) -> StoreOptions:
        return StoreOptions(endpoint_url=f"http://127.0.0.1:{self._server.server_port}", region=REGION)

    def answer(self, path: str, answer: Answer, times: int = 1000, method: str = "") -> None:
        """Answer so to the next requests for `bucket/key`, of one method or of all, and do nothing about them."""
        self._answers[f"{method}/{path}"] = deque(repeat(answer, times))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, method: str, url: str, headers: Message, content: bytes) -> tuple[Answer, bytes]:
        path, query = unquote(url.partition("?")[0]), parse_qs(url.partition("?")[2])
        with self._lock:
            for scripted in (self._answers.get(path), self._answers.get(method + path)):
                if scripted:
                    answer = scripted.popleft()
                    return answer, answer.body
            if method == "PUT":
                return self._put(path, headers.get("If-None-Match"), content)
            if method == "POST":
                return self._delete_many(path, content)
            if path.rstrip("/").count("/") == 1 and "list-type" in query:
                return self._list(path.rstrip("/"), {name: values[0] for name, values in query.items()})
            return self._get(path, headers.get("Range"))

    def _list(self, bucket: str, query: Mapping[str, str]) -> tuple[Answer, bytes]:
        """A page of what lies directly below the prefix."""
        prefix = query.get("prefix", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        found = sorted(path for path in self.objects if path.startswith(f"{bucket}/{prefix}"))
        rest = [key for key in (path.removeprefix(f"{bucket}/") for path in found) if key > after]
        keys = rest[:1000]
        token = f"<NextContinuationToken>{keys[-1]}</NextContinuationToken>" if keys else ""
        more = str(len(rest) > len(keys)).lower()
        contents = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.objects[f'{bucket}/{key}'])}</Size><ETag>&quot;x&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
            if "/" not in key.removeprefix(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>{more}</IsTruncated>{token}{contents}</ListBucketResult>"
        return Answer(200, headers={"Content-Type": "application/xml"}), body.encode()

    def _put(self, path: str, condition: str | None, content: bytes) -> tuple[Answer, bytes]:
        answer = None
        if self.conflicts:
            self.conflicts -= 1
            answer = Answer(409, "ConditionalRequestConflict")
        elif condition and self.honours_conditions and path in self.objects:
            answer = Answer(412, "PreconditionFailed")
        else:
            self.objects[path] = content
            if self.lost_replies:
                self.lost_replies -= 1
                answer = Answer(503, "SlowDown")
        return (answer, answer.body) if answer else (Answer(200, headers=_describe(content)), b"")

    def _get(self, path: str, wanted: str | None) -> tuple[Answer, bytes]:
        content = self.objects.get(path)
        if content is None:
            missing = Answer(404, "NoSuchKey")
            return missing, missing.body
        if wanted is None:
            return Answer(200, headers=_describe(content)), content
        start, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        piece = content[start : end + 1]
        found = {"Content-Range": f"bytes {start}-{start + len(piece) - 1}/{len(content)}"}
        return Answer(206, headers=_describe(content) | found), piece

    def _delete_many(self, path: str, content: bytes) -> tuple[Answer, bytes]:
        keys = re.findall("<Key>([^<]*)</Key>", content.decode())
        for key in keys:
            self.objects.pop(f"{path.rstrip('/')}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        return Answer(200), f"<DeleteResult>{deleted}</DeleteResult>".encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
                store.credentials.append(signed[1] if signed else None)
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer, body = store._serve(self.command, self.path, self.headers, content)
                self.send_response(answer.status)
                for name, value in ({"Content-Length": str(len(body))} | dict(answer.headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    with suppress(ConnectionError):
                        self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = reply  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Nothing: the tests say what went wrong."""

        return Handler


def _describe(content: bytes) -> dict[str, str]:
    return {"ETag": f'"{sha256(content).hexdigest()}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
