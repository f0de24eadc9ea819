"""Every benchmark, into benchmarks/results.md, a section each; sections that are not measured stay as they are.

    python benchmarks/bench.py [--quick] [SECTION …] [--peers [NAME …]]

`make bench` measures `photos` and `small`, in about half an hour on two fast cores, `make bench-more` the rest.
Before it, `python benchmarks/environments.py` installs the peers. With --quick everything is tiny and in one round, and
the figures say nothing; they go to standard output, and nowhere else, as those against some of the peers do.
"""

import argparse
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import bench_elsewhere
import bench_photos
import bench_plan
import bench_protocol
import bench_small
from material import Material, material
from measuring import machine
from ways import PEERS

RESULTS = Path(__file__).with_name("results.md")
TITLE = "# What was measured\n\n`make bench` and `make bench-more` write this file; each section names its machine.\n"
SECTIONS: dict[str, tuple[str, Callable[[Material], str]]] = {
    "photos": ("Photos", bench_photos.measure),
    "small": ("Small images", bench_small.measure),
    "elsewhere": ("From S3, on Spark, by MXNet", bench_elsewhere.measure),
    "protocol": ("The output protocol", bench_protocol.measure),
    "plan": ("A million keys", bench_plan.measure),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=["photos", "small"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS, []], default=[*PEERS])
    arguments = parser.parse_args()
    with material(arguments.quick, arguments.peers) as made:
        for section in arguments.sections:
            title, measure = SECTIONS[section]
            print(title, flush=True)
            started = time.perf_counter()
            found = measure(made)
            minutes = (time.perf_counter() - started) / 60
            when = f"{machine()}, {datetime.now(UTC):%Y-%m-%d}; {minutes:.0f} minutes."
            print(found, f"\n{minutes:.1f} minutes\n", flush=True)
            if not arguments.quick and set(arguments.peers) == set(PEERS):
                _replace(title, f"{when}\n\n{found.strip()}\n")


def _replace(title: str, text: str) -> None:
    """Put a section into the results, in the place of the one that is there."""
    told = RESULTS.read_text() if RESULTS.exists() else ""
    _, *there = told.split("\n## ")
    sections = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip("\n") for part in there}
    sections[title] = text.strip("\n")
    ordered = [name for name, _ in SECTIONS.values() if name in sections]
    RESULTS.write_text(TITLE + "".join(f"\n## {name}\n\n{sections[name]}\n" for name in ordered))


if __name__ == "__main__":
    main()
