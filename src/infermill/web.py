"""http:// and https:// objects of a manifest: from hosts that the user allowed, at addresses that may be reached.

    URL ─► host allowed? ─► name resolved ─► address public, or allowed? ─► connection to that very address ─► GET
            ▲                                                                                                   │
            └──────────────── a redirect, at most five times and never from https to http ◄─────────────────────┘

What a name means is looked up once for each connection, and the connection goes to the address that was checked: a
name server that answers differently the second time gains nothing.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import quote, urljoin

from infermill.errors import BadInputError, StoreError, UsageError
from infermill.hosts import SAFE, AllowList, Target, target_of
from infermill.patience import patiently
from infermill.types import StoreOptions

MAX_REDIRECTS = 5
CONNECT_SECONDS = 5.0
STALLED_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 1 << 14
MAX_IDLE_CONNECTIONS = 64
# What may be read of a body of unknown length before memory is reserved for the largest that there can be.
UNRESERVED_BYTES = 1 << 20
CHUNK_BYTES = 1 << 18
_HEADERS = {"User-Agent": "infermill", "Accept": "*/*", "Accept-Encoding": "identity"}
_REDIRECTS = {301, 302, 303, 307, 308}
_TRANSIENT = {408, 425, 429}
Fetch = Callable[[str, str | None, Callable[[int], object]], bytearray]
Made = TypeVar("Made")


def web_fetcher(options: StoreOptions, max_bytes: int) -> Fetch:
    """A function that fetches URLs, for many threads at once: url, etag or None, and `reserve` as in fetch.Fetch.

    It raises BadInputError where the object is missing, changed, unreadable, larger than `max_bytes`, where a
    redirect or an address is not permitted, or where its server fails while others answer; StoreError where no server
    answers until the deadline; and UsageError where the host of the URL is not allowed.
    """
    client = _Client(options, max_bytes)

    def fetch(url: str, etag: str | None, reserve: Callable[[int], object]) -> bytearray:
        target = target_of(url)
        client.allowed.check(target)
        reserved = _Reserved(reserve)

        def ask() -> bytearray:
            return client.follow(target, lambda response: client.whole(response, etag, reserved))

        try:
            # A dead server is not waited for again and again: its other objects are likely to fail, too.
            content = ask() if target.label in client.failing else patiently(ask, target.shown, options)
        except _FaultError as fault:
            raise client.judge(fault, target) from None
        client.saw(target)
        return content

    weakref.finalize(fetch, client.close)
    return fetch


class _FaultError(ConnectionError):
    """The server or the way to it is at fault; the same request may succeed later."""


class _Reserved:
    """Reserves memory once, however often an object has to be asked for."""

    def __init__(self, reserve: Callable[[int], object]) -> None:
        self._reserve = reserve
        self._size: int | None = None

    def take(self, size: int) -> None:
        if self._size is None:
            self._size = size
            self._reserve(size)
        elif size > self._size:
            raise BadInputError("fetch", "changed", "its length changed while it was fetched")


class _Connection(http.client.HTTPConnection):
    """A connection to one address, whatever the name of the host comes to mean."""

    def __init__(self, target: Target, address: str, tls: ssl.SSLContext | None, stalled_seconds: float) -> None:
        super().__init__(target.host, target.port, timeout=stalled_seconds)
        self._address = address
        self._tls = tls

    def connect(self) -> None:
        seconds = self.timeout or 0.0
        self.sock = socket.create_connection((self._address, self.port), min(CONNECT_SECONDS, seconds))
        self.sock.settimeout(seconds)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


class _Client:
    """Connections that are kept for the next object of the same host, and the rules for where they may lead."""

    def __init__(self, options: StoreOptions, max_bytes: int) -> None:
        self.allowed = AllowList(options.allow_host)
        self.failing: set[str] = set()
        "The hosts that never answered, while others did."
        self._stalled_seconds = min(STALLED_SECONDS, options.store_deadline / 3)
        self._max_bytes = max_bytes
        self._answering: dict[str, Target] = {}
        self._idle: list[tuple[tuple[str, str, int], _Connection]] = []
        self._lock = threading.Lock()
        self._tls = cache(ssl.create_default_context)

    def close(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop()[1].close()

    def saw(self, target: Target) -> None:
        """Remember an object that was read."""
        with self._lock:
            self._answering[target.label] = target
            self.failing.discard(target.label)

    def judge(self, fault: _FaultError, target: Target) -> Exception:
        """What a fault means: a row where another object can be read (of this host, if one ever was), or the end."""
        problem = f"{target.shown} does not answer: {fault}"
        with self._lock:
            witness = self._answering.get(target.label) or next(iter(self._answering.values()), None)
        try:
            if witness is not None and self.follow(witness, lambda response: response.status == 200):
                if witness.label != target.label:
                    self.failing.add(target.label)
                return BadInputError("fetch", "store", f"while others are read, {problem}")
        except (_FaultError, BadInputError):
            pass
        return StoreError(problem, "check the network and the server, then run the same command again")

    def follow(self, target: Target, use: Callable[[http.client.HTTPResponse], Made]) -> Made:
        """What `use` makes of the reply, after redirects."""
        for _ in range(MAX_REDIRECTS + 1):
            with self._exchange(target) as response:
                if response.status not in _REDIRECTS:
                    return use(response)
                response.read(CHUNK_BYTES)
                target = self._redirected(target, response.getheader("Location", ""))
        raise _unreadable(f"it is redirected more than {MAX_REDIRECTS} times")

    def _redirected(self, target: Target, location: str) -> Target:
        base = f"{target.scheme}://{target.label}{target.path}"
        try:
            following = target_of(urljoin(base, quote(location, safe=SAFE + "#", encoding="latin-1")))
        except (UsageError, ValueError):
            raise _unreadable("it is redirected to what is no URL, or holds a password") from None
        if target.scheme == "https" and following.scheme == "http":
            raise _unreadable(f"it is redirected from https:// to http:// on {following.label}")
        if not self.allowed.permits(following):
            raise _unreadable(f"it is redirected to {following.label}, which --allow-host does not name")
        return following

    @contextmanager
    def _exchange(self, target: Target) -> Iterator[http.client.HTTPResponse]:
        """The reply to one request; its connection is kept when the reply has been read to its end."""
        key = (target.scheme, target.host, target.port)
        with ExitStack() as cleanup:
            try:
                connection, response = self._requested(key, target)
                cleanup.callback(connection.close)
                with closing(response):
                    yield response
                    is_reusable = response.isclosed() and connection.sock is not None
            except (OSError, http.client.HTTPException) as error:
                raise _fault(error, target) from None
            if is_reusable:
                cleanup.pop_all()
                self._keep(key, connection)

    def _requested(self, key: tuple[str, str, int], target: Target) -> tuple[_Connection, http.client.HTTPResponse]:
        kept = self._take(key)
        if kept is not None:
            with suppress(OSError, http.client.HTTPException):  # a server may close a connection that rests
                return kept, _request(kept, target)
        connection = self._connected(target)
        return connection, _request(connection, target)

    def _take(self, key: tuple[str, str, int]) -> _Connection | None:
        with self._lock:
            for number in reversed(range(len(self._idle))):
                if self._idle[number][0] == key:
                    return self._idle.pop(number)[1]
        return None

    def _keep(self, key: tuple[str, str, int], connection: _Connection) -> None:
        with self._lock:
            self._idle.append((key, connection))
            if len(self._idle) > MAX_IDLE_CONNECTIONS:
                self._idle.pop(0)[1].close()

    def _connected(self, target: Target) -> _Connection:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        permitted = [one for one in addresses if self.allowed.permits_address(ipaddress.ip_address(one), target)]
        if not permitted:
            raise _unreadable(
                f"{target.host} has the address {addresses[0]}, which is neither public nor named by --allow-host"
            )
        tls = self._tls() if target.scheme == "https" else None
        problem: OSError = OSError("it has no address")
        for address in permitted:
            connection = _Connection(target, address, tls, self._stalled_seconds)
            try:
                connection.connect()
            except OSError as error:
                connection.close()
                problem = error
            else:
                return connection
        raise problem

    def whole(self, response: http.client.HTTPResponse, etag: str | None, reserved: _Reserved) -> bytearray:
        """The object that the reply holds, all of it."""
        _check(response, etag)
        length = response.length
        if length is not None:
            self._admit(length, reserved)
        content, started = bytearray(), time.monotonic()
        while chunk := response.read1(CHUNK_BYTES):
            content += chunk
            if length is None and len(content) > UNRESERVED_BYTES:
                self._admit(len(content), reserved, self._max_bytes)
            if time.monotonic() - started > self._stalled_seconds + len(content) / MIN_BYTES_PER_SECOND:
                raise _FaultError(f"it sends less than {MIN_BYTES_PER_SECOND} bytes a second")
        if length is None:
            reserved.take(len(content))
        elif len(content) < length:
            raise _FaultError(f"{len(content)} of {length} bytes came")
        response.read()  # nothing is left of it: the connection is free for the next request
        return content

    def _admit(self, size: int, reserved: _Reserved, reserve: int | None = None) -> None:
        if size > self._max_bytes:
            raise BadInputError("fetch", "too_large", f"{size} bytes, more than the limit of {self._max_bytes}")
        reserved.take(size if reserve is None else reserve)


def _request(connection: _Connection, target: Target) -> http.client.HTTPResponse:
    try:
        connection.request("GET", target.path, headers={"Host": target.label, **_HEADERS})
        return connection.getresponse()
    except BaseException:
        connection.close()
        raise


def _check(response: http.client.HTTPResponse, etag: str | None) -> None:
    status = response.status
    if status in _TRANSIENT or status >= 500:
        raise _FaultError(f"the server said {_said(status)}")
    if status in {404, 410}:
        raise BadInputError("fetch", "missing", "it is not there")
    if status in {401, 403}:
        raise _unreadable("access to this object is denied")
    if status != 200:
        raise _unreadable(f"the server said {_said(status)}")
    if etag and _bare(response.getheader("ETag", "")) != _bare(etag):
        raise BadInputError("fetch", "changed", "its etag is not the one of the manifest")
    coding = response.getheader("Content-Encoding", "identity").strip().lower()
    if coding not in {"identity", ""}:
        raise _unreadable("the server compresses it, although it was asked not to")


def _said(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else str(status)


def _bare(etag: str) -> str:
    return etag.strip().removeprefix("W/").strip('"')


def _unreadable(message: str) -> BadInputError:
    return BadInputError("fetch", "unreadable", message)


def _fault(error: OSError | http.client.HTTPException, target: Target) -> Exception:
    if isinstance(error, _FaultError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return StoreError(
            f"the certificate of {target.label} is not trusted: {error.verify_message}",
            "check the host's name; SSL_CERT_FILE names the certificates of authorities of your own",
        )
    if isinstance(error, TimeoutError):
        return _FaultError("it timed out")
    if isinstance(error, OSError):
        return _FaultError(error.strerror or type(error).__name__)
    return _FaultError("the connection ended early, or the reply is no HTTP")
