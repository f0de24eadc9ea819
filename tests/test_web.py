"""http(s):// objects of a manifest, from real servers on this machine."""

import datetime
import ipaddress
import json
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import infermill
from infermill import Options
from infermill.errors import BadInputError, StoreError, UsageError
from infermill.fetch import MAX_OBJECT_BYTES, fetcher
from infermill.hosts import AllowList, target_of
from infermill.sources import list_source
from infermill.types import ObjectRef, Source, StoreOptions
from tests.networks import tiny_classifier
from tests.servers import free_port
from tests.test_cli import assert_problem
from tests.test_cli import infermill as infermill_command
from tests.test_job import write_photos

CARD = "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\n"
IMAGE = b"\x89PNG and what follows"


@dataclass(frozen=True)
class Page:
    """A reply. `announced` is its Content-Length, None for a chunked body; `stalls` sends half of it, and waits."""

    status: int = 200
    body: bytes = IMAGE
    headers: Mapping[str, str] = field(default_factory=dict)
    announced: int | None = -1
    stalls: bool = False


class Site:
    """A web server that answers from `pages`, the last one of a path for ever, and keeps what it was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        self.pages: dict[str, deque[Page]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connections: set[int] = set()
        self._ending = threading.Event()

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Nothing: a client that goes away is what some tests are about."""

        self._server = Server((address, 0), self._handler())
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "http" if tls is None else "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self._scheme}://{host}:{self.port}{path}"

    def page(self, path: str, *pages: Page) -> str:
        self.pages[path] = deque(pages)
        return self.url(path)

    def close(self) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.requests.append((self.path, dict(self.headers)))
                site.connections.add(self.client_address[1])
                pages = site.pages.get(self.path, deque([Page(404, b"nothing")]))
                self._send(pages.popleft() if len(pages) > 1 else pages[0])

            def _send(self, page: Page) -> None:
                self.send_response(page.status)
                length = len(page.body) if page.announced == -1 else page.announced
                lengths = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
                for name, value in (lengths | dict(page.headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):
                    if length is None:
                        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(page.body), page.body))
                    elif page.stalls:
                        self.wfile.write(page.body[: length // 2])
                        site._ending.wait(10)
                    else:
                        self.wfile.write(page.body)
                        self.close_connection = length != len(page.body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Nothing: the tests say what went wrong."""

        return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


@pytest.fixture
def other_site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


@pytest.fixture
def tls_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server whose certificate is for `localhost`, and trusted."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = tmp_path / "tls.pem", tmp_path / "tls.key"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, secret)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    server = Site(context)
    yield server
    server.close()


Get = Callable[..., bytes]


def getter(*allow: str, deadline_seconds: float = 20.0) -> Get:
    """A function that fetches a URL as a worker does, from hosts that are allowed."""
    fetch = fetcher(Source("/", keys_are_uris=True), StoreOptions(allow_host=allow, store_deadline=deadline_seconds))
    return lambda url, etag=None, reserve=lambda _: None: bytes(fetch(ObjectRef(url, -1, etag), reserve))


def get_from(site: Site, deadline_seconds: float = 20.0) -> Get:
    return getter(f"127.0.0.1:{site.port}", deadline_seconds=deadline_seconds)


def code_of(get: Get, url: str, etag: str | None = None) -> tuple[str, str]:
    """The code and the message of the row that a URL becomes."""
    with pytest.raises(BadInputError) as caught:
        get(url, etag)
    assert caught.value.failure.stage == "fetch"
    return caught.value.failure.code, caught.value.failure.message


# --- what comes back


def test_a_body_comes_whole_and_is_announced_before_it_is_read(site: Site) -> None:
    reserved: list[int] = []
    url = site.page("/a%20b.png?size=large", Page())
    assert get_from(site)(url, None, reserved.append) == IMAGE
    assert reserved == [len(IMAGE)]


@pytest.mark.parametrize(("key", "asked"), [("/a b.png", "/a%20b.png"), ("/é?ü=1#top", "/%C3%A9?%C3%BC=1"), ("", "/")])
def test_what_no_url_may_hold_is_encoded(key: str, asked: str, site: Site) -> None:
    site.page(asked, Page())
    assert get_from(site)(site.url(key)) == IMAGE


def test_objects_of_a_host_share_a_connection_which_may_end_meanwhile(site: Site) -> None:
    get = get_from(site)
    urls = [site.page(f"/{number}", Page()) for number in range(5)]
    assert [get(url) for url in urls] == [IMAGE] * 5
    assert len(site.connections) == 1
    closing = site.page("/last", Page(headers={"Connection": "close"}))
    assert [get(closing), get(urls[0])] == [IMAGE, IMAGE]
    assert len(site.connections) == 2


def test_many_threads_fetch_at_once(site: Site) -> None:
    bodies = {site.page(f"/{number}", Page(body=bytes([number]) * 10_000)): number for number in range(100)}
    get = get_from(site)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(get, bodies))
    assert [content[0] for content in found] == list(range(100))
    assert {len(content) for content in found} == {10_000}
    assert len(site.connections) <= 8


@pytest.mark.parametrize("size", [0, 10, 3 << 20])
def test_a_body_of_unknown_length_is_read_to_its_end(size: int, site: Site) -> None:
    reserved: list[int] = []
    url = site.page("/chunked", Page(body=bytes(size), announced=None))
    assert get_from(site)(url, None, reserved.append) == bytes(size)
    assert reserved == [size if size < 1 << 20 else MAX_OBJECT_BYTES]


def test_nothing_of_the_user_is_sent(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password hunter2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", f"http://user:hunter2@127.0.0.1:{free_port()}")
    get_from(site)(site.page("/a", Page()))
    [(_, headers)] = site.requests
    assert headers == {
        "Host": f"127.0.0.1:{site.port}",
        "User-Agent": "infermill",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
    }


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "missing"),
        (410, "missing"),
        (401, "unreadable"),
        (403, "unreadable"),
        (400, "unreadable"),
        (204, "unreadable"),
    ],
)
def test_an_answer_without_an_object_is_a_row(status: int, code: str, site: Site) -> None:
    assert code_of(get_from(site), site.page("/a", Page(status, b"")))[0] == code
    assert len(site.requests) == 1


def test_a_body_that_is_compressed_all_the_same_is_unreadable(site: Site) -> None:
    url = site.page("/a", Page(headers={"Content-Encoding": "gzip"}))
    assert code_of(get_from(site), url)[0] == "unreadable"


@pytest.mark.parametrize(
    ("listed", "sent", "is_same"),
    [
        ('"x"', '"x"', True),
        ("x", '"x"', True),
        ('W/"x"', '"x"', True),
        ("", "", True),
        ("x", '"y"', False),
        ("x", "", False),
    ],
)
def test_an_object_with_another_etag_is_changed(listed: str, sent: str, is_same: bool, site: Site) -> None:
    url = site.page("/a", Page(headers={"ETag": sent} if sent else {}))
    if is_same:
        assert get_from(site)(url, listed) == IMAGE
    else:
        assert code_of(get_from(site), url, listed)[0] == "changed"


def test_a_body_beyond_the_limit_is_too_large_and_not_read(site: Site) -> None:
    url = site.page("/huge", Page(announced=MAX_OBJECT_BYTES + 1))
    assert code_of(get_from(site), url)[0] == "too_large"


# --- faults


def test_a_body_that_is_cut_off_is_asked_for_again(site: Site) -> None:
    reserved: list[int] = []
    url = site.page("/a", Page(body=IMAGE[:5], announced=len(IMAGE)), Page(503), Page(429), Page())
    assert get_from(site)(url, None, reserved.append) == IMAGE
    assert len(site.requests) == 4
    assert reserved == [len(IMAGE)]


def test_a_body_that_grows_between_two_requests_is_changed(site: Site) -> None:
    url = site.page("/a", Page(body=b"", announced=10), Page(body=bytes(11)))
    assert code_of(get_from(site), url)[0] == "changed"


@pytest.mark.parametrize(
    "page", [Page(503), Page(body=IMAGE[:5], announced=len(IMAGE)), Page(stalls=True)], ids=["503", "cut", "stalls"]
)
def test_a_fault_that_stays_stops_the_job(page: Page, site: Site) -> None:
    url = site.page("/a?size=1", page)
    with pytest.raises(StoreError, match="does not answer") as caught:
        get_from(site, deadline_seconds=0.5)(url)
    assert site.url("/a") in caught.value.message
    assert "size" not in caught.value.message


def test_a_fault_that_stays_is_a_row_while_others_are_read(site: Site) -> None:
    get = get_from(site, deadline_seconds=0.5)
    assert get(site.page("/good", Page())) == IMAGE
    assert code_of(get, site.page("/bad", Page(500)))[0] == "store"
    site.page("/good", Page(500))
    with pytest.raises(StoreError, match="500 Internal Server Error"):
        get(site.url("/bad"))


def test_a_server_that_never_answers_is_a_row_while_others_do_and_is_not_waited_for_again(site: Site) -> None:
    dead = f"127.0.0.1:{free_port()}"
    get = getter(dead, f"127.0.0.1:{site.port}", deadline_seconds=0.5)
    with pytest.raises(StoreError, match=f"http://{dead}/a does not answer: Connection refused"):
        get(f"http://{dead}/a")
    assert get(site.page("/good", Page())) == IMAGE
    assert code_of(get, f"http://{dead}/a")[0] == "store"
    assert site.paths == ["/good", "/good"]


def test_a_host_without_an_address_is_a_fault() -> None:
    with pytest.raises(StoreError, match=r"http://no-such-host\.invalid/a does not answer"):
        getter("no-such-host.invalid", deadline_seconds=0.1)("http://no-such-host.invalid/a")


# --- who may be asked


@pytest.mark.parametrize(
    ("entries", "url", "permitted"),
    [
        (["example.org"], "https://example.org/a", True),
        (["example.org"], "http://EXAMPLE.org./a", True),
        (["EXAMPLE.org"], "http://example.org:80/a", True),
        (["example.org"], "http://example.org:8080/a", False),
        (["example.org"], "https://example.org:80/a", False),
        (["example.org:8080"], "http://example.org:8080/a", True),
        (["example.org:8080"], "http://example.org/a", False),
        (["example.org"], "http://www.example.org/a", False),
        (["example.org"], "http://notexample.org/a", False),
        (["example.org"], "http://example.org.evil.net/a", False),
        (["example.org"], "http://evil.net/example.org", False),
        (["example.org"], "http://evil.net#example.org", False),
        (["example.org"], "http://evil.net?.example.org", False),
        (["*.example.org"], "http://a.b.example.org/a", True),
        (["*.example.org"], "http://example.org/a", False),
        (["*.example.org"], "http://notexample.org/a", False),
        (["*.0.0.1"], "http://127.0.0.1/a", False),
        (["bücher.example"], "http://xn--bcher-kva.example/a", True),
        (["[::1]:8080"], "http://[0:0::1]:8080/a", True),
        ([], "http://example.org/a", False),
    ],
)
def test_a_host_is_allowed_exactly(entries: list[str], url: str, permitted: bool) -> None:
    assert AllowList(tuple(entries)).permits(target_of(url)) is permitted


@pytest.mark.parametrize(
    "entry", ["", "*", "*.", "http://example.org", "user@example.org", "a b", "a/b", "a:0", "a:99999", "[::1", "a:b:c"]
)
def test_what_is_no_host_cannot_be_allowed(entry: str) -> None:
    with pytest.raises(UsageError, match="--allow-host") as caught:
        AllowList((entry,))
    assert "HOST" in caught.value.hint


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@host/a", "http://hunter2@host/a", "http://host\\@evil/a", "http:///a", "http://a%2eb/",
            "http://ho st/", "http://host:port/", "http://[::1%25eth0]/", "http://ho\nst/", "http://-host/"],
)  # fmt: skip
def test_a_url_without_a_plain_host_is_bad_usage(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        target_of(url)
    assert "hunter2" not in str(caught.value)


PUBLIC = ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e", "::ffff:93.184.215.14"]
NOT_PUBLIC = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "192.0.0.192",
    "168.63.129.16", "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "198.18.0.1", "::", "::1", "fe80::1",
    "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1",
]  # fmt: skip


def test_only_public_addresses_are_reached() -> None:
    allowed, target = AllowList(("example.org",)), target_of("http://example.org/a")
    for text in PUBLIC:
        assert allowed.permits_address(ipaddress.ip_address(text), target), text
    for text in NOT_PUBLIC:
        assert not allowed.permits_address(ipaddress.ip_address(text), target), text


def test_an_address_that_is_itself_allowed_is_reached() -> None:
    allowed, target = AllowList(("nas.example.org", "10.1.2.3", "[fd00::1]")), target_of("http://nas.example.org/a")
    for text, permitted in {"10.1.2.3": True, "10.1.2.4": False, "fd00::1": True, "::ffff:10.1.2.3": True}.items():
        assert allowed.permits_address(ipaddress.ip_address(text), target) is permitted


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "2130706433", "0177.0.0.1"])
def test_another_spelling_of_an_address_is_no_wish_for_it(host: str, site: Site) -> None:
    site.page("/a", Page())
    code, message = code_of(getter(f"{host}:{site.port}"), site.url("/a", host))
    assert (code, site.requests) == ("unreadable", [])
    assert "127.0.0.1, which is neither public" in message


def test_localhost_is_allowed_by_its_name(site: Site) -> None:
    site.page("/a", Page())
    assert getter(f"localhost:{site.port}")(site.url("/a", "localhost")) == IMAGE


def test_a_host_that_is_not_allowed_stops_a_job_that_is_resumed_without_it(site: Site) -> None:
    with pytest.raises(UsageError, match=f"127.0.0.1:{site.port}"):
        getter("example.org")(site.page("/a", Page()))
    assert site.requests == []


# --- redirects


def redirect(location: str, status: int = 302) -> Page:
    return Page(status, b"moved", {"Location": location})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_to_a_host_that_is_allowed(status: int, site: Site, other_site: Site) -> None:
    url = site.page("/a", redirect("b?x=1", status))
    site.page("/b?x=1", redirect(other_site.page("/c", Page())))
    get = getter(f"127.0.0.1:{site.port}", f"127.0.0.1:{other_site.port}")
    assert get(url) == IMAGE


def test_a_redirect_to_another_host_is_not_followed(site: Site, other_site: Site) -> None:
    url = site.page("/a", redirect(other_site.page("/secret?token=hunter2", Page())))
    code, message = code_of(get_from(site), url)
    assert (code, other_site.requests) == ("unreadable", [])
    assert f"127.0.0.1:{other_site.port}" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "location",
    ["http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "ftp://127.0.0.1/", "//evil.example/", "",
     "http://user:hunter2@127.0.0.1/", "http://[::1/", "gopher:x"],
)  # fmt: skip
def test_a_redirect_to_elsewhere_is_not_followed(location: str, site: Site) -> None:
    code, message = code_of(get_from(site), site.page("/a", redirect(location)))
    assert code == "unreadable"
    assert "hunter2" not in message


def test_redirects_end(site: Site) -> None:
    urls = [site.page(f"/{number}", redirect(f"/{number + 1}")) for number in range(6)]
    site.page("/6", Page())
    assert get_from(site)(urls[1]) == IMAGE
    assert code_of(get_from(site), urls[0])[0] == "unreadable"
    assert code_of(get_from(site), site.page("/loop", redirect("/loop")))[0] == "unreadable"


# --- TLS


def test_a_certificate_is_for_the_name_of_the_host(tls_site: Site) -> None:
    tls_site.page("/a", Page())
    get = getter(f"localhost:{tls_site.port}", f"127.0.0.1:{tls_site.port}")
    assert get(tls_site.url("/a", "localhost")) == IMAGE
    with pytest.raises(StoreError, match=r"the certificate of 127\.0\.0\.1:.* is not trusted"):
        get(tls_site.url("/a"))


def test_a_redirect_never_leaves_tls(tls_site: Site, site: Site) -> None:
    tls_site.page("/a", redirect(site.page("/a", Page())))
    get = getter(f"localhost:{tls_site.port}", f"127.0.0.1:{site.port}")
    assert code_of(get, tls_site.url("/a", "localhost"))[0] == "unreadable"
    assert site.requests == []


# --- manifests


def listed(manifest: Path, *allow: str) -> list[str]:
    _, batches = list_source(str(manifest), None, StoreOptions(allow_host=allow))
    return [key for batch in batches for key in batch["key"].to_pylist()]


def test_a_job_over_a_manifest_of_urls(site: Site, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 4)
    urls = [
        site.page(f"/{path.name}", Page(body=path.read_bytes())) for path in sorted((tmp_path / "photos").iterdir())
    ]
    urls += [site.url("/gone.png"), str(tmp_path / "photos" / "photo-000.png")]
    pq.write_table(pa.table({"url": urls}), tmp_path / "list.parquet")
    tiny_classifier(tmp_path / "tiny.onnx", size=32)
    card = tmp_path / "model.yaml"
    card.write_text(CARD)
    options = Options(allow_host=(f"127.0.0.1:{site.port}",))
    summary = infermill.run(tmp_path / "list.parquet", card, tmp_path / "out", options)
    assert (summary.ok, dict(summary.failures_by_code)) == (5, {"missing": 1})
    rows = infermill.read(tmp_path / "out")
    assert rows["key"].to_pylist() == urls
    assert rows["top"][0] == rows["top"][5]


def test_the_command_line_fetches_from_hosts_that_it_is_told(site: Site, tmp_path: Path) -> None:
    write_photos(tmp_path, 1)
    content = (tmp_path / "photo-000.png").read_bytes()
    tiny_classifier(tmp_path / "tiny.onnx", size=32)
    manifest = f"{site.page('/a.png', Page(body=content))}\n{site.page('/b.png', redirect('/a.png'))}\n"
    (tmp_path / "model.yaml").write_text(CARD)
    flags = ["run", "-", "-m", "model.yaml", "-o", "out", "--json"]
    assert_problem(infermill_command(*flags, cwd=tmp_path, stdin=manifest), 2, f"--allow-host 127.0.0.1:{site.port}")
    assert site.requests == []
    flags += ["--allow-host", "photos.example.org", "--allow-host", f"127.0.0.1:{site.port}"]
    done = infermill_command(*flags, cwd=tmp_path, stdin=manifest)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] == 2


def test_hosts_that_are_not_allowed_are_named_with_their_flags(tmp_path: Path) -> None:
    manifest = tmp_path / "list.txt"
    manifest.write_text(
        "a.jpg\nhttp://ok.example/1?x=y\nhttps://b.example:8443/1\nhttp://a.example/1\nhttp://a.example/2\n"
    )
    with pytest.raises(UsageError, match=r"list\.txt: objects on a\.example, b\.example:8443 are not") as caught:
        listed(manifest, "ok.example")
    assert caught.value.hint.endswith("--allow-host a.example --allow-host b.example:8443")
    assert len(listed(manifest, "*.example", "b.example:8443")) == 5


@pytest.mark.parametrize(
    "key",
    [
        "https://ok.example/a.jpg?X-Amz-Signature=hunter2&x=1",
        "https://ok.example/a.jpg?v=1&X-Goog-Signature=hunter2",
        "https://ok.example/a.jpg?sv=2024&sig=hunter2",
        "https://ok.example/a.jpg?alt=media&token=hunter2",
        "https://ok.example/a.jpg#access_token=hunter2",
        "https://user:hunter2@ok.example/a.jpg",
        "s3://bucket/a.jpg?AWSAccessKeyId=AKIA&Signature=hunter2",
        "az://container/a.jpg?sig=hunter2",
    ],
)
def test_secrets_in_urls_are_refused_and_not_repeated(key: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"https://ok.example/b.jpg\n{key}\n")
    with pytest.raises(infermill.InfermillError, match=r"list\.txt") as caught:
        listed(tmp_path / "list.txt", "ok.example")
    assert "hunter2" not in str(caught.value)
    assert caught.value.hint


def test_queries_without_secrets_are_kept(tmp_path: Path) -> None:
    urls = ["https://ok.example/?id=sig", "https://ok.example/a?author=x&design=3", "https://ok.example/signature=1"]
    (tmp_path / "list.txt").write_text("\n".join(urls))
    assert listed(tmp_path / "list.txt", "ok.example") == urls
