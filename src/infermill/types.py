"""The frozen values that cross stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

Stage = Literal["fetch", "decode", "predict"]
FailureCode = Literal[
    "missing",  # deleted after the source was listed
    "changed",  # overwritten after the source was listed: the etag differs
    "unreadable",  # there, but access is denied or the disk cannot read it
    "empty",  # 0 bytes
    "unsupported",  # not a format that is decoded, whatever its name says; or a tensor that does not fit
    "truncated",  # ends before the image or the tensor does
    "store",  # the store failed on this object, and on no other, until the deadline
    "corrupt",  # damaged in another way
    "too_large",  # more pixels than `max_pixels`, told from the header before decoding
    "nonfinite",  # the network answered NaN or infinity
    "native_crash",  # decoding or predicting it ended the process
    "oom",  # there was no memory for it
    "timeout",  # it took longer than `item_timeout`
]
RETRYABLE: tuple[FailureCode, ...] = ("missing", "unreadable", "store", "native_crash", "oom", "timeout")
"Failures that may pass: predicting the same object once more can end otherwise."
Task = Literal["classification", "embedding", "raw", "detection"]
DetectionFormat = Literal["mxnet-ssd", "yolov5", "yolov8", "yolov10", "boxes-labels-scores", "boxes-scores"]
MAX_PIXELS = 178_956_970
"Pillow's own limit, beyond which it calls an image a decompression bomb."
RuntimeName = Literal["openvino", "onnxruntime", "mxnet"]
Precision = Literal["fp32", "fp16", "bf16"]
DecodeProfile = Literal["exact", "fast"]
EngineName = Literal["local", "spark"]
ShardFormat = Literal["recordio", "tar", "cifar10", "cifar100"]
Split = Literal["train", "test", "all"]
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
Label = str | int | list[float] | None
IN_NO_SHARD = -1
"The offset of an object that lies in no shard, or no more."
DAMAGED = -2
"The offset of a row that stands for what is lost of a damaged shard."


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """One input as it was listed: its key, its size in bytes (-1: unknown) and its etag (None: unknown).

    A member of a shard has the etag of the shard, and the key `shard#member`.
    """

    key: str
    size: int = -1
    etag: str | None = None
    offset: int = IN_NO_SHARD
    "Where its bytes begin in the shard."
    label: Label = None
    "What the shard says that it is."


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an input has no prediction."""

    stage: Stage
    code: FailureCode
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """How object stores are reached; what is None comes from the environment."""

    endpoint_url: str | None = None
    "URL of an S3-compatible server."
    anonymous: bool = False
    "Send unsigned requests, as public buckets want."
    aws_profile: str | None = None
    "AWS profile, SSO included (needs boto3: the extra `aws`)."
    region: str | None = None
    "AWS region."
    store_deadline: float = 180.0
    "Seconds for which a store that does not answer is asked again, before the job stops and can be resumed."
    allow_host: tuple[str, ...] = ()
    "Fetch the http(s):// objects of a manifest that lie on this host, host:port or *.domain; repeat it for several."


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(StoreOptions):
    """How a job is run; every field is a flag of the command line with the same name.

    `suffix`, `limit`, `decode` and `max_pixels` change what is predicted, and belong to the fingerprint of the job.
    """

    suffix: tuple[str, ...] | None = None
    "Take only keys that end so; repeat it for several, '' for all. (default: the image formats, or .npy)"
    limit: int | None = None
    "Take only the first N objects of the listing."
    runtime: RuntimeName = "openvino"
    "The library that executes the network."
    runtime_python: str | None = None
    "The Python that has mxnet, for the runtime of that name. (default: INFERMILL_MXNET_PYTHON, or one made for it)"
    decode: DecodeProfile = "exact"
    "`exact`: pixel for pixel what Pillow gives. `fast`: DCT scaling and a SIMD resizer."
    threads: int | None = None
    "Threads that decode and run the network, in each worker. (default: one a core)"
    batch: int | None = None
    "Rows of a batch. (default: probed where the job is long enough)"
    workers: int = 1
    "Worker processes, each with the network loaded and its share of the cores."
    item_timeout: float = 300.0
    "Seconds that decoding an object, or predicting a batch, may take before it is a failure."
    max_pixels: int = MAX_PIXELS
    "Images with more pixels than this are failures, told before they are decoded."
    max_failures: str | int | None = None
    "Budget of failures, as a number or in percent (1%); the command line ends with exit code 3 beyond it."
    profile: bool = False
    "Leave in the output what each thread of each worker did and when, as traces for https://ui.perfetto.dev."
    engine: EngineName = "local"
    "Where the workers run: on this machine, or as executors of Apache Spark."
    master: str | None = None
    "Spark's master: local[N], spark://host:7077, yarn, k8s://…. (default: local[*])"
    remote: str | None = None
    "A Spark Connect server to run on: sc://host:15002."
    conf: tuple[str, ...] = ()
    "A Spark setting, key=value; repeat it for several."
    partition_objects: int = 512
    "Objects a partition, at most."
    partition_bytes: int = 64 << 20
    "Bytes of input a partition, at most."

    def for_workers(self) -> "Options":
        """Without what only the driver needs, which may hold secrets: a token in `remote`, passwords in `conf`."""
        return replace(self, engine="local", master=None, remote=None, conf=())


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """What a model card would say, for a bare `.onnx`; what is given here also overrides a card."""

    task: Task | None = None
    "What the network does. (default: guessed from its output)"
    epoch: int | None = None
    "Which epoch of an MXNet checkpoint. (default: the newest)"
    labels: str | None = None
    "A file of one label a line."
    classes: int | None = None
    "How many classes the network must have."
    shorter: int | None = None
    "Resize the shorter side to so many pixels."
    exact: tuple[int, int] | None = None
    "Resize to this height and width."
    letterbox: tuple[int, int] | None = None
    "Resize to fit into this height and width, and centre it there, as YOLO networks want it."
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = None
    "Resize with this filter of Pillow's."
    crop: tuple[int, int] | None = None
    "Cut this height and width out of the centre."
    color: Literal["RGB", "BGR"] | None = None
    "Order of the colours that the network was trained with."
    scale: float | None = None
    "Factor for the pixels 0..255, before mean and std."
    mean: tuple[float, float, float] | None = None
    "Subtracted from the scaled pixels."
    std: tuple[float, float, float] | None = None
    "Divides the scaled pixels less the mean."
    layout: Literal["NCHW", "NHWC"] | None = None
    "Layout of the network's input."
    precision: Precision | None = None
    "What the network computes in, where the runtime and the processor have it. (default: fp32)"
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    "Applied to the network's output."
    top_k: int | None = None
    "How many classes are kept."
    format: DetectionFormat | None = None
    "How a network of the task detection writes its boxes. (default: guessed from its output)"
    score_threshold: float | None = None
    "Detections with more than this score are kept."
    iou_threshold: float | None = None
    "Of two boxes of a class that overlap by more than this, the better one is kept."
    max_detections: int | None = None
    "How many detections of an image are kept, best first."


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetHome:
    """Where CIFAR-10 is downloaded from, where no archive is given."""

    url: str = CIFAR10_URL
    "Address of the archive."
    sha256: str = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    "What the archive must be, in hex."


