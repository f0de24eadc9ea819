# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "apache-beam==2.77.0",
#     "numpy==2.4.6",
#     "onnx==1.23.2",
#     "onnxruntime==1.32.0",
#     "pillow==12.3.0",
#     "pyarrow==25.0.1",
# ]
# ///
"""Apache Beam: match, read, prepare, `RunInference` with the handler for ONNX, Parquet, on the direct runner.

    beam_run_inference.py PHOTOS NETWORK OUT SIDE WAY

https://beam.apache.org/documentation/ml/inference-overview/. WAY:
    memory     the direct runner's own process, ONNX Runtime as it comes
    processes  as many worker processes as cores, each with a thread of ONNX Runtime
"""

import logging
import os

import apache_beam as beam
import pyarrow as pa
from apache_beam.io import fileio
from apache_beam.io.parquetio import WriteToParquet
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.ml.inference.onnx_inference import OnnxModelHandlerNumpy
from apache_beam.options.pipeline_options import PipelineOptions

from preprocessing import BATCH, arguments, prepare, session, top5

SCHEMA = pa.schema([("path", pa.string()), ("index", pa.list_(pa.int32())), ("score", pa.list_(pa.float32()))])


class Handler(OnnxModelHandlerNumpy):
    """The handler for ONNX, with the thread count of each worker's session, and batches of a bounded size."""

    def __init__(self, network, threads):
        super().__init__(network, providers=["CPUExecutionProvider"])
        self.network, self.threads = network, threads

    def load_model(self):
        return session(self.network, self.threads)

    def batch_elements_kwargs(self):
        return {"min_batch_size": 8, "max_batch_size": BATCH}


def row(element):
    path, result = element
    index, score = top5(result.inference[None])
    return {"path": path, "index": index[0].tolist(), "score": score[0].tolist()}


def main():
    logging.getLogger().setLevel(logging.ERROR)
    photos, network, out, side, way = arguments()
    cores = len(os.sched_getaffinity(0))
    mode, workers, threads = ("in_memory", 1, 0) if way == "memory" else ("multi_processing", cores, 1)
    options = PipelineOptions(
        runner="FnApiRunner" if way == "memory" else "DirectRunner",
        direct_running_mode=mode,
        direct_num_workers=workers,
    )
    with beam.Pipeline(options=options) as pipeline:
        (
            pipeline
            | fileio.MatchFiles(f"{photos}/*")
            | beam.Reshuffle()
            | fileio.ReadMatches()
            | beam.Map(lambda file: (file.metadata.path, prepare(file.read(), side)))
            | RunInference(KeyedModelHandler(Handler(network, threads)))
            | beam.Map(row)
            | WriteToParquet(f"{out}/part", SCHEMA, file_name_suffix=".parquet")
        )


if __name__ == "__main__":
    main()
