"""Where a URI leads: an object store and a path in it, with errors that say what to do."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from obstore.exceptions import BaseError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from infermill.errors import InfermillError, SourceError, StoreError, UsageError
from infermill.types import Source, StoreOptions

if TYPE_CHECKING:
    from datetime import timedelta

    from obstore.store import ClientConfig, ObjectStore, RetryConfig

REMOTE_SCHEMES = {
    "s3": "s3",
    "s3a": "s3",
    "s3n": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "abfs": "az",
    "abfss": "az",
}
STORE_ERRORS = (BaseError, OSError)
# A query (or fragment) that grants access: presigned URLs of every kind. Read by `re` and by Arrow's RE2.
SIGNED_QUERY = (
    r"(?is)^[^:/]*://[^?#]*[?#](?:.*[?&;#])?(?:[a-z0-9_-]*(?:signature|token|secret|passw|credential|api-?key)[a-z0-9_-]*"
    r"|sig|auth|pwd|jwt)="
)
_UNNAMEABLE = re.compile(r"\A/|/\Z|//|(?:\A|/)\.\.?(?:/|\Z)|[\x00-\x1f\x7f]")
_CODE = re.compile(r"<Code>(\w+)</Code>|An error occurred \((\w+)\)")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_REFUSED = re.compile(r"status code: 40[13] ")
_DENIED = {
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_LONGEST_DEADLINE_SECONDS = 86_400
_SSO = re.compile(r"SSO Token|SSO session|token from sso")
NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
"What S3 and Azure call it."
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed"}


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a store: `container` is `s3://bucket`, or `/` on this machine; `path` lies inside it."""

    scheme: str
    container: str
    path: str

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def uri(self) -> str:
        return f"/{self.path}" if self.is_local else f"{self.container}/{self.path}"

    def joined(self, name: str) -> "Location":
        """The place `name` below this one."""
        return Location(self.scheme, self.container, f"{self.path.rstrip('/')}/{name}".lstrip("/"))


def locate(uri: str | os.PathLike[str]) -> Location:
    """Take a path or a URI apart.

    Raises:
        UsageError: the scheme is not one that infermill reads, or the bucket is missing.

    Example:
        >>> locate("s3://photos/2026/cat 1.jpg").path
        '2026/cat 1.jpg'
    """
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        path = Path(text)
        with suppress(RuntimeError):  # `~name` of nobody is a file of that name
            path = path.expanduser()
        return Location("file", "/", str(path.absolute()).lstrip("/") + _slash(text))
    scheme = scheme.lower()
    container, _, path_inside = rest.partition("/")
    if scheme == "file":
        if container not in {"", "localhost"}:
            raise UsageError(f"{text!r} names a file on the host {container!r}", f"write file:///{rest}")
        return Location("file", "/", os.fsdecode(unquote_to_bytes(os.fsencode(path_inside))).lstrip("/"))
    if scheme not in REMOTE_SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", "s3", "gs", "az"))
        shown = without_secrets(text.partition("?")[0])
        hint = f"use a local path or one of {known}"
        if scheme in {"http", "https"}:
            hint += "; to predict on URLs, list them in a manifest, and name their hosts with --allow-host"
        raise UsageError(f"cannot read {scheme}:// in {shown!r}", hint)
    if re.search(SIGNED_QUERY, text):
        raise UsageError(
            f"the URI of {text.partition('?')[0].partition('#')[0]} holds a signature or a token",
            "credentials do not belong in a URI: set them in the environment",
        )
    if not container:
        raise UsageError(f"{text!r} names no bucket", f"write {scheme}://BUCKET/PREFIX")
    scheme = REMOTE_SCHEMES[scheme]
    if ":" in container or (scheme != "az" and "@" in container):
        raise UsageError(
            f"no bucket has a name with `:` or `@`, as the one after {scheme}:// has",
            "credentials do not belong in a URI: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --aws-profile",
        )
    return Location(scheme, f"{scheme}://{container}", path_inside)


def place_of(key: str, source: Source, root: Location) -> Location:
    """Where an object of a source is; `root` is where `source.root` leads."""
    if not source.keys_are_uris:
        # Not `joined`: a key may begin with a slash, or end with one.
        return Location(root.scheme, root.container, key if not root.is_local else f"{root.path}/{key}")
    return locate(key) if "://" in key else locate(Path(source.root, key))


def _slash(text: str) -> str:
    return "/" if text.endswith("/") and text.strip("/") else ""


