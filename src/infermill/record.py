"""What an output holds, in its own words: `job.json`, and an `append-NNNNN.json` for each time it was appended to.

Who creates `job.json` has planned the job, and who creates a number has appended to it. A record is created after
the files of the plan that it names, and never changed.
"""

import datetime
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from infermill import __version__
from infermill.errors import InfermillError, JobMismatchError, StoreError
from infermill.models.card import ModelCard, Preprocess, deciding_fields
from infermill.models.model import Model
from infermill.output import JOB_FILE, PLAN_FOLDER, SUCCESS_FILE, Output
from infermill.plan import PlanInfo, write_plan
from infermill.sources import canonical
from infermill.stores import locate
from infermill.types import CardOptions, Options, PartitionReport, Source

FORMAT = 2
FOLDER = "_infermill"
_APPEND = re.compile(r"append-(\d{5,})\.json")
_SETTINGS = ("suffix", "limit", "decode", "max_pixels")
_TOTALS = ("planned", "ok", "failed", "failures_by_code", "parts")
_MANIFEST = re.compile(r"\Amanifest sha256:\S+")


@dataclass(frozen=True, slots=True)
class Record:
    """A job as it was planned and appended to."""

    fingerprint: Mapping[str, Any]
    source: Source
    plans: tuple[PlanInfo, ...]
    model: str | None
    "Where the model card or the network was; None where that is not to be written down."
    card_options: CardOptions
    appended_sources: frozenset[str] = frozenset()
    "Manifests that were appended, as a fingerprint knows them."

    @property
    def notes(self) -> dict[str, str]:
        """What every part of the job says of itself."""
        return {"plan": self.plans[0].plan_id, "digest": self.fingerprint["model"]}

    @property
    def partitions(self) -> int:
        return self.plans[-1].end

    @property
    def objects(self) -> int:
        return sum(plan.objects for plan in self.plans)

    def completed(self, options: Options) -> Options:
        """The options, with the job's own settings where they say nothing."""
        default = Options()
        recorded = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in ((name, self.fingerprint[name]) for name in _SETTINGS)
        }
        unsaid: dict[str, Any] = {
            name: value for name, value in recorded.items() if getattr(options, name) == getattr(default, name)
        }
        return replace(options, **unsaid)


def fingerprint(source: str | None, model: Model, options: Options) -> dict[str, Any]:
    """What must be the same for two runs to be one job, flat, by the names that a refusal shows.

    Args:
        source: as the command has it; None leaves it out.
        model: the model, with its files.
        options: how the job is run.
    """
    card = deciding_fields(model.card)
    # So that a refusal has a line for each field, from an image to a tensor and back.
    card["preprocess"] = card["preprocess"] or dict.fromkeys(one.name for one in fields(Preprocess))
    card["output"].setdefault("background", None)
    return {
        **({} if source is None else {"source": canonical(source, options)}),
        "suffix": sorted(suffix.lower() for suffix in options.suffix) if options.suffix is not None else None,
        "limit": options.limit,
        "model": model.digest,
        **dict(_flat(card)),
        "precision": model.card.precision,
        "decode": options.decode,
        "max_pixels": options.max_pixels,
        "infermill": __version__,
    }


