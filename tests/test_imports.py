"""What processes do without: libraries that other libraries would import, and those that are another process's."""

import subprocess
import sys

import pytest

PANDAS = """
import sys
from infermill.imports import leave_out, leave_out_no_more
leave_out()
import pyarrow as pa
print(pa.array(["a", None]).to_pylist(), "pandas" in sys.modules)
leave_out_no_more()
import pandas
print("pandas" in sys.modules)
"""
CONVERTERS = """
import sys
from infermill.imports import leave_out
leave_out()
import infermill.runtimes.openvino
print("openvino" in sys.modules, "openvino.tools" in sys.modules)
"""
DRIVER = """
import sys
import infermill.job
print([name for name in ("PIL", "simplejpeg", "openvino", "infermill.worker") if name in sys.modules])
"""
WORKER = """
import sys
import infermill.engines.child
print([name for name in ("pydantic", "yaml", "cyclopts", "infermill.job", "infermill.driver") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        pytest.param(PANDAS, "['a', None] False\nTrue\n", id="Arrow does without pandas until it is allowed"),
        pytest.param(CONVERTERS, "True False\n", id="OpenVINO does without its converters"),
        pytest.param(DRIVER, "[]\n", id="the driver neither decodes nor predicts"),
        pytest.param(WORKER, "[]\n", id="a worker reads no cards and has no command line"),
    ],
)
def test_what_a_process_does_without(program: str, printed: str) -> None:
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == printed
