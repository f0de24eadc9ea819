"""Predictions inside Spark DataFrames and SQL: `predict`, `register`, `InfermillTransformer` and `make_predict_fn`.

    df ─► arrow_udf(task(predict_column, job)) ─► df with one struct column more
          on classic Spark and on Spark Connect; nothing runs before Spark wants the rows

The network reaches the executors by `infermill.shipping`, and stays in their Python workers (`infermill.column`).
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from infermill.errors import InfermillError, ModelError, UsageError

try:
    from pyspark.ml import Transformer
    from pyspark.ml.param import Param, Params, TypeConverters
    from pyspark.ml.param.shared import HasInputCol, HasOutputCol
    from pyspark.ml.util import DefaultParamsReadable, DefaultParamsWritable
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.functions import arrow_udf
    from pyspark.sql.pandas.types import from_arrow_type
    from pyspark.sql.types import ArrayType, BinaryType, StringType, StructType
except ImportError as error:
    raise InfermillError(
        f"infermill.spark needs PySpark 4.1 or later: {error}", "pip install 'infermill[spark]'"
    ) from None

from infermill.column import ColumnJob, load_batch_predict, predict_column
from infermill.jobspec import check_options
from infermill.meter import Meter
from infermill.models.card import ModelCard
from infermill.models.fit import chosen_outputs
from infermill.models.model import Model, in_fp32
from infermill.models.onnx import inspect_network
from infermill.models.opening import open_model
from infermill.parts import ERROR_TYPE
from infermill.predictions import DETECTIONS_TYPE, TOP_TYPE
from infermill.runtimes import check_runtime
from infermill.shipping import runs_here, ship_code, ship_model, task
from infermill.stores import locate
from infermill.types import CardOptions, Options
from infermill.worker import load_predictor

__all__ = ["InfermillTransformer", "make_predict_fn", "predict", "register"]

Given = str | os.PathLike[str] | ModelCard
# Spark has neither small floats nor unsigned integers.
_WIDER = {
    "float16": pa.float32(),
    "uint8": pa.int16(),
    "uint16": pa.int32(),
    "uint32": pa.int64(),
    "uint64": pa.decimal128(20),
}


def predict(
    df: DataFrame,
    model: Given,
    input: str = "content",  # noqa: A002 - what it is called in the commands, too
    output: str = "prediction",
    options: Options | None = None,
    card_options: CardOptions | None = None,
) -> DataFrame:
    """Add a column of predictions to a DataFrame, lazily; the other columns and the order of the rows stay.

    Args:
        df: a DataFrame of classic Spark or of Spark Connect.
        model: a model card, as a path, a URI or an object, a bare `.onnx`, or an MXNet checkpoint.
        input: the column to predict on. Binary: image files, as `spark.read.format("binaryFile")` reads them. String:
            paths or URIs that the executors fetch. Arrays or structs of numbers: rows of a network that takes tensors.
        output: the new column, which takes the place of one of this name. It is a struct: by task `top` (array of
            index, label, score), `detections` (array of label, index, score, box), `embedding` (array of float) or
            `outputs` (struct of one flat array for each output of the network); and always `error` (stage, code,
            message), which is null where there is a prediction.
        options: runtime, decode profile, threads (default: the cores of a Spark task) and how stores are reached.
        card_options: what the model card does not say, or says otherwise.

    Raises:
        ModelError: the card or the network is wrong. A model that has changed when the executors read it ends Spark's
            job, with the same words in its error.
        UsageError: there is no such column, or it holds something else.

    Example:
        >>> photos = spark.read.format("binaryFile").load("photos/")  # doctest: +SKIP
        >>> named = predict(photos, "model.yaml").select("path", "prediction.top")  # doctest: +SKIP
    """
    options = options or Options()
    opened = open_model(model, options, card_options)
    return _with_predictions(df, opened, input, output, options)


def register(
    spark: SparkSession,
    name: str,
    model: Given,
    options: Options | None = None,
    card_options: CardOptions | None = None,
) -> Callable[..., Any]:
    """Make a model a function of SQL, which takes what `predict` takes as a column, and returns the same struct.

    Args:
        spark: a session of classic Spark or of Spark Connect; the function is there until it ends.
        name: how the function is called.
        model: as in `predict`.
        options: as in `predict`.
        card_options: as in `predict`.

    Returns:
        The function, for columns of DataFrames.

    Raises:
        ModelError: the card or the network is wrong.

    Example:
        >>> classify = register(spark, "classify", "model.yaml")  # doctest: +SKIP
        >>> spark.sql("SELECT path, classify(content).top[0].label FROM photos")  # doctest: +SKIP
    """
    options = options or Options()
    opened = open_model(model, options, card_options)
    registered: Callable[..., Any] = spark.udf.register(name, _function(spark, opened, options))
    return registered


def make_predict_fn(
    model: Given,
    options: Options | None = None,
    card_options: CardOptions | None = None,
    spark: SparkSession | None = None,
) -> Callable[[], Callable[[Any], dict[str, Any]]]:
    """The function that Spark's own `predict_batch_udf` wants: it loads the network, and returns what predicts.

    That takes an array of encoded images (bytes), of images (uint8 [N, height, width, 3] or [N, height, width]), or
    of tensors, and returns a dict of arrays: for a classification `index` and `score`, each [N, top_k]; for an
    embedding `embedding` [N, n]; for a detection `count` [N] of `index`, `score`, each [N, max_detections], and `box`
    [N, 4 * max_detections]; else the outputs of the network, [N, n] each. Where a row has no prediction, they
    are NaN and -1 (0 where the type has no such). `predict` says why, and takes URIs.

    Args:
        model: as in `predict`.
        options: as in `predict`.
        card_options: as in `predict`.
        spark: the session in which the function will be used. (default: the active one)

    Raises:
        ModelError: the card or the network is wrong.

    Example:
        >>> classify = predict_batch_udf(  # doctest: +SKIP
        ...     make_predict_fn("model.yaml"),
        ...     return_type=StructType([
        ...         StructField("index", ArrayType(IntegerType())), StructField("score", ArrayType(FloatType()))
        ...     ]),
        ...     batch_size=64,
        ... )
        >>> photos.withColumn("best", classify("content").index[0])  # doctest: +SKIP
    """
    options = options or Options()
    opened = open_model(model, options, card_options)
    return task(load_batch_predict, _job(spark or SparkSession.active(), opened, options))


class InfermillTransformer(
    Transformer,  # type: ignore[misc]
    HasInputCol,  # type: ignore[misc]
    HasOutputCol,  # type: ignore[misc]
    DefaultParamsReadable,  # type: ignore[misc]
    DefaultParamsWritable,  # type: ignore[misc]
):
    """`predict` as a stage of a `pyspark.ml` Pipeline, with `save` and `load`.

    The stage stores where the model is, as an absolute path or a URI, and its digest, but not the weights: a model
    that is not the same any more is refused.

    Args:
        model: a path or URI of a model card or of a bare `.onnx`.
        inputCol: as `input` of `predict`.
        outputCol: as `output` of `predict`.
        options: as in `predict`.
        cardOptions: as `card_options` of `predict`.

    Raises:
        ModelError: the card or the network is wrong.

    Example:
        >>> stage = InfermillTransformer(model="s3://models/resnet18.yaml")  # doctest: +SKIP
        >>> stage.save("stage")  # doctest: +SKIP
        >>> InfermillTransformer.load("stage").transform(photos)  # doctest: +SKIP
    """

    model = Param(Params._dummy(), "model", "path or URI of the model", TypeConverters.toString)
    digest = Param(Params._dummy(), "digest", "sha256 of all that predictions depend on", TypeConverters.toString)
    options = Param(Params._dummy(), "options", "fields of infermill.Options that are not the default")
    cardOptions = Param(Params._dummy(), "cardOptions", "fields of infermill.CardOptions")  # noqa: N815 - as Spark's

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | None = None,
        inputCol: str = "content",  # noqa: N803
        outputCol: str = "prediction",  # noqa: N803
        options: Options | None = None,
        cardOptions: CardOptions | None = None,  # noqa: N803
    ) -> None:
        super().__init__()
        self._set(inputCol=inputCol, outputCol=outputCol)
        if model is None:  # Spark makes an empty stage, and fills it with what was saved
            return
        if isinstance(model, ModelCard):
            raise UsageError("a stage stores where its model is, and not the card", "write the card to a file")
        options, card_options = options or Options(), cardOptions or CardOptions()
        if card_options.labels is not None:
            card_options = replace(card_options, labels=locate(card_options.labels).uri)
        digest = open_model(model, options, card_options).digest
        self._set(
            model=locate(model).uri,
            digest=digest,
            options=_given(options.for_workers()),
            cardOptions=_given(card_options),
        )

    def _transform(self, dataset: DataFrame) -> DataFrame:
        if not self.isSet(self.model):
            raise UsageError("the stage has no model", "pass model=… where it is made")
        uri, digest = self.getOrDefault(self.model), self.getOrDefault(self.digest)
        options = Options(**_arguments(self.getOrDefault(self.options)))
        card_options = CardOptions(**_arguments(self.getOrDefault(self.cardOptions)))
        opened = open_model(uri, options, card_options)
        if opened.digest != digest:
            raise ModelError(
                f"the model {uri} has changed: it is {opened.digest}, and the stage was made with {digest}",
                "make the stage again, or put back the model",
            )
        return _with_predictions(dataset, opened, self.getInputCol(), self.getOutputCol(), options)


def _given(options: Options | CardOptions) -> dict[str, Any]:
    """What of the options is not the default, for JSON."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(type(options)(), name)}


