"""What Spark has given to the task that runs in this process: cores and GPUs."""

import os
from collections.abc import Mapping

from pyspark import TaskContext
from pyspark.resource import ResourceInformation

from infermill.limits import usable_cores


def task_cores() -> int:
    """The cores of this task: Spark runs as many tasks beside it as the executor has others."""
    context = TaskContext.get()
    return usable_cores() if context is None else min(context.cpus(), usable_cores())


def task_devices() -> dict[str, str]:
    """Variables for the process that runs the network: which GPUs it may use."""
    context = TaskContext.get()
    return {} if context is None else device_environment(context.resources())


def device_environment(
    resources: Mapping[str, ResourceInformation], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The same for given resources. Where Spark gives no GPU, those of CUDA_VISIBLE_DEVICES stay; else there are none.

    Example:
        >>> device_environment({"gpu": ResourceInformation("gpu", ["2"])}, {"CUDA_VISIBLE_DEVICES": "0,1"})
        {'CUDA_VISIBLE_DEVICES': '2'}
        >>> device_environment({}, {"CUDA_VISIBLE_DEVICES": "0,1"})
        {}
        >>> device_environment({}, {})
        {'CUDA_VISIBLE_DEVICES': ''}
    """
    given = resources.get("gpu")
    if given is not None:
        return {"CUDA_VISIBLE_DEVICES": ",".join(given.addresses)}
    return {} if "CUDA_VISIBLE_DEVICES" in environment else {"CUDA_VISIBLE_DEVICES": ""}


def visible_gpus() -> str:
    """What CUDA_VISIBLE_DEVICES is for this task's network: numbers with commas between, or nothing."""
    return (os.environ | task_devices()).get("CUDA_VISIBLE_DEVICES", "")
