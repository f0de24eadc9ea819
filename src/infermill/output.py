"""Rows -> parts, with the protocol that makes each row visible exactly once.

Everything is created once and never changed: `_infermill/plan/…`, `_infermill/job.json`, `part-NNNNN.parquet`
and `_SUCCESS`. The first writer wins, whole or not at all; who comes second adopts what is there.
"""

import errno
import json
import os
import random
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import AlreadyExistsError

from infermill.errors import JobMismatchError, StoreError, UsageError
from infermill.stores import STORE_ERRORS, Location, explain, is_nameable, locate, open_reader, open_store
from infermill.types import Failure, ObjectRef, PartitionReport, StoreOptions

JOB_FILE = "_infermill/job.json"
PLAN_FOLDER = "_infermill/plan"
SUCCESS_FILE = "_SUCCESS"
ERROR_TYPE = pa.struct([("stage", pa.string()), ("code", pa.string()), ("message", pa.string())])
_PART = re.compile(r"part-(\d{5,})\.parquet")
_REPORT_KEY = "infermill.report"
_WRITE_ID_KEY = "infermill.write_id"
_CONFLICTS = 10


class Output:
    """A folder or a prefix that holds one job.

    Every method raises StoreError where the store refuses or does not answer.
    """

    def __init__(self, uri: str, options: StoreOptions) -> None:
        self._base: Location = locate(uri)
        if not self._base.is_local and not is_nameable(self._base.path.rstrip("/")):
            raise UsageError(
                f"cannot write to {uri!r}: it has a control character, or an empty, `.` or `..` segment",
                "choose another prefix",
            )
        self._store = open_store(self._base, options)

    @property
    def uri(self) -> str:
        return self._base.uri.rstrip("/") or "/"

    def create(self, name: str, content: bytes) -> bool:
        """Create a file whole, unless there is one of that name; False says that there is."""
        place = self._base.joined(name)
        try:
            if place.is_local:
                return _create_locally(Path(place.uri), content)
            self._store.put(place.path, content, mode="create")
        except (AlreadyExistsError, FileExistsError):
            return False
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None
        return True

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""
        place = self._base.joined(name)
        try:
            if place.is_local:
                return Path(place.uri).read_bytes()
            return bytes(self._store.get(place.path).bytes())
        except FileNotFoundError:
            return None
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None

    def read_existing(self, name: str) -> bytes:
        """The content of a file that must be there.

        Raises:
            StoreError: it is not.
        """
        content = self.read(name)
        if content is None:
            raise StoreError(f"{self.uri}/{name} is gone", "the output is damaged; start anew in another place")
        return content

    def delete(self, names: Sequence[str]) -> None:
        """Delete files; those that are gone already do not matter."""
        for name in names:
            place = self._base.joined(name)
            with suppress(*STORE_ERRORS):
                if place.is_local:
                    Path(place.uri).unlink()
                else:
                    self._store.delete(place.path)

    def names(self, folder: str = "") -> list[str]:
        """The names directly below the output, or below a folder in it."""
        place = self._base.joined(folder)
        try:
            if place.is_local:
                with os.scandir(place.uri) as entries:
                    return [entry.name for entry in entries if entry.is_file()]
            listing = obstore.list_with_delimiter(self._store, place.path)
        except FileNotFoundError:
            return []
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None
        return [entry["path"].rpartition("/")[2] for entry in listing["objects"]]

    def parts(self) -> dict[int, str]:
        """The parts that are there: partition -> name."""
        matches = ((name, _PART.fullmatch(name)) for name in self.names())
        return {int(match[1]): name for name, match in matches if match}

    def probe(self) -> None:
        """Prove that the place can be written, and that a second create of the same name is refused.

        Raises:
            StoreError: it cannot, or the store ignores create-if-absent, so that two workers could both win.
        """
        name = f"_infermill/probe-{uuid.uuid4().hex}"
        # Where the reply to the first create was lost, the object store client has sent it twice.
        first = self.create(name, b"1") or self.read(name) == b"1"
        try:
            second = self.create(name, b"2")
        finally:
            self.delete([name])
        if not first or second:
            raise StoreError(
                f"the store of {self.uri} does not honour create-if-absent (If-None-Match: *)",
                "write to a store that does: a local folder, Amazon S3, Google Cloud Storage, Azure, MinIO",
            )

    def create_part(
        self, partition: int, table: pa.Table, report: PartitionReport, notes: Mapping[str, str]
    ) -> PartitionReport:
        """Write a partition's rows as its part, and return the report of the part that counts.

        Where a twin was faster, or the reply to our own put was lost, that is the part that is there: its report
        is read back from its footer. Both hold the same keys, since these come from the plan.
        """
        name = part_name(partition)
        metadata = {f"infermill.{key}": value for key, value in notes.items()}
        metadata[_WRITE_ID_KEY] = uuid.uuid4().hex
        metadata[_REPORT_KEY] = json.dumps(asdict(report))
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        for _ in range(_CONFLICTS):
            if self.create(name, content):
                return report
            # "Already exists" may also be a 409, a conflict with a put under way that may yet fail.
            winner = self._report(name, notes)
            if winner is not None:
                return winner
            time.sleep(random.uniform(0.1, 1.0))  # noqa: S311
        raise StoreError(f"{self.uri}/{name} can neither be created nor read", "run the same command again")

    def reports(self, names: Iterable[str], notes: Mapping[str, str]) -> list[PartitionReport]:
        """What the parts say of themselves, from their footers.

        Raises:
            JobMismatchError: a part was not written with the same notes.
        """
        with ThreadPoolExecutor(16) as pool:
            return [report for report in pool.map(lambda name: self._report(name, notes), names) if report is not None]

    def _report(self, name: str, notes: Mapping[str, str]) -> PartitionReport | None:
        place = self._base.joined(name)
        try:
            with open_reader(place, self._store) as file:
                metadata = pq.read_metadata(file).metadata or {}
            for note, value in notes.items():
                if metadata[f"infermill.{note}".encode()] != value.encode():
                    raise JobMismatchError(f"{place.uri} belongs to another job", "move it out of the way")
            return PartitionReport(**json.loads(metadata[_REPORT_KEY.encode()]))
        except FileNotFoundError:
            return None
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"infermill did not write {place.uri}: {error}", "move it out of the way") from None

    def tables(self) -> Iterator[pa.Table]:
        """The rows, part by part in the order of the plan."""
        for _, name in sorted(self.parts().items()):
            content = self.read(name)
            if content is not None:
                # Not `pq.read_table`: its threads may hold `content` until after the interpreter has ended, and abort.
                part = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
                yield part.replace_schema_metadata(None)


