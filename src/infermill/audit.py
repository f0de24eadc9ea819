"""What an output holds: told from its footers (`status`), or proved by reading all of it (`verify`)."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infermill.errors import JobMismatchError, UsageError
from infermill.output import PLAN_FOLDER, SUCCESS_FILE, Output, damaged
from infermill.parts import ERROR_TYPE, claimed_report, is_intact, part_name
from infermill.record import Record, differing_totals, read_record, totals_of
from infermill.sources.shards import label_type
from infermill.types import PartitionReport, StoreOptions

THREADS = 4
MAX_PROBLEMS = 50
PREDICTIONS = ("top", "embedding", "outputs", "detections")


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """One partition; `ok` and `failed` are null while it has no part."""

    partition: int
    planned: int
    ok: int | None
    failed: int | None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How far a job is. `done` counts the objects with a row; `left` those without."""

    output: str
    planned: int
    done: int
    ok: int
    failed: int
    left: int
    partitions: int
    partitions_done: int
    partitions_left: int
    failures_by_code: Mapping[str, int]
    example_keys: Mapping[str, str]
    success: bool
    "Whether there is a _SUCCESS."
    appended: int
    "How often the job was appended to."
    by_partition: tuple[PartitionStatus, ...]

    def as_json(self) -> dict[str, Any]:
        """The status as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found; `problems` holds the first 50 of `problem_count`."""

    output: str
    partitions: int
    objects: int
    ok: int
    failed: int
    problems: tuple[str, ...]
    problem_count: int

    def as_json(self) -> dict[str, Any]:
        """The findings as plain JSON types."""
        return asdict(self)


def status(output: str | os.PathLike[str], options: StoreOptions | None = None) -> JobStatus:
    """How far a job is, from its record and the footers of its parts; the model is not needed.

    Raises:
        UsageError: there is no job.
        JobMismatchError: a part belongs to another job, or the record is damaged.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> status("out/").left  # doctest: +SKIP
        0
    """
    place, record = _job_in(output, options)
    found = place.reports(record.notes)
    reports = {number: report for number, report in found.items() if number < record.partitions}
    files = [f"{PLAN_FOLDER}/{name}" for plan in record.plans for name, _ in plan.files]
    with ThreadPoolExecutor(16) as pool:
        planned = [size for sizes in pool.map(place.row_group_sizes, files) for size in sizes]
    by_partition = tuple(
        PartitionStatus(number, size, reports[number].ok, reports[number].failed)
        if number in reports
        else PartitionStatus(number, size, None, None)
        for number, size in enumerate(planned)
    )
    codes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for _, report in sorted(reports.items()):
        codes.update(report.failures_by_code)
        examples = dict(report.example_keys) | examples
    ok = sum(report.ok for report in reports.values())
    done = ok + codes.total()
    return JobStatus(
        output=place.uri,
        planned=record.objects,
        done=done,
        ok=ok,
        failed=codes.total(),
        left=record.objects - done,
        partitions=record.partitions,
        partitions_done=len(reports),
        partitions_left=record.partitions - len(reports),
        failures_by_code=dict(codes.most_common()),
        example_keys=examples,
        success=SUCCESS_FILE in place.names(),
        appended=len(record.plans) - 1,
        by_partition=by_partition,
    )


def verify(output: str | os.PathLike[str], options: StoreOptions | None = None) -> Verification:
    """Read everything, and say what is not as it must be: parts, rows, plan and _SUCCESS; the model is not needed.

    Raises:
        UsageError: there is no job.
        JobMismatchError: the record is damaged.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> verify("out/").problems  # doctest: +SKIP
        ()
    """
    place, record = _job_in(output, options)
    audit = _Audit(place, record)
    audit.read_partitions()
    audit.compare_files()
    audit.compare_success()
    reports = audit.reports.values()
    return Verification(
        output=place.uri,
        partitions=record.partitions,
        objects=record.objects,
        ok=sum(report.ok for report in reports),
        failed=sum(report.failed for report in reports),
        problems=tuple(audit.problems[:MAX_PROBLEMS]),
        problem_count=len(audit.problems),
    )


def _job_in(output: str | os.PathLike[str], options: StoreOptions | None) -> tuple[Output, Record]:
    place = Output(os.fspath(output), options or StoreOptions())
    record = read_record(place)
    if record is None:
        raise UsageError(f"{place.uri} holds no job", "name the folder that `infermill run -o` wrote")
    return place, record


@dataclass(frozen=True, slots=True)
class _Finding:
    """One partition, as it was read; the report is counted from its rows."""

    problems: Sequence[str]
    report: PartitionReport | None = None
    schema: pa.Schema | None = None


