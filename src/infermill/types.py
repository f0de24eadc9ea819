"""The frozen values that cross stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["fetch", "decode", "predict"]
FailureCode = Literal[
    "missing",  # deleted after the source was listed
    "changed",  # overwritten after the source was listed: the etag differs
    "unreadable",  # there, but access is denied or the disk cannot read it
    "empty",  # 0 bytes
    "unsupported",  # not an image format that is decoded, whatever its name says
    "truncated",  # ends before the image does
    "corrupt",  # damaged in another way
    "too_large",  # more pixels than `max_pixels`, told from the header before decoding
    "nonfinite",  # the network answered NaN or infinity
]
Task = Literal["classification", "embedding", "raw"]
RuntimeName = Literal["openvino", "onnxruntime"]
DecodeProfile = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """One input as it was listed: its key, its size in bytes (-1: unknown) and its etag (None: unknown)."""

    key: str
    size: int = -1
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an input has no prediction."""

    stage: Stage
    code: FailureCode
    message: str


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How object stores are reached; what is None comes from the environment."""

    endpoint_url: str | None = None
    "URL of an S3-compatible server."
    anonymous: bool = False
    "Send unsigned requests, as public buckets want."
    profile: str | None = None
    "AWS profile, SSO included (needs boto3: the extra `aws`)."
    region: str | None = None
    "AWS region."


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What became of one partition: all that a worker sends back to the driver."""

    partition: int
    ok: int
    failures_by_code: Mapping[str, int] = field(default_factory=dict)
    example_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return sum(self.failures_by_code.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The end of a job in figures; `as_json()` is what `--json` prints and `_SUCCESS` holds.

    `seconds` is wall time of this run. `stage_seconds` are thread-seconds of this run: time spent busy in
    each stage summed over its threads, and `idle`, the time in which a predict thread waited for input.
    """

    planned: int
    ok: int
    failed: int
    failures_by_code: Mapping[str, int]
    example_keys: Mapping[str, str]
    seconds: float
    objects_per_second: float
    stage_seconds: Mapping[str, float]
    workers: int
    model_loads: int
    runtime: str
    precision: str
    digest: str
    output: str

    def as_json(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((slot, getattr(self, slot)) for slot in self.__slots__)
        }
