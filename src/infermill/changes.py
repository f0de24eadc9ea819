"""A new listing against the rows that are there: what is new, what has changed, and which rows that concerns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infermill.output import Output
from infermill.plan import REVISION_SCHEMA
from infermill.sources.objects import LISTING_SCHEMA

Digests = NDArray[np.bytes_]
DIGEST_BYTES = 16
"128 bits: not even among 10¹² keys may two be expected to have the same."


class Changes:
    """Compares a listing with the rows of a job, of which it holds 48 bytes each.

    An object is changed where both etags are known and differ; or, where one is not known, both sizes.

    Attributes:
        new: how many objects have a key without a row.
        changed: how many objects have changed.
        unchanged: how many have not, as far as can be told.
    """

    def __init__(self, place: Output, parts: Mapping[int, str]) -> None:
        self.new = self.changed = self.unchanged = 0
        self._numbers = sorted(parts)

        def read(number: int) -> _Versions:
            return _Versions.of(place.columns(parts[number], LISTING_SCHEMA.names))

        with ThreadPoolExecutor(16) as pool:
            known = list(pool.map(read, self._numbers))
        self._ends = np.cumsum([len(one.keys) for one in known], dtype=np.int64)
        self._known = _Versions.joined(known)
        self._index = _Index(self._known.keys)
        self._found: list[pa.Table] = []

    def new_ones(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The part of a listing that is new; the rest is counted, and remembered where it has changed."""
        for batch in batches:
            listed = _Versions.of(batch)
            rows, is_known = self._index.find(listed.keys)
            changed = is_known.copy()
            changed[is_known] = listed.take(is_known).differ(self._known.take(rows[is_known]))
            new = batch.filter(pa.array(~is_known))
            self.new += new.num_rows
            self.changed += int(changed.sum())
            self.unchanged += int((is_known & ~changed).sum())
            if changed.any():
                self._found.append(pa.table(batch.filter(pa.array(changed))))
            yield new

    def revised(self) -> Iterator[tuple[int, pa.Table]]:
        """The rows to supersede, by partition: every row of each key that has changed."""
        if not self._found:
            return
        found = pa.concat_tables(self._found).combine_chunks()
        listed = _Versions.of(found)
        matches, is_found = _Index(listed.keys).find(self._known.keys)
        is_found[is_found] = listed.take(matches[is_found]).differ(self._known.take(is_found))
        yield from self._by_partition(np.flatnonzero(is_found), found.take(pa.array(matches[is_found])))

    def _by_partition(self, places: NDArray[np.int64], listed: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        parts = np.searchsorted(self._ends, places, side="right")
        firsts = np.flatnonzero(np.diff(parts, prepend=-1))
        for first, end in pairwise([*firsts, len(parts)]):
            part = parts[first]
            rows = pa.array(places[first:end] - (self._ends[part - 1] if part else 0), pa.int64())
            yield (
                self._numbers[part],
                listed.slice(first, end - first).add_column(0, REVISION_SCHEMA.field("row"), rows),
            )


@dataclass(frozen=True, slots=True)
class _Versions:
    """Keys and etags as digests, an etag that is not known as b"", and sizes, -1 where they are not."""

    keys: Digests
    etags: Digests
    sizes: NDArray[np.int64]

    @staticmethod
    def of(rows: pa.Table | pa.RecordBatch) -> "_Versions":
        sizes = pc.fill_null(rows["size"], -1).to_numpy(zero_copy_only=False)
        # Azure lists etags without the quotes that they have when one object is asked for, as `retry` does.
        etags = pc.utf8_trim(rows["etag"], characters='"')
        return _Versions(_digests(rows["key"]), _digests(etags), sizes)

    @staticmethod
    def joined(parts: "Sequence[_Versions]") -> "_Versions":
        nothing = np.array([], f"S{DIGEST_BYTES}")
        return _Versions(
            np.concatenate([nothing, *(part.keys for part in parts)]),
            np.concatenate([nothing, *(part.etags for part in parts)]),
            np.concatenate([np.array([], np.int64), *(part.sizes for part in parts)]),
        )

    def take(self, rows: NDArray[Any]) -> "_Versions":
        return _Versions(self.keys[rows], self.etags[rows], self.sizes[rows])

    def differ(self, others: "_Versions") -> NDArray[np.bool_]:
        """Row by row, whether these are versions of the same objects that cannot be the same."""
        both_etags = (self.etags != b"") & (others.etags != b"")
        both_sizes = (self.sizes >= 0) & (others.sizes >= 0)
        other_sizes = both_sizes & (self.sizes != others.sizes)
        return np.asarray(np.where(both_etags, self.etags != others.etags, other_sizes), np.bool_)


class _Index:
    """Finds the first row of a key."""

    def __init__(self, keys: Digests) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def find(self, keys: Digests) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The row of each key, and which keys have one."""
        if not len(self._sorted):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return self._order[places], self._sorted[places] == keys


def _digests(texts: "pa.Array[Any]") -> Digests:
    digests = (
        b"" if text is None else blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts.to_pylist()
    )
    return np.fromiter(digests, f"S{DIGEST_BYTES}", len(texts))


def failed_rows(place: Output, name: str, codes: Sequence[str]) -> pa.Table:
    """The rows of a part that failed with one of the codes: REVISION_SCHEMA, and the label where there is one."""
    table = place.columns(name, ["key", "size", "etag", "label", "error"])
    wanted = pc.is_in(pc.struct_field(table["error"], "code"), value_set=pa.array(codes, pa.string()))
    rows = pa.array(np.flatnonzero(wanted.to_numpy()), pa.int64())
    table = table.take(rows)
    columns = [rows, table["key"], table["size"].fill_null(-1), table["etag"]]
    revised = pa.table(columns, schema=REVISION_SCHEMA)
    return revised.append_column("label", table["label"]) if "label" in table.column_names else revised
