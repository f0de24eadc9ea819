"""The command line: parse, call, print. Results go to standard output, everything else to standard error."""

import dataclasses
import json as jsonlib
import logging
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.validators import mutually_exclusive

from infermill import __version__
from infermill.errors import BudgetError, EvidenceError, InfermillError, UsageError
from infermill.types import RETRYABLE, CardOptions, DatasetHome, EngineName, Options, RuntimeName, Split, StoreOptions

app = App(
    name="infermill",
    help="Run a trained network over everything in a bucket, a folder or a table, and account for every input.",
    version=__version__,
    help_format="rich",
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)
CARD = Group("Model (for a bare network, or to override the card)", sort_key=3)
JOB = Group("Job", sort_key=1)
EXISTING = Group("Job that is there already", sort_key=2, validator=mutually_exclusive)
Model = Annotated[str, Parameter(alias="-m", help="A model card, an .onnx, or an MXNet checkpoint: a path or a URI.")]
JobFlags = Annotated[Options, Parameter(name="*", group=JOB)]
CardFlags = Annotated[CardOptions, Parameter(name="*", group=CARD)]
StoreFlags = Annotated[StoreOptions, Parameter(name="*")]
TruthFile = Annotated[
    str | None, Parameter(help="Parquet with `key` and `label`, for accuracy. (default: labels of shards)")
]
Json = Annotated[bool, Parameter(help="Print the result as one JSON object.")]
SOURCE_HELP = "Folder, file, glob, shard, manifest (.txt, .parquet, - for standard input), or s3://, gs://, az:// URI."
Source = Annotated[str, Parameter(help=SOURCE_HELP, allow_leading_hyphen=True)]  # `-`
TOLERANCE_HELP = (
    "Difference that is none, as a part of the largest value; in a lower precision, of the agreement. "
    "(default: 0.0001; 0.01 in a lower precision)"
)
Output = Annotated[str, Parameter(help="The folder or URI that `run` wrote to.")]
NO_OPTIONS = Options()
NO_STORE_OPTIONS = StoreOptions()
NO_CARD_OPTIONS = CardOptions()


@app.command
def run(
    source: Source,
    /,
    *,
    model: Model,
    output: Annotated[str, Parameter(alias="-o", help="A folder or URI for the parts; the same job there resumes.")],
    append: Annotated[bool, Parameter(group=EXISTING, help="List again; add what is new, redo what changed.")] = False,
    overwrite: Annotated[bool, Parameter(group=EXISTING, help="Move it aside, inside the output.")] = False,
    json: Json = False,
    options: JobFlags = NO_OPTIONS,
    card: CardFlags = NO_CARD_OPTIONS,
) -> int:
    """Predict everything in SOURCE: one row for every object, a prediction or a failure."""
    from infermill import engines

    _log_to_stderr()
    with engines.start(options) as engine:
        from infermill import job, report  # only now: the workers import at the same time
        from infermill.progress import show_progress

        existing: job.Existing = "append" if append else "overwrite" if overwrite else "resume"
        try:
            summary = job.run(source, model, output, options, card, show_progress, existing, engine)
        except BudgetError as error:
            if json and error.summary is not None:
                print(jsonlib.dumps(error.summary.as_json()))
            raise
    print(jsonlib.dumps(summary.as_json()) if json else report.summary_text(summary))
    return _within_budget(f"{summary.failed:,}", summary.failed, summary.planned, options)


@app.command
def retry(
    output: Output,
    /,
    *,
    model: Annotated[str | None, Parameter(alias="-m", help="Where it is now. (default: as `run` was told)")] = None,
    codes: Annotated[str, Parameter(help="Failures to try again, with commas between.")] = ",".join(RETRYABLE),
    json: Json = False,
    options: JobFlags = NO_OPTIONS,
) -> int:
    """Predict again what failed for a reason that may pass; the new rows take the place of the old ones."""
    from infermill import engines

    _log_to_stderr()
    with engines.start(options) as engine:
        from infermill import job, report  # only now: the workers import at the same time
        from infermill.progress import show_progress

        summary = job.retry(output, model, codes.split(","), options, None, show_progress, engine)
    print(jsonlib.dumps(summary.as_json()) if json else report.summary_text(summary))
    return _within_budget(f"{summary.failed:,}", summary.failed, summary.planned, options)


