import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from obstore.store import AzureStore, GCSStore

from infermill.errors import InfermillError, SourceError, StoreError, UsageError
from infermill.fetch import fetcher
from infermill.output import Output
from infermill.sources import list_source
from infermill.stores import Location, endpoint_of, is_nameable, locate, open_s3_client, open_store
from infermill.types import ObjectRef, Source, StoreOptions
from tests.servers import Answer, AuthServer, Bucket, ScriptedStore, credential_process, free_port, write_profile


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("s3://photos", Location("s3", "s3://photos", "")),
        ("s3://photos/", Location("s3", "s3://photos", "")),
        ("s3://photos/2026/cat 1.jpg", Location("s3", "s3://photos", "2026/cat 1.jpg")),
        ("s3a://photos/x/", Location("s3", "s3://photos", "x/")),
        ("s3n://photos/x", Location("s3", "s3://photos", "x")),
        ("S3://photos/X", Location("s3", "s3://photos", "X")),
        ("s3://photos/a%2Fb%41.jpg", Location("s3", "s3://photos", "a%2Fb%41.jpg")),
        ("s3://photos/q?x=1&y#z.jpg", Location("s3", "s3://photos", "q?x=1&y#z.jpg")),
        ("s3://photos//a/../b//c\n.jpg", Location("s3", "s3://photos", "/a/../b//c\n.jpg")),
        ("gs://photos/x", Location("gs", "gs://photos", "x")),
        ("gcs://photos/x", Location("gs", "gs://photos", "x")),
        ("az://photos/x", Location("az", "az://photos", "x")),
        ("abfs://photos/x", Location("az", "az://photos", "x")),
        ("abfss://photos@zoo.dfs.core.windows.net/x", Location("az", "az://photos@zoo.dfs.core.windows.net", "x")),
        ("/data/photos", Location("file", "/", "data/photos")),
        ("/data/photos/", Location("file", "/", "data/photos/")),
        ("/", Location("file", "/", "")),
        ("/data/a%2Fb?c#d e", Location("file", "/", "data/a%2Fb?c#d e")),
        ("/data/s3://photos/x", Location("file", "/", "data/s3:/photos/x")),
        ("file:///data/a%20b%2525%C3%A9.jpg", Location("file", "/", "data/a b%25é.jpg")),
        ("file:///data/%FF.jpg", Location("file", "/", "data/\udcff.jpg")),
        ("file:///data/q?x=1#y", Location("file", "/", "data/q?x=1#y")),
        ("file:///data/a\n\tb", Location("file", "/", "data/a\n\tb")),
        ("file://localhost/data/x/", Location("file", "/", "data/x/")),
    ],
)
def test_a_uri_is_taken_apart_without_changing_a_byte(uri: str, location: Location) -> None:
    assert locate(uri) == location


def test_a_relative_path_hangs_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert locate("photos/").uri == f"{tmp_path}/photos/"
    assert locate("~/photos").uri == "/home/me/photos"
    assert locate("~nobody-of-that-name/photos").uri == f"{tmp_path}/~nobody-of-that-name/photos"


@pytest.mark.parametrize("uri", ["s3:///x", "s3://", "gs:///x"])
def test_a_missing_bucket_name_is_bad_usage(uri: str) -> None:
    with pytest.raises(UsageError, match="names no bucket"):
        locate(uri)


def test_an_unknown_scheme_is_bad_usage_that_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="cannot read https://") as caught:
        locate("https://user:hunter2@host/photos?signature=hunter2")
    assert caught.value.hint.startswith("use a local path or one of file://, s3://, gs://, az://; ")
    assert "--allow-host" in caught.value.hint
    assert "hunter2" not in str(caught.value)


def test_a_file_uri_with_a_host_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="host 'data'") as caught:
        locate("file://data/photos")
    assert caught.value.hint == "write file:///data/photos"