def part_name(partition: int) -> str:
    return f"part-{partition:05d}.parquet"


def rows_table(
    refs: Sequence[ObjectRef], columns: "Mapping[str, pa.Array[Any]]", failures: Mapping[int, Failure]
) -> pa.Table:
    """The rows of a partition: key, etag, size, the task's columns and error (null where there is a prediction)."""
    errors = [None if row not in failures else asdict(failures[row]) for row in range(len(refs))]
    return pa.table(
        {
            "key": pa.array([ref.key for ref in refs], pa.string()),
            "etag": pa.array([ref.etag for ref in refs], pa.string()),
            "size": pa.array([None if ref.size < 0 else ref.size for ref in refs], pa.int64()),
            **columns,
            "error": pa.array(errors, ERROR_TYPE),
        }
    )


def read(output: str | os.PathLike[str], options: StoreOptions | None = None) -> pa.Table:
    """All rows of a job as one Arrow table, in the order of the plan.

    Returns:
        key, etag, size, the prediction column of the task (`top`, `embedding` or `outputs`) and `error`.

    Raises:
        UsageError: no part is there.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> read("out/").column_names  # doctest: +SKIP
        ['key', 'etag', 'size', 'top', 'error']
    """
    return pa.concat_tables(_tables(output, options))


def read_batches(output: str | os.PathLike[str], options: StoreOptions | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a job as Arrow batches, one part in memory at a time; else like `read`."""
    for table in _tables(output, options):
        yield from table.to_batches()


def _tables(output: str | os.PathLike[str], options: StoreOptions | None) -> Iterator[pa.Table]:
    place = Output(os.fspath(output), options or StoreOptions())
    empty = True
    for table in place.tables():
        empty = False
        yield table
    if empty:
        raise UsageError(f"{place.uri} holds no part-*.parquet", "name the folder that `infermill run -o` wrote")


def _create_locally(path: Path, content: bytes) -> bool:
    """A private file, made durable and then linked to its name: there whole, or not at all, after a crash too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    private = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with private.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(private, path)
        except PermissionError:  # the private file was written, so that it is not this
            raise OSError(errno.ENOTSUP, "the file system does not support hard links") from None
    finally:
        private.unlink(missing_ok=True)
    return True


def _as_store_error(error: Exception, uri: str) -> StoreError:
    problem = explain(error, uri)
    return problem if isinstance(problem, StoreError) else StoreError(problem.message, problem.hint)