@dataclass
class _Audit:
    place: Output
    record: Record
    problems: list[str] = field(default_factory=list)
    reports: dict[int, PartitionReport] = field(default_factory=dict)
    schema: pa.Schema | None = None

    def read_partitions(self) -> None:
        """Read every part against its partition, a few at a time."""
        with ThreadPoolExecutor(THREADS) as pool:
            for plan in self.record.plans:
                digest = hashlib.sha256()
                for name, numbers in plan.files:
                    content = self.place.read(f"{PLAN_FOLDER}/{name}") or b""
                    digest.update(content)
                    planned = _keys(content, len(numbers))
                    if planned[0] is None:
                        self.problems.append(f"the plan file {name} is missing or damaged")
                    for finding in pool.map(self._read_part, numbers, planned):
                        self._note(finding)
                if digest.hexdigest() != plan.sha256:
                    self.problems.append(f"the plan {plan.plan_id} is not as it was written: its sha256 differs")

    def _note(self, finding: _Finding) -> None:
        self.problems.extend(finding.problems)
        if finding.report is None or finding.schema is None:
            return
        self.reports[finding.report.partition] = finding.report
        self.schema = self.schema or finding.schema
        if finding.schema != self.schema:
            self.problems.append(f"{part_name(finding.report.partition)} has another schema than the parts before it")

    def _read_part(self, number: int, planned: pa.ChunkedArray | None) -> _Finding:
        name = part_name(number)
        content = self.place.read(name)
        if content is None:
            return _Finding([f"{name} is missing"])
        try:
            file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            told = claimed_report(file.metadata.metadata or {}, self.record.notes, name)
            rows = file.read(use_threads=False)
        except JobMismatchError:
            return _Finding([f"{name} belongs to another job"])
        except (pa.ArrowException, ValueError, KeyError, TypeError, OSError) as error:
            return _Finding([damaged(name, error).message])
        problems = [] if is_intact(content) else [f"{name} is not as it was written: its sha256 differs"]
        if planned is not None and not rows["key"].equals(planned):
            problems.append(f"{name} does not hold the keys of its partition")
        if not _is_declared(rows.schema, label_type(self.record.source)):
            return _Finding([*problems, f"{name} does not have the columns of a part"])
        failed = pc.is_valid(rows["error"])
        odd = pc.sum(pc.equal(pc.is_valid(rows.column(-2)), failed)).as_py()
        if odd:
            problems.append(f"{name} has {odd} rows with neither or both of a prediction and an error")
        codes = Counter(pc.struct_field(rows["error"], "code").drop_null().to_pylist())
        counted = replace(told, partition=number, ok=rows.num_rows - codes.total(), failures_by_code=dict(codes))
        if (counted.partition, counted.ok, counted.failures_by_code) != (
            told.partition,
            told.ok,
            told.failures_by_code,
        ):
            problems.append(f"{name} says {told.ok} predicted and {told.failed} failed of itself, and holds other rows")
        return _Finding(problems, counted, rows.schema.remove_metadata())

    def compare_files(self) -> None:
        """Look for what a reader of `*.parquet` would take for a part."""
        expected = {part_name(number) for number in range(self.record.partitions)}
        self.problems += [
            f"{name} is no part of this job, and its rows are read with the others"
            for name in sorted(self.place.names())
            if name.endswith(".parquet") and name not in expected
        ]

    def compare_success(self) -> None:
        """Compare the totals that were declared with those of the rows."""
        content = self.place.read(SUCCESS_FILE)
        if content is None:
            self.problems.append("there is no _SUCCESS: the job is not finished")
            return
        if len(self.reports) < self.record.partitions:
            self.problems.append("there is a _SUCCESS, though not every part can be read")
            return
        totals = totals_of(self.record.objects, self.reports)
        self.problems += [f"_SUCCESS has other {name} than the parts" for name in differing_totals(content, totals)]


def _keys(content: bytes, partitions: int) -> list[pa.ChunkedArray | None]:
    """The keys of each partition of a plan file; None where it cannot be read."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        return [file.read_row_group(place, ["key"], use_threads=False)["key"] for place in range(partitions)]
    except (pa.ArrowException, OSError, IndexError):
        return [None] * partitions


def _is_declared(schema: pa.Schema, label: pa.DataType | None) -> bool:
    types = {"key": pa.string(), "etag": pa.string(), "size": pa.int64()}
    if label is not None:
        types["label"] = label
    types["error"] = ERROR_TYPE
    return (
        [*schema.names[:-2], *schema.names[-1:]] == list(types)
        and schema.names[-2] in PREDICTIONS
        and all(schema.field(name).type == kind for name, kind in types.items())
    )