def _flat(card: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in card.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{field}", inner) for field, inner in value.items())
        else:
            yield name, value


def check_same_job(record: Record, now: Mapping[str, Any], uri: str, appending: bool = False) -> None:
    """Refuse to go on with a job that was started otherwise, with a line for each difference.

    Raises:
        JobMismatchError: something differs.
    """
    before = record.fingerprint
    differing = [name for name, value in now.items() if before.get(name) != value]
    if "source" in differing and (
        now["source"] in record.appended_sources
        # What is appended is other content, by its nature.
        or (appending and _MANIFEST.sub("manifest", now["source"]) == _MANIFEST.sub("manifest", before["source"]))
    ):
        differing.remove("source")
    if not differing:
        return
    lines = [f"{name}: {before.get(name)} -> {now[name]}" for name in differing]
    if "model" in differing and not any("." in name or name in ("task", "precision") for name in differing):
        lines.append("(the card says the same: the network's weights or the labels differ)")
    raise JobMismatchError(
        f"{uri} holds another job:\n  " + "\n  ".join(lines),
        "write to another output, repeat the job with the settings it was started with, "
        'or start anew with --overwrite (existing="overwrite" in Python), which moves the old job aside',
    )


def read_record(place: Output) -> Record | None:
    """The job that an output holds, if any.

    Raises:
        JobMismatchError: the record is damaged, or of another format.
    """
    job = _read(place, JOB_FILE)
    if job is None:
        return None
    numbers = sorted(int(match[1]) for match in map(_APPEND.fullmatch, place.names(FOLDER)) if match)
    with ThreadPoolExecutor(16) as pool:
        appends = [found for found in pool.map(lambda number: _read(place, _append_name(number)), numbers) if found]
    try:
        record = Record(
            # Without a word, the job is from before there was another precision.
            fingerprint={"precision": "fp32", **job["fingerprint"]},
            source=Source(**job["source"]),
            plans=tuple(PlanInfo(**one["plan"]) for one in (job, *appends)),
            model=job["model"],
            card_options=CardOptions(**{name: _tupled(value) for name, value in job["card_options"].items()}),
            appended_sources=frozenset(append["appended"] for append in appends),
        )
    except (KeyError, TypeError):
        raise _damaged(place, JOB_FILE) from None
    for before, after in zip(record.plans, record.plans[1:], strict=False):
        if before.end != after.first:
            raise _damaged(place, f"{FOLDER}/append-*.json")
    return record


def _read(place: Output, name: str) -> dict[str, Any] | None:
    content = place.read(name)
    if content is None:
        return None
    try:
        data: dict[str, Any] = json.loads(content)
        if data["format"] == FORMAT:
            return data
    except (ValueError, KeyError, TypeError):
        pass
    raise _damaged(place, name)


def _damaged(place: Output, name: str) -> JobMismatchError:
    return JobMismatchError(
        f"{place.uri}/{name} is damaged, or not of format {FORMAT}",
        "use the infermill that wrote it, another output, or --overwrite, which moves it aside",
    )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _append_name(number: int) -> str:
    return f"{FOLDER}/append-{number:05d}.json"


class NewPlan:
    """The files of a plan that no record names yet; they are deleted where nothing comes of it.

    Raises:
        InfermillError: whatever `tables` raises, or the output refuses.
    """

    def __init__(self, place: Output, tables: Iterable[pa.Table], first: int = 0) -> None:
        self._place = place
        self._created: list[str] = []
        plan_id = uuid.uuid4().hex[:12]
        try:
            self.info = write_plan(tables, plan_id, self._create, first)
        except InfermillError:
            self.discard()
            raise

    def _create(self, name: str, content: bytes) -> None:
        self._created.append(f"{PLAN_FOLDER}/{name}")
        self._place.create(self._created[-1], content)

    @property
    def files(self) -> list[str]:
        return list(self._created)

    def discard(self) -> None:
        self._place.delete(self._created)


def create_record(place: Output, plan: NewPlan, record: Record) -> Record:
    """Make `plan` the job, and return the job that counts: another driver may have been faster."""
    content = {
        **_header(),
        "fingerprint": record.fingerprint,
        "source": asdict(record.source),
        "model": record.model,
        "card_options": {name: value for name, value in asdict(record.card_options).items() if value is not None},
        "plan": asdict(plan.info),
    }
    return _created(place, plan, JOB_FILE, content)


def discard_record(place: Output, record: Record) -> None:
    """Take back a job that nobody can begin, if it is still the one that the output holds.

    Only who has created it may: until then no other job takes its place, but by --overwrite.
    """
    if not place.parts() and read_record(place) == record:
        place.remove([JOB_FILE])  # first: a plan without a record is no job
        place.delete([f"{PLAN_FOLDER}/{name}" for plan in record.plans for name, _ in plan.files])


def append_record(place: Output, plan: NewPlan, record: Record, appended: str) -> Record:
    """Append `plan` to the job, and return the job as it is then; another driver may have been faster.

    Args:
        place: the output.
        plan: what is new; its partitions are numbered on from the record's.
        record: the job that it is appended to.
        appended: the source, as a fingerprint knows it.
    """
    content = {**_header(), "appended": appended, "plan": asdict(plan.info)}
    return _created(place, plan, _append_name(len(record.plans)), content)


def _header() -> dict[str, Any]:
    return {"format": FORMAT, "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _created(place: Output, plan: NewPlan, name: str, content: Mapping[str, Any]) -> Record:
    # From here on the record may name our plan, whatever the store says: it is deleted only when another one has won.
    place.create(name, json.dumps(content, indent=1).encode())
    winner = read_record(place)
    if winner is None or _read(place, name) is None:
        raise StoreError(f"{place.uri}/{name} can neither be created nor read", "run the same command again")
    if plan.info not in winner.plans:
        plan.discard()
    return winner


def model_reference(model: str | Path | ModelCard) -> str | None:
    """The model as a record keeps it: absolute; `locate` has refused what holds a secret."""
    return None if isinstance(model, ModelCard) else locate(model).uri


def absolute(card_options: CardOptions) -> CardOptions:
    """The same options, wherever they are read."""
    if card_options.labels is None:
        return card_options
    return replace(card_options, labels=locate(card_options.labels).uri)


def move_aside(place: Output, keep: Iterable[str] = ()) -> str | None:
    """Move whatever an output holds into a folder in it, and return the folder; None where there was nothing.

    _SUCCESS goes first and the plan last: what a crash leaves is the old job, to be resumed, or none.

    Args:
        place: the output.
        keep: files of plans that stay.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = f"{FOLDER}/replaced-{now}"
    kept = set(keep)
    inside = place.names(FOLDER)
    appends = sorted((name for name in inside if _APPEND.fullmatch(name)), reverse=True)
    steps: list[list[str]] = [
        [name for name in place.names() if name == SUCCESS_FILE],
        list(place.parts().values()),
        *([f"{FOLDER}/{name}"] for name in appends),
        [JOB_FILE] if Path(JOB_FILE).name in inside else [],
        [name for name in (f"{PLAN_FOLDER}/{file}" for file in place.names(PLAN_FOLDER)) if name not in kept],
    ]
    for names in steps:
        place.move(names, folder)
    return folder if any(steps) else None


def totals_of(objects: int, reports: Mapping[int, PartitionReport]) -> dict[str, Any]:
    """What _SUCCESS says of the rows, whenever and by whom they were predicted."""
    codes: Counter[str] = Counter()
    for report in reports.values():
        codes.update(report.failures_by_code)
    return {
        "planned": objects,
        "ok": sum(report.ok for report in reports.values()),
        "failed": codes.total(),
        "failures_by_code": dict(codes.most_common()),
        "parts": [[number, report.ok, report.failed] for number, report in sorted(reports.items())],
    }


def differing_totals(success: bytes, totals: Mapping[str, Any]) -> list[str]:
    """Which of the totals a _SUCCESS tells otherwise; all of them where it cannot be read."""
    try:
        found = json.loads(success)
        return [name for name in _TOTALS if found[name] != totals[name]]
    except (ValueError, KeyError, TypeError):
        return list(_TOTALS)
