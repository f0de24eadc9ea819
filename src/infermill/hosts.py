"""Which http(s):// URLs may be fetched: the hosts that the user allowed, and the addresses that these may have."""

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from infermill.errors import UsageError
from infermill.stores import SIGNED_QUERY

DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE = "%/:=&?~+!$,;'@()*[]|"
"What is left as it is in a path and a query; everything else is percent-encoded."
_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?.*", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@%\\]+)(?::(\d{1,5}))?", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?")
_ROOT = r"(?is)^(?P<root>https?://[^/?#]*)"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What `ipaddress` takes for public: protocol assignments (on Oracle Cloud the metadata of a machine), the host of a
# machine on Azure, and tunnels.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32", "2002::/16", "fec0::/10")))
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads. `host` is in lower case and ASCII, or an IP address; `path` includes the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def label(self) -> str:
        """The host, with its port where that is not the scheme's own: what `--allow-host` takes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def shown(self) -> str:
        """The URL without its query, which may hold a secret."""
        return f"{self.scheme}://{self.label}{self.path.partition('?')[0]}"


def is_web(key: str) -> bool:
    """Whether a key of a manifest is an http:// or https:// URL."""
    return key[:8].lower().startswith(("http://", "https://"))


def target_of(url: str) -> Target:
    """Take an http(s) URL apart.

    Raises:
        UsageError: it names no host, a host that cannot be, or a user.

    Example:
        >>> target_of("https://Photos.example.org/a b.jpg").path
        '/a%20b.jpg'
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise UsageError(f"{url.partition('?')[0]!r} is no http:// or https:// URL", "write https://HOST/PATH")
    scheme, authority = match[1].lower(), match[2]
    if "@" in authority:
        raise UsageError(
            f"a URL on {authority.rpartition('@')[2]!r} holds a user name or a password",
            "credentials do not belong in a URL: they would be written to the plan; use objects that need none",
        )
    host, port = _host_and_port(authority)
    path = quote(match[3] or "/", safe=SAFE) + quote(match[4] or "", safe=SAFE)
    return Target(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, path)


def _host_and_port(text: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(text)
    port = int(match[2]) if match is not None and match[2] else None
    if match is None or (port is not None and not 0 < port < 65_536):
        raise UsageError(f"{text!r} is no host, or no host:port", "write HOST, HOST:PORT or [IPv6]:PORT")
    name = match[1]
    try:
        if name.startswith("["):
            return str(ipaddress.IPv6Address(name[1:-1])), port
        host = name.encode("idna").decode().lower().removesuffix(".")
    except ValueError:
        host = ""
    if _HOST.fullmatch(host) is None:
        raise UsageError(f"{name!r} is no name of a host", "write HOST, HOST:PORT or [IPv6]:PORT")
    return host, port


class AllowList:
    """The hosts of `--allow-host`: `host` (at the scheme's own port), `host:port`, and `*.domain` for its subdomains.

    An address that is not public is reached only where it is itself on the list, as an IP address, or as `localhost`.

    Raises:
        UsageError: an entry is none of these.

    Example:
        >>> AllowList(("*.example.org",)).permits(target_of("https://photos.example.org/cat.jpg"))
        True
    """

    def __init__(self, entries: tuple[str, ...]) -> None:
        self._entries = frozenset(map(_entry, entries))

    def permits(self, target: Target) -> bool:
        """Whether objects of the target's host and port may be fetched."""
        return any(self._has(name, target) for name in (target.host, *_wildcards(target.host)))

    def _has(self, name: str, target: Target) -> bool:
        is_default = target.port == DEFAULT_PORTS[target.scheme]
        return (name, target.port) in self._entries or (is_default and (name, None) in self._entries)

    def permits_address(self, address: Address, target: Target) -> bool:
        """Whether the address that the target's host has may be reached."""
        address = _plain(address)
        return (
            _is_public(address)
            or self._has(str(address), target)
            or (address.is_loopback and self._has("localhost", target))
        )

    def check(self, target: Target) -> None:
        """Raise UsageError where the target is not permitted."""
        if not self.permits(target):
            raise _not_allowed([target], "")


def _entry(text: str) -> tuple[str, int | None]:
    is_wildcard = text.startswith("*.")
    try:
        host, port = _host_and_port(text.removeprefix("*."))
    except UsageError as error:
        raise UsageError(f"--allow-host {text!r}: {error.message}", "write HOST, HOST:PORT or *.DOMAIN") from None
    return ("*." if is_wildcard else "") + host, port


def _wildcards(host: str) -> Iterator[str]:
    """The wildcards that the host matches: those of the domains that it lies below."""
    if ":" not in host and not host.replace(".", "").isdigit():
        labels = host.split(".")
        yield from (f"*.{'.'.join(labels[start:])}" for start in range(1, len(labels)))


def _not_allowed(targets: list[Target], where: str) -> UsageError:
    names = sorted({target.label for target in targets})
    flags = " ".join(f"--allow-host {name}" for name in names[:5])
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return UsageError(
        f"{where}objects on {shown} are not fetched: only those of allowed hosts are", f"to fetch them, pass {flags}"
    )


def _plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, or the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_public(address: Address) -> bool:
    special = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    return address.is_global and not special and not any(address in network for network in _NOT_PUBLIC)


def check_urls(keys: "pa.Array[Any]", allowed: AllowList, where: str) -> None:
    """Refuse a manifest's URLs that must not be fetched, or must not be written down, before there is a plan.

    Raises:
        UsageError: a host is not allowed, or a URL holds a signature, a token or a password.
    """
    signed = keys.filter(pc.match_substring_regex(keys, SIGNED_QUERY))
    if len(signed):
        url = re.split(r"[?#]", signed[0].as_py(), maxsplit=1)[0]
        raise UsageError(
            f"{where}: the URL of {url} holds a signature or a token",
            "it would be written to the plan and the output; list s3://, gs:// or az:// URIs, with credentials "
            "in the environment",
        )
    roots = pc.unique(pc.extract_regex(keys, _ROOT).field("root")).to_pylist()
    try:
        targets = [target_of(root) for root in roots if root]
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.hint) from None
    refused = [target for target in targets if not allowed.permits(target)]
    if refused:
        raise _not_allowed(refused, f"{where}: ")