def open_store(location: Location, options: StoreOptions) -> "ObjectStore":
    """The store that holds `location`, rooted at its container; one client keeps one connection pool.

    Raises:
        StoreError: no credentials were found.
        UsageError: `options.aws_profile` is set and boto3 is not installed, or the URI or a setting cannot be right.
    """
    deadline_seconds = options.store_deadline
    if not 0 < deadline_seconds <= _LONGEST_DEADLINE_SECONDS:
        raise UsageError(
            f"--store-deadline {deadline_seconds:g} is not between 0 and {_LONGEST_DEADLINE_SECONDS} seconds",
            "leave it out for the default",
        )
    if location.is_local:
        return LocalStore("/")
    bucket = location.container.partition("://")[2]
    client: ClientConfig = {
        "connect_timeout": _seconds(min(5, deadline_seconds)),
        "read_timeout": _seconds(_stalled_seconds(options)),
        "timeout": _seconds(deadline_seconds),
        "pool_idle_timeout": _seconds(30),
    }
    # For blips only: `patiently` asks again with a new signature, and can say that it does.
    retry: RetryConfig = {"max_retries": 6, "retry_timeout": _seconds(deadline_seconds)}
    if location.scheme == "gs":
        unsigned: dict[str, Any] = {"skip_signature": True} if options.anonymous else {}
        return GCSStore(bucket, client_options=client, retry_config=retry, **unsigned)
    if location.scheme == "az":
        return _open_azure(bucket, options, client, retry)
    return _open_s3(bucket, options, client, retry)


def _stalled_seconds(options: StoreOptions) -> float:
    """How long a store may send nothing: a third of the deadline, so that it is asked more than once."""
    return min(60, options.store_deadline / 3)


def _open_azure(bucket: str, options: StoreOptions, client: "ClientConfig", retry: "RetryConfig") -> AzureStore:
    container, _, host = bucket.partition("@")  # abfss://CONTAINER@ACCOUNT.dfs.core.windows.net
    settings: dict[str, Any] = {"account_name": host.partition(".")[0]} if host else {}
    if options.anonymous:
        settings["skip_signature"] = True
    try:
        return AzureStore(container, client_options=client, retry_config=retry, **settings)
    except BaseError as error:
        if "Account must be specified" not in str(error):
            raise
        raise UsageError(
            f"az://{container} is in no storage account",
            f"set AZURE_STORAGE_ACCOUNT_NAME, or write abfss://{container}@ACCOUNT.dfs.core.windows.net/PREFIX",
        ) from None


def _open_s3(bucket: str, options: StoreOptions, client: "ClientConfig", retry: "RetryConfig") -> S3Store:
    settings: dict[str, Any] = {}
    endpoint = endpoint_of(options)
    if endpoint:
        settings["endpoint"] = endpoint
        client["allow_http"] = endpoint.lower().startswith("http://")
    if options.region:
        settings["region"] = options.region
    if options.anonymous:
        return S3Store(bucket, client_options=client, retry_config=retry, skip_signature=True, **settings)
    provider = _boto3_credentials(options)
    if provider is not None and not options.region:
        settings |= provider.config
    return S3Store(bucket, client_options=client, retry_config=retry, credential_provider=provider, **settings)


def endpoint_of(options: StoreOptions) -> str | None:
    """The URL at which S3 is spoken to, from `options` or the environment; None for Amazon's own.

    Raises:
        UsageError: it has no scheme, or another than http and https.
    """
    endpoint = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and not endpoint.lower().startswith(("http://", "https://")):
        host = without_secrets("://" + endpoint.rpartition("://")[2]).removeprefix("://")
        raise UsageError(
            f"the endpoint {host!r} does not say whether it speaks http or https",
            f"write http://{host} or https://{host}, in --endpoint-url or AWS_ENDPOINT_URL",
        )
    return endpoint or None


def _boto3_credentials(options: StoreOptions) -> Any:
    """boto3's chain (profiles, SSO, assumed roles), or None where the environment or obstore's own chain serves."""
    if options.aws_profile is None and "AWS_ACCESS_KEY_ID" in os.environ:
        return None
    try:
        import boto3
        import botocore.exceptions
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if options.aws_profile is None:
            return None
        raise UsageError(
            f"the AWS profile {options.aws_profile!r} needs boto3, which is not installed",
            "pip install 'infermill[aws]'",
        ) from None
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=options.aws_profile))
    except botocore.exceptions.BotoCoreError as error:
        raise _no_credentials(f": {_detail(error)}") from None
    except ValueError:  # the provider's own, for a chain that ends without credentials
        raise _no_credentials() from None


def _no_credentials(reason: str = "") -> StoreError:
    return StoreError(
        f"no AWS credentials were found{reason}",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name an --aws-profile, or pass --anonymous",
    )


