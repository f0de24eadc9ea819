"""The model card: everything that a prediction depends on."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infermill.errors import ModelError
from infermill.types import DetectionFormat, Precision, Task

Activation = Literal["softmax", "sigmoid", "none"]
Color = Literal["RGB", "BGR"]
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
ImageDtype = Literal["float32", "float16", "uint8"]
Dtype = Literal[ImageDtype, "float64", "int8", "int16", "int32", "int64", "bool"]
IMAGE_DTYPES: tuple[ImageDtype, ...] = get_args(ImageDtype)
TENSOR_DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Pixels = Annotated[int, Field(ge=1, le=65_535)]
HeightWidth = tuple[Pixels, Pixels]
PerChannel = tuple[float, float, float]
DETECTION_FIELDS = {
    "format", "names", "coordinates", "corners", "score_threshold", "iou_threshold", "max_detections",
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Files(_Strict):
    """The files of the network, relative to the card, absolute, or URIs: ONNX, or an MXNet checkpoint."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["onnx"]}, {"required": ["symbol", "params"]}, {"required": ["archive"]}]
        }
    )

    onnx: str | None = Field(default=None, description="The network as ONNX.")
    symbol: str | None = Field(default=None, description="The graph of an MXNet checkpoint: PREFIX-symbol.json.")
    params: str | None = Field(default=None, description="Its parameters: PREFIX-0000.params.")
    archive: str | None = Field(default=None, description="An archive of MXNet Model Server: .mar or .model.")

    @model_validator(mode="after")
    def _one_network(self) -> "Files":
        if {name for name, value in self if value is not None} not in ({"onnx"}, {"symbol", "params"}, {"archive"}):
            raise ValueError("give `onnx`, or `symbol` and `params`, or `archive`")
        return self

    @property
    def network(self) -> str:
        """The file to name when something is wrong with the network."""
        return self.onnx or self.symbol or self.archive or ""


class Input(_Strict):
    """The network's input tensor."""

    name: str | None = Field(default=None, description="Its name; the network's only input where it is not given.")
    layout: Literal["NCHW", "NHWC"] = Field(default="NCHW", description="Order of the dims of images.")
    dtype: Dtype = Field(default="float32", description="Its type: float32, float16 or uint8 for images.")


class Resize(_Strict):
    """How the image is resized, with Pillow's filters: `exact` does not keep the aspect ratio, the others do."""

    shorter: Pixels | None = Field(default=None, description="Length of the shorter side, in pixels.")
    exact: HeightWidth | None = Field(default=None, description="[height, width], in pixels.")
    letterbox: HeightWidth | None = Field(
        default=None, description="[height, width], in pixels, that the image is made to fit into, and centred in."
    )
    filter: Filter = "bilinear"
    fill: Annotated[int, Field(ge=0, le=255)] = Field(default=114, description="Grey of the border of a letterbox.")

    @model_validator(mode="after")
    def _one_of_three(self) -> "Resize":
        if [self.shorter, self.exact, self.letterbox].count(None) != 2:
            raise ValueError("give one of `shorter`, `exact` and `letterbox`")
        return self


class Crop(_Strict):
    """What is cut out of the resized image; where the image is smaller, the border is black."""

    center: HeightWidth = Field(description="[height, width], in pixels.")


class Preprocess(_Strict):
    """From the upright RGB image to the network's input: resize, crop, then `(x · scale - mean) / std`."""

    color: Color = "RGB"
    resize: Resize | None = None
    crop: Crop | None = None
    scale: float = 1.0
    mean: PerChannel = (0.0, 0.0, 0.0)
    std: PerChannel = (1.0, 1.0, 1.0)

    @model_validator(mode="after")
    def _nonzero_std(self) -> "Preprocess":
        if 0.0 in self.std:
            raise ValueError("`std` must not be 0")
        return self

    @model_validator(mode="after")
    def _no_cropped_letterbox(self) -> "Preprocess":
        if self.crop is not None and self.letterbox is not None:
            raise ValueError("`resize.letterbox` leaves nothing to crop: remove `crop`")
        return self

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


class BoxOutputs(_Strict):
    """The names of the outputs of a network that has boxes, labels and scores apart."""

    boxes: str = "boxes"
    labels: str = "labels"
    scores: str = "scores"
    count: str | None = Field(default=None, description="The output that says how many of them there are, if any does.")


class Output(_Strict):
    """The network's output tensor, and what is made of it."""

    name: str | None = Field(
        default=None, description="Its name; where it is not given the first output, and every one for the task raw."
    )
    activation: Activation = Field(
        default="none", description="Applied to the output: `none` where the network ends in it."
    )
    top_k: Annotated[int, Field(ge=1)] = 5
    format: DetectionFormat | None = Field(
        default=None, description="How a network of the task detection writes its boxes; required there."
    )
    names: BoxOutputs = Field(
        default=BoxOutputs(), description="The outputs of the format boxes-labels-scores, in the place of `name`."
    )
    coordinates: Literal["pixels", "normalized"] | None = Field(
        default=None,
        description="Whether boxes are in pixels of the input or in 0..1; by default as the format has it.",
    )
    corners: Literal["xyxy", "yxyx"] = Field(
        default="xyxy", description="Order of the corners' coordinates in the format boxes-labels-scores."
    )
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.25, description="Detections with more than this score are kept."
    )
    iou_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.45, description="Of two boxes of a class that overlap by more than this, the better one is kept."
    )
    max_detections: Annotated[int, Field(ge=1, le=1000)] = 100


