"""The pipeline without the output protocol: python benchmarks/bare.py SOURCE CARD OUT."""

import sys
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infermill.meter import Meter
from infermill.models.opening import open_model
from infermill.parts import rows_table
from infermill.pipeline import run_pipeline
from infermill.plan import cut
from infermill.sources import list_source
from infermill.stages import Share
from infermill.types import ObjectRef, Options
from infermill.worker import load_predictor, network_of, stages_of


def main(source: str, card: str, out: str) -> None:
    options, meter = Options(), Meter()
    model = open_model(card, options)
    where, batches = list_source(source, options.suffix, options)
    tables = list(cut(batches, options.partition_objects, options.partition_bytes, None))
    loaded = cache(lambda: load_predictor(model, options, meter))
    stages = stages_of(where, model, options, lambda: network_of(*loaded()))
    Path(out).mkdir()
    for rows in run_pipeline((Share(number, _refs(refs)) for number, refs in enumerate(tables)), stages, meter):
        columns = loaded()[1].columns(rows.kept, rows.predicted())
        part = rows_table(rows.refs, columns, rows.failures)
        pq.write_table(part, f"{out}/part-{rows.partition:05d}.parquet", compression="zstd")


def _refs(partition: pa.Table) -> list[ObjectRef]:
    columns = (partition[name].to_pylist() for name in ("key", "size", "etag"))
    return [ObjectRef(*row) for row in zip(*columns, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
