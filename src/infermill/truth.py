"""The right class of objects, for accuracy: as a file says it, or the shards that they lie in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from infermill.errors import SourceError, UsageError
from infermill.evidence import NO_LABEL
from infermill.models.card import ModelCard
from infermill.reader import open_reader
from infermill.stores import STORE_ERRORS, explain, locate, open_store
from infermill.types import Label, ObjectRef, StoreOptions

_WHAT_LABELS_ARE = "a label is the number of a class, from 0, or its name in the model's labels"


@dataclass(frozen=True, slots=True)
class Truth:
    """The labels of a file, by key."""

    where: str
    labels: Mapping[str, Label | float]


def read_truth(where: str, card: ModelCard, options: StoreOptions) -> Truth:
    """The labels of a Parquet file with the columns `key` and `label`: numbers, text, or lists as of RecordIO.

    Raises:
        UsageError: the card's task has no classes.
        SourceError: the file has no such labels, or is not there.
        StoreError: access is denied, or the store does not answer.

    Example:
        >>> read_truth("labels.parquet", card, Options()).labels["cat.jpg"]  # doctest: +SKIP
        281
    """
    if card.task != "classification":
        raise UsageError(f"--truth is for a classification, and the task is {card.task}", "leave it out")
    place = locate(where)
    hint = "write a Parquet file with the columns key and label, as `infermill datasets` does"
    try:
        with open_reader(place, open_store(place, options), options) as reader:
            table = pq.read_table(reader, columns=["key", "label"])
        labels = _plain(table["label"].combine_chunks())
    except pa.ArrowException as error:
        raise SourceError(f"{where} has no labels that can be read: {error}", hint) from None
    except STORE_ERRORS as error:
        raise explain(error, place.uri) from None
    if labels is None:
        raise SourceError(f"{where} has labels of the type {table.schema.field('label').type}", _WHAT_LABELS_ARE)
    return Truth(where, dict(zip(table["key"].to_pylist(), labels.to_pylist(), strict=True)))


def _plain(labels: pa.Array) -> pa.Array | None:
    """Labels as numbers, text or lists of numbers; None where they are something else."""
    if pa.types.is_dictionary(labels.type):
        labels = labels.dictionary_decode()
    if pa.types.is_binary(labels.type) or pa.types.is_large_binary(labels.type):
        labels = labels.cast(pa.large_string())
    kind = labels.type.value_type if pa.types.is_list(labels.type) else labels.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return labels if is_number or is_text or pa.types.is_null(kind) else None


def right_classes(
    refs: Sequence[ObjectRef], names: tuple[str, ...] | None, truth: Truth | None = None
) -> dict[str, int]:
    """The right class of objects, by key; those are left out of which it is not known.

    Args:
        refs: the objects that are measured; their own labels count where there is no `truth`.
        names: of the classes, where the model has labels.
        truth: what a file says.

    Raises:
        SourceError: the file says it of none.

    Example:
        >>> right_classes([ObjectRef("a", label="cat"), ObjectRef("b", label=[1.0])], ("cat", "dog"))
        {'a': 0, 'b': 1}
    """
    labels = {ref.key: ref.label if truth is None else truth.labels.get(ref.key) for ref in refs}
    classes = {key: _class_of(label, names) for key, label in labels.items()}
    classes = {key: number for key, number in classes.items() if number != NO_LABEL}
    if truth is None or classes:
        return classes
    label = next((label for label in labels.values() if label is not None), None)
    if label is not None:
        raise SourceError(f"{truth.where} has labels that are no class of the model, as {label!r}", _WHAT_LABELS_ARE)
    raise SourceError(
        f"{truth.where} has a label of none of the {len(refs)} objects that are measured",
        f"its keys are to be those of the source, as {refs[0].key!r}",
    )


def _class_of(label: Label | float, names: tuple[str, ...] | None) -> int:
    """The class that a label means: by its number, or by its name in the model's labels; -1 where it means none."""
    if isinstance(label, list):  # RecordIO has numbers with fractions, and may have several
        label = label[0] if len(label) == 1 else None
    if isinstance(label, str):
        if names is not None and label in names:
            return names.index(label)
        label = int(label) if label.isdecimal() else None
    if label is None or (isinstance(label, float) and not label.is_integer()):
        return NO_LABEL
    is_class = label >= 0 and (names is None or label < len(names))
    return int(label) if is_class else NO_LABEL
