"""The model card: everything that a prediction depends on.

Plain data, which `card_file` checks where a card is read: this machine's workers get theirs from the driver, and do
without pydantic.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Interval

from infermill.errors import ModelError
from infermill.types import DetectionFormat, Precision, Task

Activation = Literal["softmax", "sigmoid", "none"]
Color = Literal["RGB", "BGR"]
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
ImageDtype = Literal["float32", "float16", "uint8"]
Dtype = Literal[ImageDtype, "float64", "int8", "int16", "int32", "int64", "bool"]
IMAGE_DTYPES: tuple[ImageDtype, ...] = get_args(ImageDtype)
TENSOR_DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Pixels = Annotated[int, Interval(ge=1, le=65_535)]
HeightWidth = tuple[Pixels, Pixels]
PerChannel = tuple[float, float, float]
Part = Annotated[float, Interval(ge=0, le=1)]
DETECTION_FIELDS = (
    "format", "names", "coordinates", "corners", "background", "score_threshold", "iou_threshold", "max_detections",
)  # fmt: skip
_STRICT = {"extra": "forbid", "allow_inf_nan": False}
_ONE_NETWORK = [{"required": ["onnx"]}, {"required": ["symbol", "params"]}, {"required": ["archive"]}]


def _said(description: str) -> dict[str, str]:
    """What the JSON Schema says of a field."""
    return {"description": description}


@dataclass(frozen=True, slots=True)
class _Strict:
    """`card_file` takes no other fields, no NaN and no infinity."""

    __pydantic_config__ = _STRICT

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are not null."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Files(_Strict):
    """The files of the network, relative to the card, absolute, or URIs: ONNX, or an MXNet checkpoint."""

    __pydantic_config__ = _STRICT | {"json_schema_extra": {"oneOf": _ONE_NETWORK}}

    onnx: str | None = field(default=None, metadata=_said("The network as ONNX."))
    symbol: str | None = field(default=None, metadata=_said("The graph of an MXNet checkpoint: PREFIX-symbol.json."))
    params: str | None = field(default=None, metadata=_said("Its parameters: PREFIX-0000.params."))
    archive: str | None = field(default=None, metadata=_said("An archive of MXNet Model Server: .mar or .model."))

    def __post_init__(self) -> None:
        if set(self.given) not in ({"onnx"}, {"symbol", "params"}, {"archive"}):
            raise ValueError("give `onnx`, or `symbol` and `params`, or `archive`")

    @property
    def network(self) -> str:
        """The file to name when something is wrong with the network."""
        return self.onnx or self.symbol or self.archive or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input(_Strict):
    """The network's input tensor."""

    name: str | None = field(default=None, metadata=_said("Its name; the network's only input where it is not given."))
    layout: Literal["NCHW", "NHWC"] = field(default="NCHW", metadata=_said("Order of the dims of images."))
    dtype: Dtype = field(default="float32", metadata=_said("Its type: float32, float16 or uint8 for images."))


