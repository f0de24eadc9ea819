"""Which class is right: labels of every type that a file may have, and what is told where they are none."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infermill.errors import SourceError, UsageError
from infermill.models.card import ModelCard
from infermill.models.card_file import parse_card
from infermill.truth import read_truth, right_classes
from infermill.types import ObjectRef, StoreOptions

NAMES = ("cat", "dog", "cow")
CARD = parse_card({"name": "tiny", "files": {"onnx": "tiny.onnx"}})


def classes(path: Path, labels: Any, card: ModelCard = CARD, names: tuple[str, ...] | None = NAMES) -> list[int | None]:
    """The classes that a file of these labels gives, and None where it gives none."""
    keys = [f"{number}.png" for number in range(len(labels))]
    pq.write_table(pa.table({"key": keys, "label": labels}), path / "truth.parquet")
    truth = read_truth(str(path / "truth.parquet"), card, StoreOptions())
    found = right_classes([ObjectRef(key) for key in keys], names, truth)
    return [found.get(key) for key in keys]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([2, 0, None, -1, 3], pa.int16()), [2, 0, None, None, None]),
        (pa.array(["cow", "0", None, "dog", "horse"]), [2, 0, None, 1, None]),
        (pa.array(["cow", "cat", "cow"]).dictionary_encode(), [2, 0, 2]),
        (pa.array([b"cow", b"1"]), [2, 1]),
        (pa.array([2.0, 2.7, float("nan"), float("inf")]), [2, None, None, None]),
        (pa.array([[2.0], [1.5], [1.0, 2.0], [], None]), [2, None, None, None, None]),
        (pa.array([True, False]), [1, 0]),
    ],
)
def test_labels_are_numbers_and_names(tmp_path: Path, labels: Any, expected: list[int | None]) -> None:
    assert classes(tmp_path, labels) == expected


def test_numbers_count_where_the_model_has_no_names(tmp_path: Path) -> None:
    assert classes(tmp_path, pa.array([5, 700]), names=None) == [5, 700]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (pa.array(["horse", None]), "labels that are no class of the model, as 'horse'"),
        (pa.array([0.5, 1.5]), "labels that are no class of the model, as 0.5"),
        (pa.array([None, None]), "a label of none of the 2 objects that are measured"),
        (pa.array([1, 2], pa.date32()), "labels of the type date32"),
        (pa.array([b"\xff"]), "no labels that can be read: Invalid UTF8"),
    ],
)
def test_a_file_of_no_use_is_told(tmp_path: Path, labels: Any, told: str) -> None:
    with pytest.raises(SourceError, match=told) as caught:
        classes(tmp_path, labels)
    assert caught.value.hint


def test_keys_that_match_nothing_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["photos/1.png"], "label": [1]}), tmp_path / "truth.parquet")
    truth = read_truth(str(tmp_path / "truth.parquet"), CARD, StoreOptions())
    with pytest.raises(SourceError, match="a label of none of the 1 objects") as told:
        right_classes([ObjectRef("1.png", label=1)], NAMES, truth)
    assert "as '1.png'" in told.value.hint


def test_what_is_no_file_of_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["1.png"]}), tmp_path / "truth.parquet")
    with pytest.raises(SourceError, match="no labels that can be read: No match"):
        read_truth(str(tmp_path / "truth.parquet"), CARD, StoreOptions())
    with pytest.raises(SourceError, match="does not exist"):
        read_truth(str(tmp_path / "nowhere.parquet"), CARD, StoreOptions())
    embedding = parse_card({"name": "tiny", "files": {"onnx": "tiny.onnx"}, "task": "embedding"})
    with pytest.raises(UsageError, match="--truth is for a classification, and the task is embedding"):
        read_truth(str(tmp_path / "truth.parquet"), embedding, StoreOptions())


def test_objects_have_labels_of_their_own() -> None:
    refs = [ObjectRef("a", label="dog"), ObjectRef("b", label=[2.0]), ObjectRef("c"), ObjectRef("d", label="horse")]
    assert right_classes(refs, NAMES) == {"a": 1, "b": 2}
