"""Rows -> the bytes of a part, and what its footer says of them."""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infermill.errors import JobMismatchError
from infermill.types import Failure, ObjectRef, PartitionReport

ERROR_TYPE = pa.struct([("stage", pa.string()), ("code", pa.string()), ("message", pa.string())])
_REPORT_KEY = "infermill.report"
_WRITE_ID_KEY = "infermill.write_id"
_SHA256_KEY = "infermill.sha256"


def part_name(partition: int) -> str:
    return f"part-{partition:05d}.parquet"


def rows_table(
    refs: Sequence[ObjectRef],
    columns: "Mapping[str, pa.Array[Any]]",
    failures: Mapping[int, Failure],
    label: pa.DataType | None = None,
) -> pa.Table:
    """The rows of a partition: key, etag, size, the task's columns and error (null where there is a prediction).

    Where the source has labels, of the type `label`, they come before the task's columns.
    """
    labels = {} if label is None else {"label": pa.array([ref.label for ref in refs], label)}
    return pa.table(
        {
            "key": pa.array([ref.key for ref in refs], pa.string()),
            "etag": pa.array([ref.etag for ref in refs], pa.string()),
            "size": pa.array([None if ref.size < 0 else ref.size for ref in refs], pa.int64()),
            **labels,
            **columns,
            "error": errors_column(failures, len(refs)),
        }
    )


def errors_column(failures: Mapping[int, Failure], rows: int) -> "pa.Array[Any]":
    """The failures by row; null where there is none."""
    return pa.array([None if row not in failures else asdict(failures[row]) for row in range(rows)], ERROR_TYPE)


def is_intact(content: bytes) -> bool:
    """Whether the rows of a part are, byte for byte, those that infermill wrote."""
    footer_bytes = int.from_bytes(content[-8:-4], "little")
    metadata = pq.read_metadata(pa.BufferReader(content)).metadata or {}
    digest = hashlib.sha256(memoryview(content)[: -8 - footer_bytes]).hexdigest()
    return bool(metadata.get(_SHA256_KEY.encode()) == digest.encode())


def part_content(table: pa.Table, report: PartitionReport, notes: Mapping[str, str]) -> bytes:
    """The bytes of a part: its rows, and in its footer who wrote it and what it holds."""
    metadata = {f"infermill.{key}": value for key, value in notes.items()}
    metadata[_WRITE_ID_KEY] = uuid.uuid4().hex
    metadata[_REPORT_KEY] = json.dumps(asdict(report))
    table = table.replace_schema_metadata(metadata)
    sink = BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_SHA256_KEY: hashlib.sha256(sink.getbuffer()).hexdigest()})
    return sink.getvalue()


def claimed_report(metadata: Mapping[bytes, bytes], notes: Mapping[str, str], uri: str) -> PartitionReport:
    """The report in a part's footer.

    Raises:
        JobMismatchError: the part was not written with these notes.
        KeyError, TypeError, ValueError: infermill did not write it.
    """
    for note, value in notes.items():
        if metadata[f"infermill.{note}".encode()] != value.encode():
            raise JobMismatchError(f"{uri} belongs to another job", "move it out of the way")
    return PartitionReport(**json.loads(metadata[_REPORT_KEY.encode()]))


def revised_report(whole: pa.Table, previous: PartitionReport, added: PartitionReport) -> PartitionReport:
    """The report of a part in which rows were superseded; it names all runtimes that took part."""
    failed = whole.filter(whole["error"].is_valid()).select(["key", "error"]).to_pylist()
    examples: dict[str, str] = {}
    for row in failed:
        examples.setdefault(row["error"]["code"], row["key"])
    return replace(
        added,
        ok=whole.num_rows - len(failed),
        runtime=", ".join(sorted({*previous.runtime.split(", "), *added.runtime.split(", ")})),
        precision=", ".join(sorted({*previous.precision.split(", "), *added.precision.split(", ")})),
        failures_by_code=dict(Counter(row["error"]["code"] for row in failed)),
        example_keys=examples,
        choice=previous.choice or added.choice,  # of most of its rows
    )
