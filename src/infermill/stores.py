"""Where a URI leads: an object store and a path in it, with errors that say what to do."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from infermill.errors import InfermillError, SourceError, StoreError, UsageError
from infermill.types import StoreOptions

if TYPE_CHECKING:
    from datetime import timedelta

    from _typeshed import WriteableBuffer
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
    if not separator:
        return Location("file", "/", str(Path(text).expanduser().absolute()).lstrip("/") + _slash(text))
    scheme = scheme.lower()
    if scheme == "file":
        path = unquote(urlsplit(text.replace("#", "%23").replace("?", "%3F")).path)
        return Location("file", "/", path.lstrip("/"))
    if scheme not in REMOTE_SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", "s3", "gs", "az"))
        raise UsageError(f"cannot read {scheme}:// in {text!r}", f"use a local path or one of {known}")
    bucket, _, path = rest.partition("/")
    if not bucket:
        raise UsageError(f"{text!r} names no bucket", f"write {scheme}://BUCKET/PREFIX")
    scheme = REMOTE_SCHEMES[scheme]
    return Location(scheme, f"{scheme}://{bucket}", path)


def _slash(text: str) -> str:
    return "/" if text.endswith("/") and text.strip("/") else ""


def open_store(location: Location, options: StoreOptions) -> "ObjectStore":
    """The store that holds `location`, rooted at its container; one client keeps one connection pool.

    Raises:
        StoreError: no credentials were found.
        UsageError: `options.profile` is set and boto3 is not installed.
    """
    if location.is_local:
        return LocalStore("/")
    bucket = location.container.partition("://")[2]
    client: ClientConfig = {"connect_timeout": _seconds(5), "timeout": _seconds(60), "pool_idle_timeout": _seconds(30)}
    retry: RetryConfig = {"max_retries": 6, "retry_timeout": _seconds(60)}
    if location.scheme == "gs":
        return GCSStore(bucket, client_options=client, retry_config=retry)
    if location.scheme == "az":
        return AzureStore(bucket, client_options=client, retry_config=retry)
    return _open_s3(bucket, options, client, retry)


def _open_s3(bucket: str, options: StoreOptions, client: "ClientConfig", retry: "RetryConfig") -> S3Store:
    settings: dict[str, Any] = {}
    endpoint = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        settings["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    if options.region:
        settings["region"] = options.region
    if options.anonymous:
        return S3Store(bucket, client_options=client, retry_config=retry, skip_signature=True, **settings)
    provider = _boto3_credentials(options)
    if provider is not None and not options.region:
        settings |= provider.config
    return S3Store(bucket, client_options=client, retry_config=retry, credential_provider=provider, **settings)


def _boto3_credentials(options: StoreOptions) -> Any:
    """boto3's chain (profiles, SSO, assumed roles), or None where the environment or obstore's own chain serves."""
    if options.profile is None and "AWS_ACCESS_KEY_ID" in os.environ:
        return None
    try:
        import boto3
        import botocore.exceptions
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if options.profile is None:
            return None
        raise UsageError(
            f"the AWS profile {options.profile!r} needs boto3, which is not installed", "pip install 'infermill[aws]'"
        ) from None
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=options.profile))
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StoreError(
            f"no AWS credentials: {error}",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a --profile, or pass --anonymous for a public bucket",
        ) from None


class _ObjectReader(io.RawIOBase):
    """An object as a seekable file that is read range by range."""

    def __init__(self, store: "ObjectStore", path: str) -> None:
        self._object = obstore.open_reader(store, path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._object.seek(offset, whence)

    def tell(self) -> int:
        return self._object.tell()

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        data = memoryview(self._object.read(len(view)))
        view[: len(data)] = data
        return len(data)


def open_reader(location: Location, options: StoreOptions) -> io.BufferedReader:
    """A file or object, for reading in pieces."""
    if location.is_local:
        return Path(location.uri).open("rb")
    return io.BufferedReader(_ObjectReader(open_store(location, options), location.path), 1 << 20)


def is_unnameable(error: Exception) -> bool:
    """Whether the error says that object_store cannot name a key: control characters, `//`, `.` and `..`."""
    return isinstance(error, InvalidPathError) or "invalid path" in str(error) or "Could not parse path" in str(error)


def is_denied_object(error: Exception) -> bool:
    """Whether the store denies this one object to credentials that it accepts."""
    return isinstance(error, PermissionDeniedError) and "<Code>AccessDenied</Code>" in str(error)


def open_s3_client(location: Location, options: StoreOptions) -> tuple[str, Any]:
    """A bucket's name and a boto3 client, for the keys that object_store cannot name.

    Raises:
        SourceError: boto3 is not installed.
    """
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError:
        raise SourceError(
            f"{location.container} holds a key with a control character, `//`, `.` or `..` in it, which needs boto3",
            "pip install 'infermill[aws]'",
        ) from None
    config = Config(retries={"mode": "standard"}, signature_version=UNSIGNED if options.anonymous else None)
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    session = boto3.Session(profile_name=options.profile, region_name=region)
    endpoint = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return location.container.partition("://")[2], session.client("s3", endpoint_url=endpoint, config=config)


def _seconds(count: float) -> "timedelta":
    from datetime import timedelta

    return timedelta(seconds=count)


def explain(error: Exception, uri: str) -> InfermillError:
    """The error of a store in the words of a user: what happened, where, and what to do next."""
    detail = _first_line(error)
    text = str(error)
    if "NoSuchBucket" in text or (isinstance(error, FileNotFoundError) and "bucket does not exist" in text):
        return SourceError(f"there is no bucket at {uri}", "check the bucket's name, and --endpoint-url or --region")
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{uri} does not exist", "check the path")
    if (
        isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        or "SignatureDoesNotMatch" in text
    ):
        where = (
            "check its permissions"
            if "://" not in uri
            else "check the credentials (--profile, AWS_ACCESS_KEY_ID), or pass --anonymous"
        )
        return StoreError(f"access to {uri} is denied", f"{where}; the store said: {detail}" if "://" in uri else where)
    if isinstance(error, OSError):
        return StoreError(f"{uri}: {error.strerror or error}", "check the path and the disk")
    return StoreError(
        f"{uri} does not answer: {detail}", "check the network and --endpoint-url, then run the same command again"
    )


def _first_line(error: Exception) -> str:
    line = str(error).strip().split("\n", 1)[0]
    return line if len(line) <= 300 else line[:300] + "…"