def _arguments(stored: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def _with_predictions(df: DataFrame, model: Model, column: str, output: str, options: Options) -> DataFrame:
    if column not in df.columns:
        raise UsageError(f"the DataFrame has no column {column!r}", f"its columns are {', '.join(df.columns)}")
    kind = df.schema[column].dataType
    if not isinstance(kind, BinaryType | StringType | ArrayType | StructType):
        raise UsageError(
            f"the column {column!r} is {kind.simpleString()}, which is nothing to predict on",
            "give image bytes (binary), paths or URIs (string), or numbers (array or struct)",
        )
    if isinstance(kind, ArrayType | StructType) and model.card.preprocess is not None:
        raise UsageError(
            f"the column {column!r} is {kind.simpleString()}, and the model {model.card.name} takes images",
            "give image bytes (binary) or paths or URIs (string), or a model whose card has `preprocess: null`",
        )
    function = _function(df.sparkSession, model, options)
    # Of a deterministic function, Spark runs a copy below each filter on its result.
    return df.withColumn(output, function.asNondeterministic()(df["`" + column.replace("`", "``") + "`"]))


def _function(session: SparkSession, model: Model, options: Options) -> Any:
    job = _job(session, model, options)
    run = task(predict_column, job)

    # Spark reads what kind of function it is from the annotations; nested, it is pickled by value, like `run`.
    def predictions(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        predicted: Iterator[pa.Array] = run(batches)
        return predicted

    return arrow_udf(predictions, returnType=from_arrow_type(job.column_type))


def _job(session: SparkSession, model: Model, options: Options) -> ColumnJob:
    """Send what the workers need, and say what they will answer."""
    check_options(options)
    check_runtime(model, options.runtime, options.runtime_python, is_here=False)
    column_type = _column_type(model, options)
    if not runs_here(session):
        ship_code(session)
    options = options.for_workers()
    return ColumnJob(ship_model(session, model, options), options, column_type)


def _column_type(model: Model, options: Options) -> pa.DataType:
    if model.card.task == "classification":
        column = pa.field("top", TOP_TYPE)
    elif model.card.task == "embedding":
        column = pa.field("embedding", pa.list_(pa.float32()))
    elif model.card.task == "detection":
        column = pa.field("detections", DETECTIONS_TYPE)
    else:
        column = pa.field("outputs", _outputs_type(model, options))
    return pa.struct([column, pa.field("error", ERROR_TYPE)])


def _outputs_type(model: Model, options: Options) -> pa.DataType:
    outputs = chosen_outputs(model.card, inspect_network(model.network))
    dtypes = {output.name: output.dtype for output in outputs}
    if "undefined" in dtypes.values():  # it shows when the network runs
        predictor, _ = load_predictor(in_fp32(model), options, Meter())  # this processor may have less
        arrays = predictor(np.zeros((1, *predictor.input_shape), predictor.input_dtype))
        dtypes = {name: str(array.dtype) for name, array in zip(predictor.output_names, arrays, strict=True)}
    return pa.struct(
        [(name, pa.list_(_WIDER.get(dtype) or pa.from_numpy_dtype(dtype))) for name, dtype in dtypes.items()]
    )
