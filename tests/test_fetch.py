import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from infermill.errors import BadInputError, SourceError, StoreError
from infermill.fetch import MAX_OBJECT_BYTES, Fetch, fetcher
from infermill.sources import list_source
from infermill.types import ObjectRef, Source, StoreOptions
from tests.servers import Answer, AuthServer, Bucket, ScriptedStore, credential_process, write_profile

KEYS = ["photo.jpg", "a//odd.jpg"]


def refs(uri: str, options: StoreOptions) -> tuple[Fetch, dict[str, ObjectRef]]:
    """A source's fetch function, and its refs by key."""
    source, batches = list_source(uri, ("",), options)
    found = [ObjectRef(row["key"], row["size"], row["etag"]) for batch in batches for row in batch.to_pylist()]
    return fetcher(source, options), {ref.key: ref for ref in found}


def code_of(fetch: Fetch, ref: ObjectRef) -> str:
    """The code of the failure that an input becomes."""
    with pytest.raises(BadInputError) as caught:
        fetch(ref)
    assert caught.value.failure.stage == "fetch"
    assert caught.value.failure.message
    return caught.value.failure.code


def test_a_file_is_read_changed_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"cat")
    fetch, found = refs(str(tmp_path), StoreOptions())
    ref = found["photo.jpg"]
    assert ref.size == 3
    assert bytes(fetch(ref)) == b"cat"
    path.write_bytes(b"dog")
    assert code_of(fetch, ref) == "changed"
    assert bytes(fetch(ObjectRef("photo.jpg"))) == b"dog"
    assert bytes(fetch(ObjectRef("photo.jpg", 3, ""))) == b"dog"
    path.unlink()
    assert code_of(fetch, ref) == "missing"


def test_a_file_that_another_one_replaced_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"cat")
    status = path.stat()
    fetch, found = refs(str(tmp_path), StoreOptions())
    (tmp_path / "new").write_bytes(b"dog")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").rename(path)
    assert code_of(fetch, found["photo.jpg"]) == "changed"