@dataclass(frozen=True, slots=True)
class Source:
    """What to predict on. `root` is what keys are relative to: a folder, or `s3://bucket`."""

    root: str
    keys_are_uris: bool = False
    "The keys of a manifest are URIs or paths as they were written; only relative paths hang below `root`."
    shards: ShardFormat | None = None
    "The keys are `shard#member`, and the shards are of this format."

    @property
    def is_local(self) -> bool:
        """Every object is a file of this machine; the keys of a manifest may be anywhere."""
        return self.root.startswith("/") and not self.keys_are_uris


class Assignment(NamedTuple):
    """A partition that a worker is to do, and the rows of it that are known to fail."""

    partition: int
    verdicts: Mapping[int, Failure] = {}


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What became of one partition: all that a worker sends back to the driver."""

    partition: int
    ok: int
    runtime: str
    precision: str
    failures_by_code: Mapping[str, int] = field(default_factory=dict)
    example_keys: Mapping[str, str] = field(default_factory=dict)
    choice: Mapping[str, int | str] = field(default_factory=dict)
    "Streams, batch and threads of the worker, and the reason; empty where infermill did not yet say so."

    @property
    def failed(self) -> int:
        return sum(self.failures_by_code.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The end of a job in figures; `as_json()` is what `--json` prints and `_SUCCESS` holds.

    `new`, `changed` and `unchanged` count the objects that were listed to append, and `retried` the rows that were
    predicted again; null where nothing was appended or retried.

    `seconds` is wall time of this run. `stage_seconds` are thread-seconds of this run: time spent busy in
    each stage summed over its threads, and `idle`, the time in which a compute thread had nothing to do.
    `idle_seconds` has that as `compute`, of it as `network` the time in which objects waited for the network with it,
    and as `fetch` the time in which fetch threads waited for room or the plan.
    `queue_depths` are the mean numbers of objects that waited to be decoded, and to be predicted, whenever a compute
    thread looked for work. `verdict` says in a sentence what sets the pace.
    """

    planned: int
    ok: int
    failed: int
    failures_by_code: Mapping[str, int]
    example_keys: Mapping[str, str]
    seconds: float
    objects_per_second: float
    stage_seconds: Mapping[str, float]
    idle_seconds: Mapping[str, float]
    queue_depths: Mapping[str, float]
    verdict: str
    workers: int
    model_loads: int
    halved_batches: int
    "How often a batch was cut in two because memory ran out."
    runtime: str
    precision: str
    choice: Mapping[str, int | str]
    "Streams, rows of a batch and threads of a worker, and the reason; `others`: how many other choices there were."
    digest: str
    output: str
    new: int | None = None
    changed: int | None = None
    unchanged: int | None = None
    retried: int | None = None
    profile: str | None = None
    "Where the traces of the workers are, if they were asked for."

    def as_json(self) -> dict[str, Any]:
        """The summary as plain JSON types."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((slot, getattr(self, slot)) for slot in self.__slots__)
        }