@app.command
def status(output: Output, /, *, json: Json = False, store: StoreFlags = NO_STORE_OPTIONS) -> int:
    """Show how far the job in OUTPUT is, from the footers of its parts."""
    from infermill import audit, report

    found = audit.status(output, store)
    print(jsonlib.dumps(found.as_json()) if json else report.status_text(found))
    return 0


@app.command
def verify(output: Output, /, *, json: Json = False, store: StoreFlags = NO_STORE_OPTIONS) -> int:
    """Read all of OUTPUT and check it: every key once, every part as it was written, the totals as declared."""
    from infermill import audit, report

    found = audit.verify(output, store)
    print(jsonlib.dumps(found.as_json()) if json else report.verification_text(found))
    return 1 if found.problem_count else 0


@app.command
def plan(
    source: Source,
    /,
    *,
    model: Model,
    json: Json = False,
    options: JobFlags = NO_OPTIONS,
    card: CardFlags = NO_CARD_OPTIONS,
) -> int:
    """Count SOURCE and predict a sample of it: how long the job will take, and what will fail.

    Writes nothing but the cache: models from a store, and the streams and the batch that a long job will take.
    """
    from infermill import report
    from infermill.estimation import estimate as estimate_job

    _log_to_stderr()
    estimate = estimate_job(source, model, options, card)
    as_json = jsonlib.dumps(dataclasses.asdict(estimate))
    print(as_json if json else report.estimate_text(estimate))
    return _within_budget(
        f"about {estimate.expected_failures:,}", estimate.expected_failures, estimate.objects, options
    )


def _within_budget(count: str, failed: int, planned: int, options: Options) -> int:
    from infermill.budget import Budget

    if Budget.parse(options.max_failures).allows(failed, planned):
        return 0
    message = f"{count} of {planned:,} objects fail, more than --max-failures {options.max_failures}"
    return _complain(BudgetError(message, "each has a row with its reason in the column `error`"))


@app.command
def inspect(
    model: Annotated[str, Parameter(help="A network (.onnx, or an MXNet checkpoint) or a model card.")],
    /,
    *,
    write: Annotated[Path | None, Parameter(help="Write the model card to this new file.")] = None,
    json: Json = False,
    card: CardFlags = NO_CARD_OPTIONS,
    store: StoreFlags = NO_STORE_OPTIONS,
) -> int:
    """Show a network's inputs and outputs, and the card that infermill would use for it."""
    from infermill import report
    from infermill.models.inspection import inspect_model

    inspection = inspect_model(model, store, card, write)
    print(jsonlib.dumps(inspection.as_json()) if json else report.inspection_text(inspection))
    return 0


@app.command
def check(
    source: Annotated[str | None, Parameter(help=f"{SOURCE_HELP} (default: random inputs)")] = None,
    /,
    *,
    model: Model,
    against: Annotated[RuntimeName, Parameter(help="The runtime that is right, in fp32.")],
    tolerance: Annotated[float | None, Parameter(help=TOLERANCE_HELP)] = None,
    truth: TruthFile = None,
    json: Json = False,
    options: JobFlags = NO_OPTIONS,
    card: CardFlags = NO_CARD_OPTIONS,
) -> int:
    """Run a sample of SOURCE in two runtimes, or two precisions; find the first layer that differs."""
    from infermill import report
    from infermill.check import check as check_model

    _log_to_stderr()
    comparison = check_model(model, against, source, options, card, tolerance, truth)
    print(jsonlib.dumps(comparison.as_json()) if json else report.comparison_text(comparison))
    return 0 if comparison.agrees else 1


@app.command
def convert(
    model: Annotated[str, Parameter(help="An MXNet checkpoint: PREFIX, PREFIX-symbol.json, .params, .mar, or a card.")],
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o", help="The .onnx to write; its card is written beside it.")],
    json: Json = False,
    card: CardFlags = NO_CARD_OPTIONS,
    store: StoreFlags = NO_STORE_OPTIONS,
) -> int:
    """Translate an MXNet checkpoint to ONNX, and write a model card for it. MXNet is not needed."""
    from infermill import report
    from infermill.models.conversion import convert_model

    conversion = convert_model(model, output, store, card)
    print(jsonlib.dumps(conversion.as_json()) if json else report.conversion_text(conversion))
    return 0