@pytest.mark.parametrize("key", ["file/below.jpg", "nul\0.jpg", r"no\xff.jpg", r"no\x5c"])
def test_a_name_of_nothing_is_missing(key: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fetch = fetcher(Source(str(tmp_path), keys_are_uris=True), StoreOptions())
    assert code_of(fetch, ObjectRef(key)) == "missing"


def test_what_is_no_file_is_unreadable_and_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fetch = fetcher(Source(str(tmp_path), keys_are_uris=True), StoreOptions())
    for key in ("pipe", "/dev/zero", ".", "", "x" * 300):
        assert code_of(fetch, ObjectRef(key)) == "unreadable"


def test_a_file_without_permission_is_unreadable(
    shared_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    (shared_path / "photo.jpg").touch(0o000)
    fetch = fetcher(Source(str(shared_path)), StoreOptions())
    with unprivileged():
        assert code_of(fetch, ObjectRef("photo.jpg")) == "unreadable"


def test_a_file_beyond_the_limit_is_too_large_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", MAX_OBJECT_BYTES + 1)
    fetch, found = refs(str(tmp_path), StoreOptions())
    assert code_of(fetch, found["huge"]) == "too_large"


@pytest.mark.parametrize("key", KEYS)
def test_an_object_is_read_changed_and_deleted(key: str, bucket: Bucket) -> None:
    bucket.put(key, b"cat")
    fetch, found = refs(bucket.uri, bucket.options)
    ref = found[key]
    assert bytes(fetch(ref)) == b"cat"
    bucket.put(key, b"dog")
    assert code_of(fetch, ref) == "changed"
    assert bytes(fetch(ObjectRef(key))) == b"dog"
    assert bytes(fetch(ObjectRef(key, 3, ""))) == b"dog"
    bucket.delete(key)
    assert code_of(fetch, ref) == "missing"


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_bucket_is_no_bad_input(key: str, bucket: Bucket) -> None:
    fetch = fetcher(Source("s3://no-such-bucket"), bucket.options)
    with pytest.raises(Exception, match="there is no bucket"):
        fetch(ObjectRef(key))


def test_an_object_that_a_policy_denies_is_unreadable(
    moto_auth_server: AuthServer, aws_environment: pytest.MonkeyPatch
) -> None:
    aws_environment.setenv("AWS_ACCESS_KEY_ID", moto_auth_server.access_key_id)
    aws_environment.setenv("AWS_SECRET_ACCESS_KEY", moto_auth_server.secret_access_key)
    fetch, found = refs(f"s3://{moto_auth_server.bucket}", moto_auth_server.options)
    assert bytes(fetch(found["open.jpg"])) == b"open.jpg"
    assert code_of(fetch, found["secret.jpg"]) == "unreadable"


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidObjectState"])
@pytest.mark.parametrize("key", KEYS)
def test_an_object_that_is_denied_or_archived_is_unreadable(key: str, code: str, scripted_store: ScriptedStore) -> None:
    scripted_store.answer(f"photos/{key}", Answer(403, code))
    assert code_of(fetcher(Source("s3://photos"), scripted_store.options), ObjectRef(key)) == "unreadable"


@pytest.fixture
def azure(scripted_store: ScriptedStore, monkeypatch: pytest.MonkeyPatch) -> ScriptedStore:
    """The scripted store in the place of Azure's emulator, whose account is `devstoreaccount1`."""
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", str(scripted_store.options.endpoint_url))
    return scripted_store


@pytest.mark.parametrize(
    ("status", "told", "code"), [(409, "BlobArchived", "unreadable"), (404, "BlobNotFound", "missing")]
)
def test_a_blob_that_is_archived_or_deleted_is_a_bad_input(
    status: int, told: str, code: str, azure: ScriptedStore
) -> None:
    azure.answer("devstoreaccount1/photos/a.jpg", Answer(status, told))
    assert code_of(fetcher(Source("az://photos"), StoreOptions(anonymous=True)), ObjectRef("a.jpg")) == code


def test_a_container_that_is_gone_is_no_bad_input(azure: ScriptedStore) -> None:
    azure.answer("devstoreaccount1/photos/a.jpg", Answer(404, "ContainerNotFound"))
    with pytest.raises(SourceError, match="there is no bucket at az://photos"):
        fetcher(Source("az://photos"), StoreOptions(anonymous=True))(ObjectRef("a.jpg"))


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"])
@pytest.mark.parametrize("key", KEYS)
def test_refused_credentials_are_no_bad_input(key: str, code: str, scripted_store: ScriptedStore) -> None:
    scripted_store.answer(f"photos/{key}", Answer(403, code))
    with pytest.raises(StoreError, match="denied"):
        fetcher(Source("s3://photos"), scripted_store.options)(ObjectRef(key))


@pytest.mark.parametrize("key", KEYS)
def test_an_object_beyond_the_limit_is_too_large_and_not_read(key: str, scripted_store: ScriptedStore) -> None:
    headers = {
        "Content-Length": str(MAX_OBJECT_BYTES + 1),
        "ETag": '"e"',
        "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
    }
    scripted_store.answer(f"photos/{key}", Answer(200, headers=headers))
    assert code_of(fetcher(Source("s3://photos"), scripted_store.options), ObjectRef(key)) == "too_large"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("status", [500, 503])
def test_a_busy_store_is_asked_again(key: str, status: int, scripted_store: ScriptedStore) -> None:
    scripted_store.objects[f"/photos/{key}"] = b"cat"
    scripted_store.answer(f"photos/{key}", Answer(status, "SlowDown"), times=2)
    assert bytes(fetcher(Source("s3://photos"), scripted_store.options)(ObjectRef(key))) == b"cat"


def test_manifest_entries_lead_to_several_stores(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "local file.jpg").write_bytes(b"local")
    bucket.put("remote%20.jpg", b"remote")
    fetch = fetcher(Source(str(tmp_path), keys_are_uris=True), bucket.options)
    wanted = ["local file.jpg", f"{tmp_path}/local file.jpg", f"file://{tmp_path}/local%20file.jpg"]
    assert [bytes(fetch(ObjectRef(key))) for key in wanted] == [b"local"] * 3
    assert bytes(fetch(ObjectRef(f"{bucket.uri}/remote%20.jpg"))) == b"remote"
    assert code_of(fetch, ObjectRef(f"{bucket.uri}/remote .jpg")) == "missing"


def test_many_threads_fetch_at_once(bucket: Bucket, tmp_path: Path) -> None:
    contents = {f"{number}.jpg": os.urandom(2000) for number in range(64)}
    for key, content in contents.items():
        bucket.put(key, content)
        (tmp_path / key).write_bytes(content)
    for uri in (bucket.uri, str(tmp_path)):
        fetch, found = refs(uri, bucket.options)
        with ThreadPoolExecutor(16) as pool:
            fetched = dict(zip(found, pool.map(lambda ref: bytes(fetch(ref)), found.values()), strict=True))  # noqa: B023
        assert fetched == contents


@pytest.mark.parametrize("key", KEYS)
def test_threads_that_start_together_open_the_store_once(
    key: str, scripted_store: ScriptedStore, aws_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_profile(aws_environment, tmp_path, credential_process(tmp_path, "AKIAMINE", "hunter2"))
    scripted_store.objects[f"/photos/{key}"] = b"cat"
    fetch = fetcher(
        Source("s3://photos"), StoreOptions(endpoint_url=scripted_store.options.endpoint_url, aws_profile="mine")
    )
    start = threading.Barrier(16)

    def together(number: int) -> bytes:
        start.wait()
        return bytes(fetch(ObjectRef(key)))

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(together, range(16))) == {b"cat"}
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_a_folder_that_is_gone_stops_the_job(tmp_path: Path) -> None:
    """A disk that is not mounted any more says nothing of its files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    fetch = fetcher(Source(str(folder)), StoreOptions())
    with pytest.raises(BadInputError):
        fetch(ObjectRef("a.jpg"))
    folder.rmdir()
    with pytest.raises(StoreError, match="photos is not there any more"):
        fetch(ObjectRef("a.jpg"))