Part = Annotated[float, Field(ge=0, le=1)]


class Accuracy(_Strict):
    """The part of objects with a label whose best class is the right one, with its 95 % interval."""

    objects: int
    fp32: Part
    fp32_interval: tuple[Part, Part]
    this: Part
    this_interval: tuple[Part, Part]


class CardEvidence(_Strict):
    """How far this network's answers are from those in fp32, as `infermill quantize` measured it."""

    of: str = Field(description="Digest of the model in fp32.")
    source: str = Field(description="Where the objects are from.")
    runtime: str = Field(description="The library that executed both networks.")
    objects: int = Field(description="How many were predicted; none of them was calibrated with.")
    measure: Literal["top-1", "cosine", "relative error"] = Field(description="What `agreement` is.")
    agreement: Part = Field(description="Part of objects with the same best class; or the mean similarity.")
    interval: tuple[Part, Part] | None = Field(default=None, description="The 95 % interval of `agreement`.")
    max_delta: float = Field(description="The largest difference of a score, of an object.")
    mean_delta: float = Field(description="The mean over objects of their largest difference of a score.")
    nonfinite: int = Field(default=0, description="Objects that only this network answers with NaN or infinity.")
    accuracy: Accuracy | None = Field(default=None, description="Where objects have labels.")
    int8_share: Part | None = Field(default=None, description="The part of multiplications that is in int8.")
    kept_in_float: tuple[str, ...] = Field(default=(), description="The nodes that are not.")


class ModelCard(_Strict):
    """A network, and how to use it.

    Example:
        >>> card = ModelCard.model_validate({"name": "tiny", "files": {"onnx": "tiny.onnx"}})
        >>> card.task
        'classification'
    """

    name: str
    files: Files
    task: Task = "classification"
    input: Input = Input()
    preprocess: Preprocess | None = Field(
        default=Preprocess(), description="From the image to the input; null where the input is a tensor as it is."
    )
    output: Output = Output()
    precision: Precision = Field(
        default="fp32", description="What the network computes in, where the runtime and the processor have it."
    )
    labels: str | tuple[str, ...] | None = Field(default=None, description="A file of one label a line, or a list.")
    classes: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="How many classes the network must have."
    )
    evidence: CardEvidence | None = Field(
        default=None, description="What was measured where this network was made; predictions do not depend on it."
    )

    @property
    def height_width(self) -> HeightWidth | None:
        """The size of the images that the network is given; None for tensors, and where it depends on the image."""
        return None if self.preprocess is None else self.preprocess.height_width


def parse_card(data: Any, where: str) -> ModelCard:
    """Check the content of a card.

    Raises:
        ModelError: a field is unknown (the nearest one is named) or has a wrong value.
    """
    if not isinstance(data, dict):
        raise ModelError(f"{where} is not a model card", "a card is YAML with at least `name:` and `files:`")
    try:
        return ModelCard.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        for problem in problems:  # first, since a misspelt field is also a missing one
            if problem["type"] == "extra_forbidden":
                field = ".".join(map(str, problem["loc"]))
                raise ModelError(f"{where}: unknown field `{field}`", _nearest(problem["loc"])) from None
        reason = "Input should have fields" if problems[0]["type"] == "model_type" else problems[0]["msg"]
        message = f"{where}: `{_path(problems[0]['loc'])}`: {reason.removeprefix('Value error, ')}"
        raise ModelError(message, "see docs/model-card.md for every field") from None


def _path(loc: tuple[int | str, ...]) -> str:
    """The field's path, without the names that pydantic gives the alternatives of a union."""
    names = {path.rpartition(".")[2] for path in _fields(ModelCard)}
    return ".".join(str(part) for part in loc if isinstance(part, int) or part in names)


def _nearest(loc: tuple[int | str, ...]) -> str:
    parent = ".".join(str(part) for part in loc[:-1])
    known = sorted(path for path in _fields(ModelCard) if path.rpartition(".")[0] == parent)
    everywhere = {path.rpartition(".")[2]: path for path in _fields(ModelCard)}
    name = str(loc[-1])
    for match in difflib.get_close_matches(name, [path.rpartition(".")[2] for path in known], n=1):
        return f"did you mean `{parent}.{match}`?" if parent else f"did you mean `{match}`?"
    for match in difflib.get_close_matches(name, everywhere, n=1):
        return f"did you mean `{everywhere[match]}`?"
    return f"known fields here: {', '.join(path.rpartition('.')[2] for path in known)}"


def _fields(card: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in card.model_fields.items():
        yield prefix + name
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, _Strict):
                yield from _fields(kind, f"{prefix}{name}.")


def card_schema() -> dict[str, Any]:
    """The JSON Schema of a card (draft 2020-12), as published in docs/model-card.schema.json."""
    schema = ModelCard.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "infermill model card", **schema}


def deciding_fields(card: ModelCard) -> dict[str, Any]:
    """What of a card predictions depend on, as plain JSON types: all but its name, paths, labels and evidence."""
    exclude: dict[str, Any] = dict.fromkeys(("name", "files", "labels", "classes", "evidence"), True)
    # What came later is left out where it says nothing: other cards keep the digest that they had before.
    if card.precision == "fp32":
        exclude["precision"] = True
    if card.task != "detection":
        exclude["output"] = DETECTION_FIELDS
    if card.preprocess is not None and card.preprocess.letterbox is None:
        exclude["preprocess"] = {"resize": {"letterbox", "fill"}}
    fields: dict[str, Any] = card.model_dump(mode="json", exclude=exclude)
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