@app.command
def quantize(
    model: Annotated[str, Parameter(help="A model card, an .onnx, or an MXNet checkpoint: a path or a URI.")],
    /,
    *,
    calibrate: Annotated[str, Parameter(help=f"{SOURCE_HELP} A sample of it is used.", allow_leading_hyphen=True)],
    output: Annotated[Path, Parameter(alias="-o", help="The card to write (.yaml); the network lies beside it.")],
    min_agreement: Annotated[
        float | None, Parameter(help="Write nothing below this, and end with exit code 3.")
    ] = None,
    objects: Annotated[int, Parameter(help="Size of the sample.")] = 800,
    truth: TruthFile = None,
    json: Json = False,
    options: JobFlags = NO_OPTIONS,
    card: CardFlags = NO_CARD_OPTIONS,
) -> int:
    """Write a network in int8, and how far its answers are from those in fp32 on objects of your own."""
    from infermill import report
    from infermill.quantize import quantize as quantize_model

    _log_to_stderr()
    found = quantize_model(
        model, calibrate, output, options, card, objects=objects, min_agreement=min_agreement, truth=truth
    )
    print(jsonlib.dumps(found.as_json()) if json else report.quantization_text(found))
    if found.passed:
        return 0
    message = f"int8 agrees with fp32 by {found.evidence.agreement:.2%}, less than --min-agreement {min_agreement}"
    return _complain(EvidenceError(message, "nothing was written; the worst objects are listed above"))


@app.command
def doctor(
    *,
    json: Json = False,
    engine: Annotated[EngineName, Parameter(help="With `spark`, ask each executor of a cluster, too.")] = "local",
    master: Annotated[str | None, Parameter(help="The cluster, as for `run`.")] = None,
    remote: Annotated[str | None, Parameter(help="The Spark Connect server, as for `run`.")] = None,
    conf: Annotated[tuple[str, ...], Parameter(help="A Spark setting, key=value; repeat it for several.")] = (),
) -> int:
    """Show what is installed and usable; every ✗ comes with a hint."""
    from infermill import report
    from infermill.doctor import examine

    _log_to_stderr()
    findings = examine(Options(engine=engine, master=master, remote=remote, conf=conf))
    print(jsonlib.dumps([dataclasses.asdict(one) for one in findings]) if json else report.findings_text(findings))
    return 0 if all(one.usable or one.optional for one in findings) else 1


datasets = App(name="datasets", help="Put a public data set where jobs read it: one object an image.")
app.command(datasets)


@datasets.command
def cifar10(
    *,
    to: Annotated[str, Parameter(help="A folder or URI for the PNG files and labels.parquet.")],
    archive: Annotated[str | None, Parameter(help="The .tar.gz, python or binary. (default: it is downloaded)")] = None,
    split: Annotated[Split, Parameter(help="Which of its images.")] = "test",
    json: Json = False,
    home: Annotated[DatasetHome | None, Parameter(name="*")] = None,
    store: StoreFlags = NO_STORE_OPTIONS,
) -> int:
    """Unpack CIFAR-10 into PNG files; those that are there already are not written again."""
    from infermill import report
    from infermill.datasets import unpack_cifar10

    _log_to_stderr()
    unpacked = unpack_cifar10(to, archive, split, store, home)
    print(jsonlib.dumps(unpacked.as_json()) if json else report.unpacked_text(unpacked))
    return 0


@app.command
def demo() -> int:
    """Classify real photos with a real network, both from installed packages (the extra `demo`)."""
    from infermill.demo import demo as run_demo

    return run_demo()


def run_command() -> int:
    """Run what the command line says: 0 done, 1 failed, 2 bad usage, 3 over a budget or under a gate."""
    try:
        return app(exit_on_error=False, print_error=False) or 0
    except CycloptsError as error:
        return _complain(UsageError(str(error), "infermill COMMAND --help shows every flag"))
    except InfermillError as error:
        return _complain(error)
    except BrokenPipeError:
        return 1


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("infermill").setLevel(logging.INFO)


def _complain(error: InfermillError) -> int:
    from infermill.report import print_problem

    print_problem(error.message, error.hint)
    return error.exit_code
