"""A proxy between a client and a real HTTP server, which breaks the requests that a test chooses.

It forwards every byte as it came, so that signatures stay valid, and speaks HTTP/1.1 only as far as it must to know
where a message ends. Each request goes upstream over a connection of its own.
"""

import asyncio
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

ALWAYS = 1 << 30
_NO_BODY = {"204", "304"}


@dataclass(frozen=True)
class Request:
    """A request as the proxy saw it; `path` is decoded and keeps the query."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class LoseReply:
    """The server does as it was asked, and the connection ends without an answer; with `reset`, by a RST."""

    reset: bool = False


@dataclass(frozen=True)
class Reset:
    """The connection ends by a RST, and the server never hears of the request."""


@dataclass(frozen=True)
class Truncate:
    """The answer ends, with its connection, behind a fraction of its body."""

    fraction: float


@dataclass(frozen=True)
class Stall:
    """The answer never comes; with a fraction, its body never ends."""

    fraction: float | None = None


@dataclass(frozen=True)
class Trickle:
    """The body comes in ten pieces over so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Delay:
    """The request waits before it is forwarded."""

    seconds: float


@dataclass(frozen=True)
class Reply:
    """The proxy answers itself, as S3 would: `Reply(503, "SlowDown")`."""

    status: int
    code: str


@dataclass(frozen=True)
class Call:
    """Functions that are called before the request is forwarded, and when the server has answered.

    Everything else waits meanwhile. They may kill the client: what is under way then still arrives.
    """

    before: Callable[[Request], object] = lambda _: None
    after: Callable[[Request], object] = lambda _: None


Fault = LoseReply | Reset | Truncate | Stall | Trickle | Delay | Reply | Call


@dataclass
class Rule:
    """A fault and the requests that it is for; `hits` counts those that it has met."""

    fault: Fault
    method: str
    path: "re.Pattern[str]"
    first: int
    times: int
    seen: int = 0
    hits: int = 0

    def meets(self, request: Request) -> bool:
        if self.method not in {"", request.method} or not self.path.search(request.path):
            return False
        self.seen += 1
        met = self.first <= self.seen < self.first + self.times
        self.hits += met
        return met


@dataclass
class _Message:
    """The head of a request or an answer, and its body, both as they came."""

    head: bytes
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def start(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)


class FaultProxy:
    """A proxy that runs in a thread of its own while the context is open.

    Example:
        with FaultProxy(s3_url) as proxy:
            lost = proxy.inject(LoseReply(), method="PUT", path=r"part-00000")
            infermill.run(..., Options(endpoint_url=proxy.url))
        assert lost.hits == 1

    Attributes:
        requests: all that came, in this order.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.requests: list[Request] = []

    def __enter__(self) -> Self:
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = started.result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def inject(self, fault: Fault, method: str = "", path: str = "", first: int = 1, times: int = 1) -> Rule:
        """Break requests of this method (all: "") whose path has this regex in it: `times` of them from the `first`.

        The first rule that meets a request is the one that counts.
        """
        rule = Rule(fault, method, re.compile(path), first, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forward everything from here on."""
        with self._lock:
            self._rules.clear()

    def _fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            met = [rule.fault for rule in self._rules if rule.meets(request)]
        return met[0] if met else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._answer_one(reader, writer):
                pass
        writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        message = await _read_head(reader)
        if message.headers.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await _read_body(reader, message, has_body="content-length" in message.headers)
        method, target, _ = message.start
        request = Request(method, unquote(target), message.headers)
        match self._fault_for(request):
            case Reset():
                return _reset(writer)
            case Reply(status, code):
                answer = _scripted(status, code)
            case Stall(None):
                return await _until_the_client_is_gone(reader)
            case LoseReply(reset):
                await self._forward(message)
                return _reset(writer) if reset else False
            case Truncate(fraction) | Stall(float(fraction)) as fault:
                answer = await self._forward(message)
                writer.write(answer.head + answer.body[: int(len(answer.body) * fraction)])
                await writer.drain()
                return isinstance(fault, Stall) and await _until_the_client_is_gone(reader)
            case Trickle(seconds):
                answer = await self._forward(message)
                await _trickle(writer, answer, seconds)
                return True
            case Delay(seconds):
                await asyncio.sleep(seconds)
                answer = await self._forward(message)
            case Call(before, after):
                before(request)
                answer = await self._forward(message)
                after(request)
            case None:
                answer = await self._forward(message)
        writer.write(answer.head + answer.body)
        await writer.drain()
        return answer.headers.get("connection", "").lower() != "close"

    async def _forward(self, message: _Message) -> _Message:
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(message.head + message.body)
            answer = await _read_head(reader)
            while answer.start[1] == "100":
                answer = await _read_head(reader)
            has_body = message.start[0] != "HEAD" and answer.start[1] not in _NO_BODY
            await _read_body(reader, answer, has_body)
            return answer
        finally:
            writer.close()


async def _read_head(reader: asyncio.StreamReader) -> _Message:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:-2])
    return _Message(head, headers={name.strip().lower(): value.strip() for name, _, value in fields})


async def _read_body(reader: asyncio.StreamReader, message: _Message, has_body: bool) -> None:
    if message.headers.get("transfer-encoding", "").lower() == "chunked":
        size = -1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            message.body += line + await reader.readexactly(size + 2)
    elif has_body and "content-length" in message.headers:
        message.body = await reader.readexactly(int(message.headers["content-length"]))
    elif has_body:
        message.body = await reader.read()


def _scripted(status: int, code: str) -> _Message:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>told by the proxy</Message>'
        "<RequestId>0</RequestId></Error>"
    ).encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return _Message(head.encode(), body)


async def _trickle(writer: asyncio.StreamWriter, answer: _Message, seconds: float) -> None:
    writer.write(answer.head)
    step = len(answer.body) // 10 + 1
    for start in range(0, len(answer.body), step):
        await asyncio.sleep(seconds / 10)
        writer.write(answer.body[start : start + step])
        await writer.drain()


async def _until_the_client_is_gone(reader: asyncio.StreamReader) -> bool:
    while await reader.read(1 << 16):
        pass
    return False


def _reset(writer: asyncio.StreamWriter) -> bool:
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False
