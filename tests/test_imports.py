"""That Arrow does without pandas where it is told to, and finds it again where that is taken back."""

import subprocess
import sys

PROGRAM = """
import sys
from infermill.imports import allow_pandas, leave_out_pandas
leave_out_pandas()
import pyarrow as pa
print(pa.array(["a", None]).to_pylist(), "pandas" in sys.modules)
allow_pandas()
import pandas
print("pandas" in sys.modules)
"""


def test_arrow_does_without_pandas_until_it_is_allowed() -> None:
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert answer.stdout == "['a', None] False\nTrue\n"
