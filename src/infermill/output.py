"""Rows -> parts, with the protocol that makes each row visible exactly once.

Everything is created once: `_infermill/plan/…`, `_infermill/job.json`, `part-NNNNN.parquet` and `_SUCCESS`. The
first writer wins, whole or not at all; who comes second adopts what is there. A part some of whose rows are
superseded, and `_SUCCESS` after that, are replaced: as a whole, and only as they were read.
"""

import fcntl
import os
import re
import uuid
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, PreconditionError

from infermill.durable import create_durably, private_file
from infermill.errors import InfermillError, StoreError, UsageError
from infermill.parts import claimed_report, part_content, part_name, revised_report
from infermill.patience import Patience, is_passing, patiently
from infermill.reader import open_reader
from infermill.stores import STORE_ERRORS, Location, explain, is_nameable, locate, open_store
from infermill.types import PartitionReport, StoreOptions

if TYPE_CHECKING:
    from io import BufferedReader

    from obstore import ObjectMeta, UpdateVersion

JOB_FILE = "_infermill/job.json"
PLAN_FOLDER = "_infermill/plan"
SUCCESS_FILE = "_SUCCESS"
LOCK_FILE = "_infermill/lock"
_PART = re.compile(r"part-(\d{5,})\.parquet")
Taken = TypeVar("Taken")


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
        self._options = options
        self._store = open_store(self._base, options)

    @property
    def uri(self) -> str:
        return self._base.uri.rstrip("/") or "/"

    def create(self, name: str, content: bytes) -> bool:
        """Create a file whole, unless there is one of that name; False says that there is."""
        place = self._base.joined(name)
        try:
            if place.is_local:
                return create_durably(Path(place.uri), content)
            patiently(lambda: self._store.put(place.path, content, mode="create"), place.uri, self._options)
        except (AlreadyExistsError, FileExistsError) as error:
            if is_passing(error):  # a conflict with another put, to the end
                raise _as_store_error(error, place.uri) from None
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
            return patiently(lambda: self._read_whole(place.path)[0], place.uri, self._options)
        except FileNotFoundError:
            return None
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None

    def _read_whole(self, path: str) -> "tuple[bytes, ObjectMeta]":
        answer = self._store.get(path)
        content = bytes(answer.bytes())
        if len(content) != answer.meta["size"]:
            raise ConnectionError(f"{len(content)} of {answer.meta['size']} bytes came")
        return content, answer.meta

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
        """Delete files that do no harm where they stay; those that are gone already do not matter."""
        with suppress(*STORE_ERRORS):  # of the first one, or each of them would wait for a store that is down
            for name in names:
                self._unlink(self._base.joined(name))

    def remove(self, names: Iterable[str]) -> None:
        """Delete files that must not stay; those that are gone already do not matter."""
        for name in names:
            place = self._base.joined(name)
            try:
                if place.is_local:
                    self._unlink(place)
                else:
                    patiently(partial(self._unlink, place), place.uri, self._options)
            except STORE_ERRORS as error:
                raise _as_store_error(error, place.uri) from None

    def _unlink(self, place: Location) -> None:
        with suppress(FileNotFoundError):
            if place.is_local:
                Path(place.uri).unlink()
            else:
                self._store.delete(place.path)

    def move(self, names: Iterable[str], folder: str) -> None:
        """Move files into a folder below the output, in any order; on object stores, copy and delete."""
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(lambda name: self._move(name, f"{folder}/{name}"), names):
                pass

    def _move(self, name: str, to: str) -> None:
        place, target = self._base.joined(name), self._base.joined(to)
        try:
            if place.is_local:
                Path(target.uri).parent.mkdir(parents=True, exist_ok=True)
                Path(place.uri).replace(target.uri)
            else:
                patiently(lambda: self._store.copy(place.path, target.path), place.uri, self._options)
                self.remove([name])
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None

    def update(self, name: str, revise: Callable[[bytes | None], bytes | None]) -> None:
        """Replace a file by what `revise` makes of it, as if in one step; None leaves it as it is.

        Args:
            name: of the file.
            revise: gets the content, None where there is no such file; called again with the new content where
                somebody else wrote the file meanwhile.
        """
        attempt = self._update_locally if self._base.is_local else self._update_remotely
        patience = Patience(self._options.store_deadline)
        while not attempt(name, revise):
            if not patience.pause():
                raise StoreError(f"{self.uri}/{name} is written by others all the time", "run the same command again")

    def _update_locally(self, name: str, revise: Callable[[bytes | None], bytes | None]) -> bool:
        path, lock = Path(self._base.joined(name).uri), Path(self._base.joined(LOCK_FILE).uri)
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with lock.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                content = self.read(name)
                revised = revise(content)
                if revised is None:
                    return True
                if content is None:
                    return self.create(name, revised)
                with private_file(path, revised) as private:
                    private.replace(path)
        except OSError as error:
            raise _as_store_error(error, str(path)) from None
        return True

    def _update_remotely(self, name: str, revise: Callable[[bytes | None], bytes | None]) -> bool:
        place = self._base.joined(name)
        try:
            content, version = patiently(lambda: self._read_version(place.path), place.uri, self._options)
            revised = revise(content)
            if revised is None:
                return True
            if content is None:
                return self.create(name, revised)
            patiently(lambda: self._store.put(place.path, revised, mode=version), place.uri, self._options)
        except (PreconditionError, FileNotFoundError):
            return False
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None
        return True

    def _read_version(self, path: str) -> "tuple[bytes | None, UpdateVersion]":
        try:
            content, meta = self._read_whole(path)
        except FileNotFoundError:
            return None, {}
        version: UpdateVersion = {}
        if meta["e_tag"] is not None:
            version["e_tag"] = meta["e_tag"]
        if meta["version"] is not None:
            version["version"] = meta["version"]
        return content, version

    def names(self, folder: str = "") -> list[str]:
        """The names directly below the output, or below a folder in it."""
        place = self._base.joined(folder)
        try:
            if place.is_local:
                with os.scandir(place.uri) as entries:
                    return [entry.name for entry in entries if entry.is_file()]
            listing = patiently(lambda: obstore.list_with_delimiter(self._store, place.path), place.uri, self._options)
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
        try:
            first = self.create(name, b"1") or self.read(name) == b"1"
        except InfermillError as error:
            message = error.message.replace(f"/{name}", "")
            raise StoreError(f"the output cannot be written: {message}", error.hint) from None
        try:
            second = self.create(name, b"2")
        finally:
            self.delete([name])
        if not first or second:
            raise StoreError(
                f"the store of {self.uri} does not honour create-if-absent (If-None-Match: *)",
                "write to a store that does: a local folder, Amazon S3, Google Cloud Storage, Azure, MinIO",
            )

    def probe_update(self) -> None:
        """Prove that a file which was written meanwhile is not replaced.

        Raises:
            StoreError: the store ignores the condition, so that two drivers could undo each other's work.
        """
        if self._base.is_local:
            return
        name = f"_infermill/probe-{uuid.uuid4().hex}"
        place = self._base.joined(name)

        def revise(content: bytes | None) -> bytes:
            self._store.put(place.path, b"2")
            return b"3"

        self.create(name, b"1")
        try:
            if self._update_remotely(name, revise):
                raise StoreError(
                    f"the store of {self.uri} does not honour conditional replacement (If-Match)",
                    "rows cannot be superseded there; copy the output to a store that does, or start anew",
                )
        finally:
            self.delete([name])

    def create_part(
        self, partition: int, table: pa.Table, report: PartitionReport, notes: Mapping[str, str]
    ) -> PartitionReport:
        """Write a partition's rows as its part, and return the report of the part that counts.

        Where a twin was faster, or the reply to our own put was lost, that is the part that is there: its report
        is read back from its footer. Both hold the same keys, since these come from the plan.
        """
        name = part_name(partition)
        content = part_content(table, report, notes)
        patience = Patience(self._options.store_deadline)
        while True:
            if self.create(name, content):
                return report
            # What exists may be gone again, and some stores say so of a put under way that may yet fail.
            winner = self._report(name, notes)
            if winner is not None:
                return winner
            if not patience.pause():
                problem = f"{self.uri}/{name} can neither be created nor read"
                raise StoreError(problem, "run the same command again")

    def revise_part(
        self, partition: int, rows: Sequence[int], table: pa.Table, report: PartitionReport, notes: Mapping[str, str]
    ) -> PartitionReport:
        """Supersede rows of a part, which is replaced as a whole, and return the report of the new part.

        Args:
            partition: its number.
            rows: the numbers of the rows in the part, ascending.
            table: the new rows, as many.
            report: of the new rows.
            notes: what the part must have been written with.

        Raises:
            JobMismatchError: the part was not written with the same notes.
        """
        name = part_name(partition)
        revised = report

        def revise(content: bytes | None) -> bytes:
            nonlocal revised
            if content is None:
                raise StoreError(f"{self.uri}/{name} is gone", "`infermill run` with the same arguments restores it")
            whole, previous = self._part_of(name, content, notes)
            order = np.arange(whole.num_rows)
            order[rows] = np.where(_is_late(whole.take(rows), table), rows, whole.num_rows + np.arange(table.num_rows))
            whole = pa.concat_tables([whole, table]).combine_chunks().take(order)
            revised = revised_report(whole, previous, report)
            return part_content(whole, revised, notes)

        self.update(name, revise)
        return revised

    def _part_of(self, name: str, content: bytes, notes: Mapping[str, str]) -> tuple[pa.Table, PartitionReport]:
        uri = self._base.joined(name).uri
        try:
            file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            report = claimed_report(file.metadata.metadata or {}, notes, uri)
            return file.read(use_threads=False).replace_schema_metadata(None), report
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StoreError(f"{uri} is damaged: {error}", "delete it; the same command writes it anew") from None

    def columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Some columns of a part, without reading the others."""
        return self._from(name, lambda file: pq.ParquetFile(file).read(list(columns), use_threads=False))

    def row_group_sizes(self, name: str) -> list[int]:
        """How many rows each row group of a Parquet file has.

        Raises:
            StoreError: it is not there, or it is damaged.
        """
        metadata = self._from(name, pq.read_metadata)
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _from(self, name: str, take: "Callable[[BufferedReader], Taken]") -> Taken:
        place = self._base.joined(name)
        try:
            return self._read_in_pieces(place, take)
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None
        except ValueError as error:
            raise StoreError(f"{place.uri} is damaged: {error}", "`infermill verify` says what else is") from None

    def reports(self, notes: Mapping[str, str], of: Container[int] | None = None) -> dict[int, PartitionReport]:
        """What the parts that are there say of themselves: all of them, or those `of` some partitions.

        Raises:
            JobMismatchError: a part was not written with the same notes.
            StoreError: a part has the name of another one.
        """
        parts = {number: name for number, name in self.parts().items() if of is None or number in of}
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda name: self._report(name, notes), parts.values()))
        reports = {number: report for number, report in zip(parts, found, strict=True) if report is not None}
        for number, report in reports.items():
            if report.partition != number:
                raise StoreError(
                    f"{self.uri}/{parts[number]} holds partition {report.partition}, under the name of another",
                    "move it out of the way; `infermill verify` says what else is wrong",
                )
        return reports

    def _report(self, name: str, notes: Mapping[str, str]) -> PartitionReport | None:
        place = self._base.joined(name)
        try:
            metadata = self._read_in_pieces(place, _footer).metadata or {}
            return claimed_report(metadata, notes, place.uri)
        except FileNotFoundError:
            return None
        except STORE_ERRORS as error:
            raise _as_store_error(error, place.uri) from None
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(place.uri, error) from None

    def _read_in_pieces(self, place: Location, take: "Callable[[BufferedReader], Taken]") -> Taken:
        while True:
            with suppress(PreconditionError), open_reader(place, self._store, self._options) as file:
                return take(file)
            # Another process has replaced it meanwhile, as a whole: its pieces belong together only if all are new.


def _footer(file: "BufferedReader") -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except OSError as error:
        if "thrift" in str(error):  # Arrow's word for bytes that are no footer: nothing is wrong with the disk
            raise ValueError(error) from None
        raise


def damaged(uri: str, error: Exception) -> StoreError:
    """What to say of a part that cannot be read for what is in it."""
    reason = str(error).strip().partition("\n")[0]
    return StoreError(
        f"{uri} is damaged, or infermill did not write it: {reason}",
        "move it out of the way, and `infermill run` with the same arguments predicts its objects again; "
        "`infermill verify` says what else is wrong",
    )


def _is_late(old: pa.Table, new: pa.Table) -> NDArray[np.bool_]:
    """Where a prediction would give way to `changed`: another driver has listed the object later."""
    is_predicted = old["error"].combine_chunks().is_null()
    is_changed = pc.equal(pc.struct_field(new["error"].combine_chunks(), "code"), "changed").fill_null(False)
    return np.asarray(pc.and_(is_predicted, is_changed))


def _as_store_error(error: Exception, uri: str) -> StoreError:
    problem = explain(error, uri)
    return problem if isinstance(problem, StoreError) else StoreError(problem.message, problem.hint)
