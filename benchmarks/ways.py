"""The ways of predicting a folder, each as a command: infermill's, and those of the peers whose environment is here."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environments import PROGRAMS, environment
from infermill.java import find_java
from measuring import Child, ChildError, run_child

PEERS = {
    "recipe_2017": ("the recipe of 2017: PySpark RDD, MXNet", {"8": "batch 8", "64": "batch 64"}),
    "spark_predict_batch_udf": (
        "Spark `predict_batch_udf`",
        {"single": "a thread of ONNX Runtime a task", "threads": "ONNX Runtime as it comes"},
    ),
    "ray_data": ("Ray Data", {"actors": "an actor a core", "actor": "one actor, ONNX Runtime as it comes"}),
    "daft_cls": (
        "Daft",
        {
            "native": "its own resizing, ONNX Runtime as it comes",
            "processes": "its own resizing, a process a core",
            "pillow": "Pillow's resizing, a process a core",
        },
    ),
    "beam_run_inference": (
        "Beam RunInference",
        {"memory": "in memory, ONNX Runtime as it comes", "processes": "a process a core"},
    ),
    "torch_dataloader": ("PyTorch, DataLoader", {"workers": "two workers", "one": "one worker, channels last"}),
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way: `command` takes the folder to predict and the output."""

    group: str
    "Ways of one peer compete: the better one stands for it."
    name: str
    command: Callable[[str, Path], Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, source: Path | str, out: Path) -> Child:
        """Predict a folder in a process of its own; ChildError where it cannot."""
        return run_child(*self.command(str(source), out), **self.environment)


def job(name: str, card: Path, *flags: str, **environment: str) -> Way:
    """`infermill run`."""

    def command(source: str, out: Path) -> list[str]:
        program = str(Path(sys.executable).with_name("infermill"))
        return [program, "run", source, "-m", str(card), "-o", str(out), "--json", *flags]

    return Way(name, name, command, environment)


def peer_ways(network: Path, side: int, programs: Sequence[str]) -> tuple[list[Way], dict[str, str]]:
    """Every way of the peers that are installed, and of the others why they are not, by name."""
    ways, lacking = [], {}
    for program in programs:
        title, variants = PEERS[program]
        found = environment(program)
        try:
            model = checkpoint(network, found.python) if program == "recipe_2017" and not found.reason else network
            extra = _java() if program in ("recipe_2017", "spark_predict_batch_udf") and not found.reason else {}
        except ChildError as error:
            lacking[title] = str(error)
            continue
        if found.reason:
            lacking[title] = found.reason
            continue
        for variant, told in variants.items():
            command = _command(str(found.python), str(PROGRAMS / f"{program}.py"), str(model), str(side), variant)
            ways.append(Way(title, f"{title}; {told}", command, {"PYTHONPATH": str(PROGRAMS)} | extra))
    return ways, lacking


def versions() -> list[str]:
    """What each peer is pinned to."""
    return [f"{title}: {environment(program).versions}" for program, (title, _) in PEERS.items()]


def mxnet_python() -> str | None:
    """The Python of the recipe, which has MXNet."""
    found = environment("recipe_2017")
    return None if found.reason else str(found.python)


def _command(python: str, program: str, model: str, side: str, variant: str) -> Callable[[str, Path], list[str]]:
    return lambda source, out: [python, program, source, model, str(out), side, variant]


def _java() -> dict[str, str]:
    """The Java that infermill would start Spark on; and no look-up of this machine's name."""
    java = find_java()
    return {"JAVA_HOME": str(java.home), "SPARK_LOCAL_IP": "127.0.0.1"}


def checkpoint(network: Path, python: Path) -> Path:
    """The network as an MXNet checkpoint: its prefix."""
    prefix = network.with_suffix("")
    if not network.with_name(f"{prefix.name}-symbol.json").exists():
        program = Path(__file__).with_name("mxnet_checkpoint.py")
        run_child(str(python), str(program), str(network.with_suffix(".npz")), str(prefix))
    return prefix