@dataclass(frozen=True, kw_only=True, slots=True)
class Resize(_Strict):
    """How the image is resized, with Pillow's filters: `exact` does not keep the aspect ratio, the others do."""

    shorter: Pixels | None = field(default=None, metadata=_said("Length of the shorter side, in pixels."))
    exact: HeightWidth | None = field(default=None, metadata=_said("[height, width], in pixels."))
    letterbox: HeightWidth | None = field(
        default=None, metadata=_said("[height, width], in pixels, that the image is made to fit into, and centred in.")
    )
    filter: Filter = "bilinear"
    fill: Annotated[int, Interval(ge=0, le=255)] = field(
        default=114, metadata=_said("Grey of the border of a letterbox.")
    )

    def __post_init__(self) -> None:
        if [self.shorter, self.exact, self.letterbox].count(None) != 2:
            raise ValueError("give one of `shorter`, `exact` and `letterbox`")


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop(_Strict):
    """What is cut out of the resized image; where the image is smaller, the border is black."""

    center: HeightWidth = field(metadata=_said("[height, width], in pixels."))


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess(_Strict):
    """From the upright RGB image to the network's input: resize, crop, then `(x · scale - mean) / std`."""

    color: Color = "RGB"
    resize: Resize | None = None
    crop: Crop | None = None
    scale: float = 1.0
    mean: PerChannel = (0.0, 0.0, 0.0)
    std: PerChannel = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if 0.0 in self.std:
            raise ValueError("`std` must not be 0")
        if self.crop is not None and self.letterbox is not None:
            raise ValueError("`resize.letterbox` leaves nothing to crop: remove `crop`")

    @property
    def height_width(self) -> HeightWidth | None:
        """The size of the array that preprocessing makes; None where it depends on the image."""
        if self.crop is not None:
            return self.crop.center
        return self.resize.exact or self.resize.letterbox if self.resize is not None else None

    @property
    def letterbox(self) -> HeightWidth | None:
        """The size of the letterbox, if there is one."""
        return self.resize.letterbox if self.resize is not None else None

    @property
    def border(self) -> int:
        """The grey around an image that is smaller than what preprocessing makes."""
        return self.resize.fill if self.resize is not None and self.resize.letterbox is not None else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxOutputs(_Strict):
    """The names of the outputs of a network that has boxes, labels and scores apart."""

    boxes: str = "boxes"
    labels: str = "labels"
    scores: str = "scores"
    count: str | None = field(
        default=None, metadata=_said("The output that says how many of them there are, if any does.")
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Output(_Strict):
    """The network's output tensor, and what is made of it."""

    name: str | None = field(
        default=None,
        metadata=_said("Its name; where it is not given the first output, and every one for the task raw."),
    )
    activation: Activation = field(
        default="none", metadata=_said("Applied to the output: `none` where the network ends in it.")
    )
    top_k: Annotated[int, Interval(ge=1)] = 5
    format: DetectionFormat | None = field(
        default=None, metadata=_said("How a network of the task detection writes its boxes; required there.")
    )
    names: BoxOutputs = field(
        default=BoxOutputs(),
        metadata=_said("The outputs of the formats boxes-labels-scores and boxes-scores, in the place of `name`."),
    )
    coordinates: Literal["pixels", "normalized"] | None = field(
        default=None,
        metadata=_said("Whether boxes are in pixels of the input or in 0..1; by default as the format has it."),
    )
    corners: Literal["xyxy", "yxyx"] = field(
        default="xyxy", metadata=_said("Order of the corners' coordinates in the formats of several outputs.")
    )
    background: Annotated[int, Interval(ge=0)] | None = field(
        default=None, metadata=_said("The class of the format boxes-scores that is nothing, if one is: 0 for SSD.")
    )
    score_threshold: Annotated[float, Interval(ge=0, lt=1)] = field(
        default=0.25, metadata=_said("Detections with more than this score are kept.")
    )
    iou_threshold: Annotated[float, Interval(gt=0, le=1)] = field(
        default=0.45, metadata=_said("Of two boxes of a class that overlap by more than this, the better one is kept.")
    )
    max_detections: Annotated[int, Interval(ge=1, le=1000)] = 100

    @property
    def parts(self) -> dict[str, str]:
        """The outputs of a format that has several: what each holds -> its name."""
        given = self.names.given
        return {part: given[part] for part in ("boxes", "scores")} if self.format == "boxes-scores" else given


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy(_Strict):
    """The part of objects with a label whose best class is the right one, with its 95 % interval."""

    objects: int
    fp32: Part
    fp32_interval: tuple[Part, Part]
    this: Part
    this_interval: tuple[Part, Part]


@dataclass(frozen=True, kw_only=True, slots=True)
class CardEvidence(_Strict):
    """How far this network's answers are from those in fp32, as `infermill quantize` measured it."""

    of: str = field(metadata=_said("Digest of the model in fp32."))
    source: str = field(metadata=_said("Where the objects are from."))
    runtime: str = field(metadata=_said("The library that executed both networks."))
    objects: int = field(
        metadata=_said("How many were compared: what fp32 answers with numbers, less what was calibrated with.")
    )
    measure: Literal["top-1", "cosine", "relative error"] = field(metadata=_said("What `agreement` is."))
    agreement: Part = field(metadata=_said("Part of objects with the same best class; or the mean similarity."))
    interval: tuple[Part, Part] | None = field(default=None, metadata=_said("The 95 % interval of `agreement`."))
    max_delta: float = field(metadata=_said("The largest difference of a score, of an object."))
    mean_delta: float = field(metadata=_said("The mean over objects of their largest difference of a score."))
    nonfinite: int = field(default=0, metadata=_said("Objects that only this network answers with NaN or infinity."))
    accuracy: Accuracy | None = field(default=None, metadata=_said("Where objects have labels."))
    int8_share: Part | None = field(default=None, metadata=_said("The part of multiplications that is in int8."))
    kept_in_float: tuple[str, ...] = field(default=(), metadata=_said("The nodes that are not."))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard(_Strict):
    """A network, and how to use it.

    Example:
        >>> ModelCard(name="tiny", files=Files(onnx="tiny.onnx")).task
        'classification'
    """

    name: str
    files: Files
    task: Task = "classification"
    input: Input = Input()
    preprocess: Preprocess | None = field(
        default=Preprocess(), metadata=_said("From the image to the input; null where the input is a tensor as it is.")
    )
    output: Output = Output()
    precision: Precision = field(
        default="fp32", metadata=_said("What the network computes in, where the runtime and the processor have it.")
    )
    labels: str | tuple[str, ...] | None = field(default=None, metadata=_said("A file of one label a line, or a list."))
    classes: Annotated[int, Interval(ge=1)] | None = field(
        default=None, metadata=_said("How many classes the network must have.")
    )
    evidence: CardEvidence | None = field(
        default=None, metadata=_said("What was measured where this network was made; predictions do not depend on it.")
    )

    @property
    def height_width(self) -> HeightWidth | None:
        """The size of the images that the network is given; None for tensors, and where it depends on the image."""
        return None if self.preprocess is None else self.preprocess.height_width


def plain_fields(card: ModelCard) -> dict[str, Any]:
    """Every field of a card, as plain JSON types."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(card)))
    return fields


def deciding_fields(card: ModelCard) -> dict[str, Any]:
    """What of a card predictions depend on, as plain JSON types: all but its name, paths, labels and evidence."""
    fields = plain_fields(card)
    for name in ("name", "files", "labels", "classes", "evidence"):
        del fields[name]
    # What came later is left out where it says nothing: other cards keep the digest that they had before.
    if card.precision == "fp32":
        del fields["precision"]
    if card.task != "detection":
        for name in DETECTION_FIELDS:
            del fields["output"][name]
    elif card.output.background is None:
        del fields["output"]["background"]
    if card.preprocess is not None and card.preprocess.resize is not None and card.preprocess.letterbox is None:
        for name in ("letterbox", "fill"):
            del fields["preprocess"]["resize"][name]
    return fields


def digest_of(card: ModelCard, labels: tuple[str, ...] | None, files: Mapping[str, Path]) -> str:
    """`sha256:…` over everything that predictions depend on: the card less its name and paths, the labels and
    the bytes of `files` (name in the model -> local file).

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps([deciding_fields(card), labels], sort_keys=True).encode())
    for name, path in sorted(files.items()):
        try:
            with path.open("rb") as file:
                digest.update(f"\0{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    return f"sha256:{digest.hexdigest()}"