@pytest.mark.parametrize("uri", ["s3://AKIA:hunter2@photos/x", "s3://AKIA:hunt/er2@photos/x", "gs://hunter2@photos/x"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UsageError, match="no bucket has a name with") as caught:
        locate(uri)
    assert "hunt" not in str(caught.value)


@pytest.mark.parametrize("path", ["", "a", "a b/c%2Fd", "..a/b..", "a/.b", "é\u0301\\", "x" * 1024])
def test_ordinary_keys_are_nameable(path: str) -> None:
    assert is_nameable(path)


@pytest.mark.parametrize(
    "path", ["/a", "a/", "a//b", "a/../b", "../a", "a/..", "./a", "a/.", ".", "a\nb", "a\n", "\x7f"]
)
def test_keys_that_object_store_refuses_or_changes_are_unnameable(path: str) -> None:
    assert not is_nameable(path)


def list_bucket(name: str, options: StoreOptions) -> object:
    return list(list_source(f"s3://{name}/", None, options)[1])


def list_prefix(name: str, options: StoreOptions) -> object:
    return list(list_source(f"s3://{name}/photos/", None, options)[1])


def list_object(name: str, options: StoreOptions) -> object:
    return list(list_source(f"s3://{name}/open.jpg", None, options)[1])


def list_glob(name: str, options: StoreOptions) -> object:
    return list(list_source(f"s3://{name}/*.jpg", None, options)[1])


def list_exactly(name: str, options: StoreOptions) -> object:
    return list(list_source(f"s3://{name}/a//", None, options)[1])


def read_manifest(name: str, options: StoreOptions) -> object:
    return list(list_source(f"s3://{name}/list.txt", None, options)[1])


def fetch_object(name: str, options: StoreOptions) -> object:
    return fetcher(Source(f"s3://{name}"), options)(ObjectRef("open.jpg"))


def fetch_exactly(name: str, options: StoreOptions) -> object:
    return fetcher(Source(f"s3://{name}"), options)(ObjectRef("a//open.jpg"))


def read_output(name: str, options: StoreOptions) -> object:
    return Output(f"s3://{name}/out", options).read("_infermill/job.json")


def write_output(name: str, options: StoreOptions) -> object:
    return Output(f"s3://{name}/out", options).create("file", b"content")


def list_output(name: str, options: StoreOptions) -> object:
    return Output(f"s3://{name}/out", options).parts()


ACTIONS = [
    list_bucket,
    list_prefix,
    list_object,
    list_glob,
    list_exactly,
    read_manifest,
    fetch_object,
    fetch_exactly,
    read_output,
    write_output,
    list_output,
]
Action = Callable[[str, StoreOptions], object]


def problem_of(action: Action, bucket: str, options: StoreOptions) -> InfermillError:
    """The error of an action: one line, and one of advice."""
    with pytest.raises(InfermillError) as caught:
        action(bucket, options)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert "\n" not in caught.value.hint
    return caught.value


@pytest.mark.parametrize("action", [a for a in ACTIONS if a not in {read_manifest, read_output}])
def test_a_missing_bucket_is_told(action: Action, bucket: Bucket) -> None:
    problem = problem_of(action, "no-such-bucket", bucket.options)
    assert "there is no bucket at s3://no-such-bucket" in problem.message
    assert "bucket's name" in problem.hint


def test_a_missing_object_is_told(bucket: Bucket) -> None:
    assert isinstance(problem_of(read_manifest, bucket.name, bucket.options), SourceError)


@pytest.mark.parametrize("action", ACTIONS)
def test_wrong_credentials_are_told(
    action: Action, moto_auth_server: AuthServer, aws_environment: pytest.MonkeyPatch
) -> None:
    aws_environment.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    aws_environment.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    problem = problem_of(action, moto_auth_server.bucket, moto_auth_server.options)
    assert isinstance(problem, StoreError)
    assert f"access to s3://{moto_auth_server.bucket}/" in problem.message
    assert "--aws-profile" in problem.hint
    assert "--anonymous" in problem.hint
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize("action", [list_bucket, fetch_object, fetch_exactly])
def test_a_wrong_secret_is_told(
    action: Action, moto_auth_server: AuthServer, aws_environment: pytest.MonkeyPatch
) -> None:
    aws_environment.setenv("AWS_ACCESS_KEY_ID", moto_auth_server.access_key_id)
    aws_environment.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    problem = problem_of(action, moto_auth_server.bucket, moto_auth_server.options)
    assert "is denied" in problem.message
    assert "SignatureDoesNotMatch" in problem.hint
    assert "hunter2" not in str(problem)


def test_a_place_that_must_not_be_written_is_told(
    moto_auth_server: AuthServer, aws_environment: pytest.MonkeyPatch
) -> None:
    aws_environment.setenv("AWS_ACCESS_KEY_ID", moto_auth_server.access_key_id)
    aws_environment.setenv("AWS_SECRET_ACCESS_KEY", moto_auth_server.secret_access_key)
    problem = problem_of(write_output, moto_auth_server.bucket, moto_auth_server.options)
    assert "is denied" in problem.message


@pytest.mark.parametrize("action", [list_bucket, list_object, fetch_object, fetch_exactly, write_output])
def test_a_dead_endpoint_is_told_soon_and_without_its_password(
    action: Action, aws_environment: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    options = StoreOptions(endpoint_url=f"http://user:hunter2@127.0.0.1:{free_port()}", region="us-east-1")
    problem = problem_of(action, "photos", options)
    assert time.monotonic() - started < 30
    assert "does not answer" in problem.message
    assert "--endpoint-url" in problem.hint
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize("action", [fetch_object, fetch_exactly, read_output])
def test_an_answer_that_echoes_keys_is_not_repeated(action: Action, scripted_store: ScriptedStore) -> None:
    for key in ("open.jpg", "a//open.jpg", "out/_infermill/job.json"):
        scripted_store.answer(f"photos/{key}", Answer(403, "SignatureDoesNotMatch"))
    problem = problem_of(action, "photos", scripted_store.options)
    assert "told by a script" in problem.hint
    assert "echoed" not in str(problem).lower()


@pytest.mark.parametrize(
    "answer",
    [
        Answer(301, "PermanentRedirect"),
        Answer(400, "AuthorizationHeaderMalformed"),
    ],
)
@pytest.mark.parametrize("action", [fetch_object, read_output])
def test_another_region_is_told(action: Action, answer: Answer, scripted_store: ScriptedStore) -> None:
    for key in ("open.jpg", "out/_infermill/job.json"):
        scripted_store.answer(f"photos/{key}", answer)
    problem = problem_of(action, "photos", scripted_store.options)
    assert "is in another region" in problem.message
    assert "--region" in problem.hint


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("uri", ["s3://photos", "/photos"])
def test_a_deadline_that_is_no_time_is_bad_usage(uri: str, seconds: float) -> None:
    with pytest.raises(UsageError, match="--store-deadline"):
        open_store(locate(uri), StoreOptions(store_deadline=seconds))


def test_expired_credentials_are_told(scripted_store: ScriptedStore) -> None:
    scripted_store.answer("photos/open.jpg", Answer(400, "ExpiredToken"))
    problem = problem_of(fetch_object, "photos", scripted_store.options)
    assert "have expired" in problem.message
    assert "ExpiredToken" in problem.hint


def test_an_odd_key_is_shown_in_one_line(scripted_store: ScriptedStore) -> None:
    scripted_store.answer("photos/a\nb", Answer(403, "SignatureDoesNotMatch"))
    with pytest.raises(StoreError, match=r"photos/a\\nb is denied"):
        fetcher(Source("s3://photos"), scripted_store.options)(ObjectRef("a\nb"))


def test_a_folder_that_must_not_be_read_is_told(
    shared_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    folder = shared_path / "locked"
    folder.mkdir(mode=0o000)
    with unprivileged(), pytest.raises(InfermillError, match=f"access to {folder}.* is denied") as caught:
        list(list_source(str(folder), None, StoreOptions())[1])
    assert caught.value.hint == "check its permissions"


@pytest.mark.parametrize("action", [list_bucket, list_object, fetch_object])
def test_a_profile_is_followed_through_boto3(
    action: Action, moto_auth_server: AuthServer, aws_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = credential_process(tmp_path, moto_auth_server.access_key_id, moto_auth_server.secret_access_key)
    write_profile(aws_environment, tmp_path, settings)
    options = StoreOptions(endpoint_url=moto_auth_server.endpoint, aws_profile="mine")
    assert action(moto_auth_server.bucket, options)


@pytest.mark.parametrize("key", ["a.jpg", "a//b.jpg"])
def test_a_profile_comes_before_the_environment_and_is_asked_once(
    key: str, scripted_store: ScriptedStore, aws_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_profile(aws_environment, tmp_path, credential_process(tmp_path, "AKIAMINE", "hunter2"))
    scripted_store.objects[f"/photos/{key}"] = b"cat"
    options = StoreOptions(endpoint_url=scripted_store.options.endpoint_url, aws_profile="mine")
    fetch = fetcher(Source("s3://photos"), options)
    assert [bytes(fetch(ObjectRef(key))) for _ in range(3)] == [b"cat"] * 3
    assert set(scripted_store.credentials) == {"AKIAMINE"}
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize("key", ["a.jpg", "a//b.jpg"])
def test_anonymous_requests_are_unsigned(key: str, scripted_store: ScriptedStore) -> None:
    scripted_store.objects[f"/photos/{key}"] = b"cat"
    options = StoreOptions(endpoint_url=scripted_store.options.endpoint_url, anonymous=True)
    assert bytes(fetcher(Source("s3://photos"), options)(ObjectRef(key))) == b"cat"
    assert scripted_store.credentials == [None]


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("key", ["a.jpg", "a//b.jpg"])
def test_the_endpoint_comes_from_the_environment(
    key: str, name: str, scripted_store: ScriptedStore, aws_environment: pytest.MonkeyPatch
) -> None:
    scripted_store.objects[f"/photos/{key}"] = b"cat"
    aws_environment.setenv(name, str(scripted_store.options.endpoint_url))
    assert bytes(fetcher(Source("s3://photos"), StoreOptions())(ObjectRef(key))) == b"cat"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("", "no AWS credentials were found"),
        ("credential_process = /bin/false", "Error when retrieving credentials"),
    ],
)
def test_a_profile_without_credentials_is_told(
    settings: str, reason: str, aws_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_profile(aws_environment, tmp_path, settings)
    problem = problem_of(list_bucket, "photos", StoreOptions(aws_profile="mine"))
    assert reason in problem.message
    assert "AWS_ACCESS_KEY_ID" in problem.hint


@pytest.mark.parametrize("action", [list_bucket, fetch_object, fetch_exactly])
def test_an_unknown_profile_is_told(action: Action, aws_environment: pytest.MonkeyPatch) -> None:
    problem = problem_of(action, "photos", StoreOptions(aws_profile="nobodys"))
    assert "nobodys" in problem.message
    assert "--aws-profile" in problem.hint


def test_a_machine_without_credentials_is_told(aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.delenv("AWS_ACCESS_KEY_ID")
    problem = problem_of(list_bucket, "photos", StoreOptions())
    assert problem.message == "no AWS credentials were found"
    assert "--anonymous" in problem.hint


@pytest.mark.parametrize("action", [list_bucket, list_prefix, fetch_object, fetch_exactly])
def test_a_profile_that_is_not_logged_in_is_told(
    action: Action, aws_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sso = "sso_start_url = https://zoo.awsapps.com/start\nsso_region = us-east-1\nsso_account_id = 1\nsso_role_name = r"
    write_profile(aws_environment, tmp_path, sso)
    aws_environment.setenv("HOME", str(tmp_path))
    problem = problem_of(action, "photos", StoreOptions(endpoint_url="http://127.0.0.1:9", aws_profile="mine"))
    assert "is denied" in problem.message
    assert "aws sso login" in problem.hint


def test_a_profile_without_boto3_is_bad_usage(aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.setitem(sys.modules, "boto3", None)
    problem = problem_of(list_bucket, "photos", StoreOptions(aws_profile="mine"))
    assert isinstance(problem, UsageError)
    assert problem.hint == "pip install 'infermill[aws]'"


@pytest.mark.parametrize("action", [fetch_exactly, list_exactly])
def test_an_unnameable_key_without_boto3_is_told(action: Action, aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.setitem(sys.modules, "boto3", None)
    problem = problem_of(action, "photos", StoreOptions())
    assert isinstance(problem, SourceError)
    assert problem.hint == "pip install 'infermill[aws]'"


def test_an_unnameable_key_outside_s3_is_told() -> None:
    with pytest.raises(SourceError, match="only on S3"):
        open_s3_client(locate("gs://photos"), StoreOptions())


def test_both_clients_put_the_bucket_into_the_path_and_take_the_region_of_the_profile(
    aws_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_profile(aws_environment, tmp_path, "aws_access_key_id = a\naws_secret_access_key = b", "eu-west-1")
    options = StoreOptions(endpoint_url="https://minio.example.com", aws_profile="mine")
    _, client = open_s3_client(locate("s3://photos"), options)
    assert client.generate_presigned_url("head_bucket", {"Bucket": "photos"}).startswith(
        "https://minio.example.com/photos?"
    )
    assert client.meta.region_name == "eu-west-1"


def test_an_azure_uri_names_its_account() -> None:
    place = locate("abfss://photos@zoo.dfs.core.windows.net/x")
    store = open_store(place, StoreOptions())
    assert "photos" in repr(store)
    assert "zoo" in repr(store)


def test_an_azure_uri_without_an_account_is_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UsageError, match="az://photos is in no storage account") as caught:
        open_store(locate("az://photos/x"), StoreOptions())
    assert "AZURE_STORAGE_ACCOUNT_NAME" in caught.value.hint
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "zoo")
    assert isinstance(open_store(locate("az://photos/x"), StoreOptions()), AzureStore)


@pytest.mark.parametrize("uri", ["gs://photos/x", "abfss://photos@zoo.dfs.core.windows.net/x"])
@pytest.mark.parametrize("anonymous", [True, False])
def test_anonymous_requests_are_unsigned_in_every_store(uri: str, anonymous: bool) -> None:
    store = open_store(locate(uri), StoreOptions(anonymous=anonymous))
    assert isinstance(store, GCSStore | AzureStore)
    assert ("skip_signature" in store.config) == anonymous


@pytest.mark.parametrize("name", [None, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://localhost:9000", "user:hunter2@localhost:9000"])
@pytest.mark.parametrize("action", [list_bucket, fetch_exactly])
def test_an_endpoint_without_http_is_bad_usage(
    action: Action, endpoint: str, name: str | None, aws_environment: pytest.MonkeyPatch
) -> None:
    if name is not None:
        aws_environment.setenv(name, endpoint)
    problem = problem_of(action, "photos", StoreOptions(endpoint_url=None if name else endpoint))
    assert isinstance(problem, UsageError)
    assert "'localhost:9000'" in problem.message
    assert "write http://localhost:9000 or https://localhost:9000" in problem.hint
    assert "hunter2" not in str(problem)


def test_the_endpoint_of_an_option_comes_before_the_environment(aws_environment: pytest.MonkeyPatch) -> None:
    assert endpoint_of(StoreOptions()) is None
    aws_environment.setenv("AWS_ENDPOINT_URL", "http://all")
    assert endpoint_of(StoreOptions()) == "http://all"
    aws_environment.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    assert endpoint_of(StoreOptions()) == "http://s3"
    assert endpoint_of(StoreOptions(endpoint_url="HTTPS://mine")) == "HTTPS://mine"
