"""One command at work on a job: what is done, what is to be done, and what the summary says of it."""

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infermill.budget import Budget
from infermill.engines import Engine
from infermill.errors import BudgetError
from infermill.jobspec import Job
from infermill.meter import Meter
from infermill.models.model import Model
from infermill.output import SUCCESS_FILE, Output
from infermill.plan import Revision
from infermill.record import FOLDER, Record, differing_totals, read_record, totals_of
from infermill.types import Options, PartitionReport, Summary
from infermill.verdict import verdict

NO_REVISION = Revision.write([])
logger = logging.getLogger("infermill")


@dataclass
class Driver:
    """One command at work on a job."""

    place: Output
    model: Model
    options: Options
    meter: Meter
    engine: Engine
    started: float
    reports: dict[int, PartitionReport] = field(default_factory=dict)
    has_revised: bool = False
    profile: str | None = None
    "The folder in the output where workers leave what their threads did and when."

    def read_reports(self, record: Record) -> None:
        """Learn from the parts what is done. Those with other numbers may be another driver's, which has appended."""
        found = self.place.reports(record.notes)
        self.reports = {number: report for number, report in found.items() if number < record.partitions}

    def finish(self, record: Record) -> None:
        """Predict the partitions without a part."""
        self.read_reports(record)
        todo = [number for number in range(record.partitions) if number not in self.reports]
        if self.reports and todo:
            logger.info("resuming: %d of %d partitions are done", len(self.reports), record.partitions)
        done = sum(report.ok + report.failed for report in self.reports.values())
        self.predict(record, todo, record.objects - done)

    def predict(self, record: Record, ids: Sequence[int], objects: int, revision: bytes = NO_REVISION) -> None:
        """Predict partitions, which hold so many objects, and supersede the rows of a revision."""
        revised = Revision(revision)
        self.meter.todo = self.meter.objects + objects + revised.objects
        if not (ids or revised.objects):
            return
        job = Job(
            record.source,
            self.model,
            self.place.uri,
            self.options,
            record.plans,
            profile=self.profile,
            todo=(objects + revised.objects) // self.options.workers,
        )
        if not revised.objects:
            self.place.remove([SUCCESS_FILE])
            self._run(job, ids, record)
            return
        self.place.probe_update()
        self.place.remove([SUCCESS_FILE])
        self.has_revised = True
        name = f"{FOLDER}/revisions/{uuid.uuid4().hex}.parquet"
        self.place.create(name, revision)
        try:
            self._run(replace(job, revision=name), [*ids, *revised.partitions], record)
        finally:
            self.place.delete([name])

    def _run(self, job: Job, ids: Sequence[int], record: Record) -> None:
        budget = Budget.parse(self.options.max_failures)
        failed = sum(report.failed for report in self.reports.values())
        settled = failed + sum(report.ok for report in self.reports.values())
        for report in self.engine(job, ids, self.meter):
            was = self.reports.get(report.partition)
            self.reports[report.partition] = report
            failed += report.failed - (was.failed if was else 0)
            settled += 0 if was else report.ok + report.failed
            if was is not None:  # superseding rows can only better it
                continue
            try:
                budget.check(failed, settled, record.objects)
            except BudgetError as error:
                error.summary = self.summary(record)
                raise

    def summary(self, record: Record) -> Summary:
        """What is known of the job by now."""
        codes: Counter[str] = Counter()
        examples: dict[str, str] = {}
        reports = [self.reports[number] for number in sorted(self.reports)]
        for report in reports:
            codes.update(report.failures_by_code)
            examples = dict(report.example_keys) | examples
        seconds, meter = time.monotonic() - self.started, self.meter
        looks = max(meter.looks, 1)
        precision = _all_of(report.precision for report in reports)
        return Summary(
            planned=record.objects,
            ok=sum(report.ok for report in reports),
            failed=codes.total(),
            failures_by_code=dict(codes.most_common()),
            example_keys=examples,
            seconds=round(seconds, 3),
            objects_per_second=round(meter.objects / seconds, 2),
            stage_seconds={stage: round(spent, 3) for stage, spent in meter.stage_seconds.items()},
            idle_seconds={
                "fetch": round(meter.waits["fetch"], 3),
                "compute": round(meter.stage_seconds["idle"], 3),
                "network": round(meter.waits["network"], 3),
            },
            queue_depths={
                "fetched": round(meter.fetched_seen / looks, 1),
                "decoded": round(meter.decoded_seen / looks, 1),
            },
            verdict=verdict(
                meter.pace_seconds,
                can_decode_faster=self.options.decode == "exact" and self.model.card.preprocess is not None,
                is_fp32=precision == "fp32",
            ),
            workers=meter.workers,
            model_loads=meter.model_loads,
            halved_batches=meter.halved_batches,
            runtime=_all_of(report.runtime for report in reports),
            precision=precision,
            choice=_choice_of(reports),
            digest=self.model.digest,
            output=self.place.uri,
            profile=f"{self.place.uri}/{self.profile}" if self.profile and meter.workers else None,
        )

    def declare_success(self, record: Record) -> None:
        """Leave a _SUCCESS with the totals, if every object of the plan is accounted for."""
        current = self.place.read(SUCCESS_FILE)
        others_appended = (read_record(self.place) or record).plans != record.plans
        if not self.has_revised and not others_appended and len(self.reports) == record.partitions:
            content = self._success(record)
            if current is None and self.place.create(SUCCESS_FILE, json.dumps(content).encode()):
                return
            if current is not None and not differing_totals(current, content):
                return
        self.place.update(SUCCESS_FILE, self._corrected_success)

    def _corrected_success(self, current: bytes | None) -> bytes | None:
        # Others may have appended and superseded rows meanwhile: what holds is the record and the parts.
        record = read_record(self.place)
        if record is None:
            return None
        self.read_reports(record)
        content = self._success(record)
        is_current = current is not None and not differing_totals(current, content)
        if len(self.reports) != record.partitions or is_current:
            return None
        return json.dumps(content).encode()

    def _success(self, record: Record) -> dict[str, Any]:
        return self.summary(record).as_json() | totals_of(record.objects, self.reports)


def _all_of(names: Iterable[str]) -> str:
    return ", ".join(sorted({one for name in names for one in name.split(", ")}))


def _choice_of(reports: Iterable[PartitionReport]) -> dict[str, int | str]:
    """What most objects were predicted with, and how many other choices there were."""
    objects: Counter[tuple[tuple[str, int | str], ...]] = Counter()
    reasons: dict[tuple[tuple[str, int | str], ...], int | str] = {}
    for report in reports:
        chosen = tuple((name, value) for name, value in report.choice.items() if name != "reason")
        objects[chosen] += report.ok + report.failed if chosen else 0
        reasons.setdefault(chosen, report.choice.get("reason", ""))
    objects.pop((), None)
    if not objects:
        return {}
    ((chosen, _),) = objects.most_common(1)
    others = {"others": len(objects) - 1} if len(objects) > 1 else {}
    return {**dict(chosen), "reason": reasons[chosen], **others}
