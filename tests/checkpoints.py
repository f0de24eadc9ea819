"""Writers of small MXNet checkpoints, for tests that do without MXNet: its file formats, and a network of each kind."""

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
CODES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6, "bool": 7}


def shape_bytes(shape: Sequence[int]) -> bytes:
    return struct.pack(f"<i{len(shape)}q", len(shape), *shape)


def array_bytes(array: NDArray[Any], version: int | None = V2) -> bytes:
    """A dense array as MXNet saves it; without a version, as before there were any."""
    if version is None:
        head = struct.pack(f"<I{array.ndim}I", array.ndim, *array.shape)
    else:
        head = struct.pack("<I", version) + (b"" if version == V1 else struct.pack("<i", 0)) + shape_bytes(array.shape)
    return head + struct.pack("<iii", 1, 0, CODES[array.dtype.name]) + array.tobytes()


def row_sparse_bytes(
    values: NDArray[np.float32], rows: Sequence[int], shape: Sequence[int], stored: Sequence[int] | None = None
) -> bytes:
    head = _sparse_head(1, values.shape if stored is None else stored, shape)
    index = struct.pack("<i", CODES["int64"]) + shape_bytes([len(rows)])
    return head + index + values.tobytes() + np.array(rows, np.int64).tobytes()


def csr_bytes(
    values: NDArray[np.float32],
    starts: Sequence[int],
    columns: Sequence[int],
    shape: Sequence[int],
    stored: Sequence[int] | None = None,
) -> bytes:
    head = _sparse_head(2, values.shape if stored is None else stored, shape)
    indices = [np.array(numbers, np.int64) for numbers in (starts, columns)]
    aux = b"".join(struct.pack("<i", CODES["int64"]) + shape_bytes(index.shape) for index in indices)
    return head + aux + values.tobytes() + b"".join(index.tobytes() for index in indices)


def _sparse_head(storage: int, stored: Sequence[int], shape: Sequence[int]) -> bytes:
    return struct.pack("<Ii", V2, storage) + shape_bytes(stored) + shape_bytes(shape) + struct.pack("<iii", 1, 0, 0)


def params_bytes(arrays: Mapping[str, bytes]) -> bytes:
    """A `.params` file of arrays that have been written already."""
    names = b"".join(struct.pack("<Q", len(name.encode())) + name.encode() for name in arrays)
    count = struct.pack("<Q", len(arrays))
    return struct.pack("<QQ", 0x112, 0) + count + b"".join(arrays.values()) + count + names


def write_params(path: Path, arrays: Mapping[str, NDArray[Any]], version: int | None = V2) -> Path:
    path.write_bytes(params_bytes({name: array_bytes(array, version) for name, array in arrays.items()}))
    return path


def node(op: str, name: str, inputs: Sequence[int] = (), /, **attrs: str) -> dict[str, Any]:
    return {"op": op, "name": name, "attrs": attrs, "inputs": [[index, 0, 0] for index in inputs]}


def symbol_of(*nodes: Mapping[str, Any]) -> dict[str, Any]:
    """A symbol whose last node answers."""
    arguments = [index for index, one in enumerate(nodes) if one["op"] == "null"]
    heads = [[len(nodes) - 1, 0, 0]]
    return {"nodes": [*nodes], "arg_nodes": arguments, "heads": heads, "attrs": {"mxnet_version": ["int", 10901]}}


def classifier_symbol() -> dict[str, Any]:
    """A convolution, the means over the image, and three classes; of images of any size."""
    return symbol_of(
        node("null", "data"),
        node("null", "conv0_weight"),
        node("Convolution", "conv0", [0, 1], kernel="(3, 3)", num_filter="4", no_bias="True", stride="(2, 2)"),
        node("Pooling", "pool0", [2], global_pool="True", pool_type="avg", kernel="(1, 1)"),
        node("Flatten", "flatten0", [3]),
        node("null", "fc_weight"),
        node("null", "fc_bias"),
        node("FullyConnected", "fc", [4, 5, 6], num_hidden="3"),
        node("null", "softmax_label"),
        node("SoftmaxOutput", "softmax", [7, 8]),
    )


def classifier_arrays(seed: int = 0) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    shapes = {"conv0_weight": (4, 3, 3, 3), "fc_weight": (3, 4), "fc_bias": (3,)}
    return {f"arg:{name}": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, name: str = "tiny", epochs: Sequence[int] = (0,)) -> Path:
    """`name-symbol.json` and `name-0000.params`, …; what is returned is their prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-symbol.json").write_text(json.dumps(classifier_symbol()))
    for epoch in epochs:
        write_params(folder / f"{name}-{epoch:04d}.params", classifier_arrays(epoch))
    return folder / name


def archive_files(**others: str) -> dict[str, str | bytes]:
    """What an archive of MXNet Model Server holds: name -> content; `others` has `_` for `.`."""
    arrays = {name: array_bytes(array) for name, array in classifier_arrays().items()}
    signature = {"inputs": [{"data_name": "data", "data_shape": [0, 3, 96, 96]}], "input_type": "image/jpeg"}
    files: dict[str, str | bytes] = {
        "MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": {"handler": "service.py:handle"}}),
        "tiny-symbol.json": json.dumps(classifier_symbol()),
        "tiny-0000.params": params_bytes(arrays),
        "signature.json": json.dumps(signature),
        "synset.txt": "n02123045 tabby, tabby cat\nn02099712 Labrador retriever\nn01440764 tench, Tinca tinca\n",
        "service.py": "raise SystemExit('a handler was run')\n",
    }
    return files | {name.replace("_", "."): content for name, content in others.items()}


def write_archive(path: Path, files: Mapping[str, str | bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