def etag_of(status: os.stat_result) -> str:
    """The etag of a local file, as object_store writes it: inode, modification time in ns and size, in hex."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def is_nameable(path: str) -> bool:
    """Whether object_store names this path: it refuses control characters, `//`, `.`, `..`, and cuts outer slashes."""
    return _UNNAMEABLE.search(path) is None


def open_s3_client(location: Location, options: StoreOptions) -> tuple[str, Any]:
    """A bucket's name and a boto3 client, for the keys that object_store cannot name.

    Raises:
        SourceError: boto3 is not installed, or the store is not S3.
        StoreError: there is no such profile.
    """
    problem = f"{location.container} holds a key with a control character, or with an empty, `.` or `..` segment"
    if location.scheme != "s3":
        raise SourceError(f"{problem}; only on S3 can it be read", "rename it")
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise SourceError(f"{problem}, which needs boto3", "pip install 'infermill[aws]'") from None
    endpoint = endpoint_of(options)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 2},
        connect_timeout=min(5, options.store_deadline),
        read_timeout=_stalled_seconds(options),
        max_pool_connections=32,
        signature_version=UNSIGNED if options.anonymous else None,
    )
    try:
        session = boto3.Session(profile_name=options.aws_profile)
        region = options.region or session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
        client = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except BotoCoreError as error:
        raise _no_credentials(f": {_detail(error)}") from None
    return location.container.partition("://")[2], client


@contextmanager
def boto3_errors() -> Iterator[None]:
    """The errors of boto3 as those of a store."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        EndpointConnectionError,
        HTTPClientError,
        IncompleteReadError,
    )

    try:
        yield
    except EndpointConnectionError as error:
        raise ConnectionRefusedError(str(error)) from None
    except (HTTPClientError, IncompleteReadError) as error:
        raise ConnectionError(str(error)) from None
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from None


def _seconds(count: float) -> "timedelta":
    from datetime import timedelta

    return timedelta(seconds=count)


def explain(error: Exception, uri: str) -> InfermillError:
    """The error of a store in the words of a user: what happened, where, and what to do next."""
    uri = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in uri)
    if error_code(error) in NO_BUCKET:
        return SourceError(f"there is no bucket at {uri}", "check the bucket's name, and --endpoint-url or --region")
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{uri} does not exist", "check the path")
    if isinstance(error, NotADirectoryError):
        return StoreError(f"{uri}: {error.strerror}", "check the path: a part of it is a file")
    if isinstance(error, PermissionError):
        return StoreError(f"access to {uri} is denied", "check its permissions")
    if isinstance(error, OSError) and "://" not in uri:
        return StoreError(f"{uri}: {error.strerror or error}", "check the path and the disk")
    return _explain_answer(error, uri)


def _explain_answer(error: Exception, uri: str) -> StoreError:
    code, detail = error_code(error), _detail(error)
    if code in _ELSEWHERE or "incorrectly configured region" in detail:
        return StoreError(f"{uri} is in another region", f"pass --region, or set AWS_REGION; the store said: {detail}")
    if _SSO.search(detail):
        return StoreError(f"access to {uri} is denied: {detail}", "run `aws sso login` for the profile")
    if code in _EXPIRED:
        remedy = "renew them, and run the same command again: what is finished stays"
        return StoreError(f"the credentials for {uri} have expired", f"{remedy}; the store said: {detail}")
    if code in _DENIED or _REFUSED.search(_told(error)) or isinstance(error, UnauthenticatedError):
        remedy = "check the credentials (--aws-profile, AWS_ACCESS_KEY_ID), or pass --anonymous"
        return StoreError(f"access to {uri} is denied", f"{remedy}; the store said: {detail}")
    return StoreError(
        f"{uri} does not answer: {detail}", "check the network and --endpoint-url, then run the same command again"
    )


def error_code(error: Exception) -> str | None:
    """The store's own name for what is wrong."""
    match = _CODE.search(_told(error))
    return (match[1] or match[2]) if match else None


def _detail(error: Exception) -> str:
    """What the store said, in one line and without passwords."""
    text = _told(error)
    code, message = _CODE.search(text), _MESSAGE.search(text)
    if code and message:
        text = f"{code[1]}: {message[1]}"
    line = without_secrets(" ".join(text.split())).rstrip(" :")
    return line if len(line) <= 300 else line[:300] + "…"


def _told(error: Exception) -> str:
    return str(error).partition("\n\nDebug source")[0]


def without_secrets(text: str) -> str:
    """The text without the user names and passwords of URLs in it."""
    return re.sub(r"://[^/\s]*@", "://", text)
