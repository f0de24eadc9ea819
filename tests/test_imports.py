"""That Arrow does without pandas where it is told to, and finds it again where that is taken back."""

import subprocess
import sys

import pytest

from infermill.imports import allow_pandas, leave_out_pandas

PROGRAM = """
import sys
from infermill.imports import leave_out_pandas
leave_out_pandas()
import pyarrow as pa
print(pa.array(["a", None]).to_pylist(), "pandas" in sys.modules)
"""


def test_arrow_does_without_pandas() -> None:
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert answer.stdout == "['a', None] False\n"


def test_pandas_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pandas"]:
        monkeypatch.delitem(sys.modules, name)
    leave_out_pandas()
    with pytest.raises(ModuleNotFoundError, match="left out"):
        __import__("pandas")
    allow_pandas()
    assert not any("WithoutPandas" in repr(finder) for finder in sys.meta_path)
