"""Results and problems as text for people."""

import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from infermill.progress import duration
from infermill.types import Summary

if TYPE_CHECKING:
    from infermill.audit import JobStatus, Verification
    from infermill.check import Comparison
    from infermill.datasets import Unpacked
    from infermill.doctor import Finding
    from infermill.estimation import Estimate
    from infermill.evidence import Evidence, Worst
    from infermill.models.conversion import Conversion
    from infermill.models.inspection import Inspection
    from infermill.quantize import Quantization


SHOWN_PARTITIONS = 20


def print_problem(message: str, hint: str) -> None:
    """`error: …` and `hint: …` on standard error."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    lines = "\n".join(_visible(line) for line in message.split("\n"))
    console.print(Text.assemble(("error", "bold red"), f": {lines}"))
    if hint:
        console.print(Text.assemble("\n", ("hint", "bold cyan"), f": {_visible(hint)}"))


def summary_text(summary: Summary) -> str:
    """Totals, failures by code with an example each, seconds by stage, and the output's path last."""
    lines: list[RenderableType] = [
        Text.assemble(
            (f"{summary.planned:,}", "bold"), " objects: ",
            (f"{summary.ok:,} predicted", "green"), ", ",
            (f"{summary.failed:,} failed", "red" if summary.failed else ""),
            f" in {duration(summary.seconds)}",
            f" ({summary.objects_per_second:,.1f}/s)" if summary.objects_per_second else " (all of it was done before)",
        )
    ]  # fmt: skip
    if summary.new is not None:
        lines.append(
            Text(f"listed again: {summary.new:,} new, {summary.changed:,} changed, {summary.unchanged:,} unchanged")
        )
    if summary.retried is not None:
        lines.append(Text(f"{summary.retried:,} predicted again"))
    if summary.halved_batches:
        lines.append(Text(f"memory ran out {summary.halved_batches:,} times; batches were halved", style="yellow"))
    if summary.failures_by_code:
        lines += ["", _failures(summary.failures_by_code, summary.example_keys)]
    if summary.workers:
        stages = (f"{stage} {seconds:,.1f}" for stage, seconds in summary.stage_seconds.items())
        lines += ["", Text(f"thread-seconds: {' · '.join(stages)}", style="dim")]
        lines.append(Text(_waits(summary), style="dim"))
        if summary.verdict:
            lines.append(Text(summary.verdict, style="dim"))
        lines += [Text(_choice(summary.choice), style="dim")] if summary.choice else []
    if summary.profile is not None:
        lines.append(Text(f"traces for https://ui.perfetto.dev: {_visible(summary.profile)}"))
    lines += ["", Text(_visible(summary.output))]
    return _rendered(lines)


def _waits(summary: Summary) -> str:
    idle, queues = summary.idle_seconds, summary.queue_depths
    waits = f"waited: fetch threads {idle['fetch']:,.1f} · for the network {idle['network']:,.1f}"
    return f"{waits}; queued objects: {queues['fetched']:,.1f} fetched · {queues['decoded']:,.1f} decoded"


def _failures(codes: Mapping[str, int], examples: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("failure")
    table.add_column("count", justify="right")
    table.add_column("for example", overflow="fold")
    for code, count in codes.items():
        table.add_row(Text(code, style="red"), f"{count:,}", Text(_visible(examples.get(code, ""))))
    return table


def _choice(choice: Mapping[str, int | str]) -> str:
    threads = f"{choice['threads']} thread{'' if choice['threads'] == 1 else 's'}"
    told = f"batches of {choice['batch']}, {choice['streams']} at once, {threads}"
    others = f"; and {choice['others']} other choices" if "others" in choice else ""
    return f"{told} ({choice['reason']}){others}"


def status_text(status: "JobStatus") -> str:
    """How far a job is; of many partitions, those that are not done and those with failures come first."""
    if status.success and not status.left:
        state = ("finished", "green")
    else:
        state = (f"not finished: {status.left:,} objects are left", "yellow")
    lines: list[RenderableType] = [
        Text.assemble(
            (f"{status.planned:,}", "bold"), " objects: ",
            (f"{status.ok:,} predicted", "green"), ", ",
            (f"{status.failed:,} failed", "red" if status.failed else ""), f", {status.left:,} left",
        ),
        Text(f"{status.partitions:,} partitions: {status.partitions_done:,} done, {status.partitions_left:,} left"),
        Text.assemble(state),
    ]  # fmt: skip
    if status.failures_by_code:
        lines += ["", _failures(status.failures_by_code, status.example_keys)]
    lines += ["", *_partitions(status)]
    return _rendered([*lines, "", Text(_visible(status.output))])


def _partitions(status: "JobStatus") -> list[RenderableType]:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("partition", "planned", "predicted", "failed"):
        table.add_column(column, justify="right")
    shown = status.by_partition
    if len(shown) > SHOWN_PARTITIONS:
        shown = tuple(sorted(shown, key=lambda one: (one.ok is not None, -(one.failed or 0)))[:SHOWN_PARTITIONS])
    for one in shown:
        figures = ("-", "-") if one.ok is None else (f"{one.ok:,}", f"{one.failed:,}")
        table.add_row(str(one.partition), f"{one.planned:,}", *figures)
    hidden = len(status.by_partition) - len(shown)
    return [table] if not hidden else [table, Text(f"and {hidden:,} more; --json has them all", style="dim")]


def verification_text(found: "Verification") -> str:
    """A line of totals, or a line for each problem."""
    if not found.problem_count:
        return _rendered(
            [
                Text.assemble(
                    ("verified", "green"),
                    f": {found.objects:,} objects in {found.partitions:,} partitions, "
                    f"{found.ok:,} predicted and {found.failed:,} failed",
                )
            ]
        )
    lines: list[RenderableType] = [Text.assemble(("problem", "red"), f": {_visible(one)}") for one in found.problems]
    hidden = found.problem_count - len(found.problems)
    if hidden:
        lines.append(Text(f"and {hidden:,} more", style="dim"))
    lines += ["", Text("`infermill run` with the same arguments does what is missing: delete a part that is damaged")]
    return _rendered(lines)


def estimate_text(estimate: "Estimate") -> str:
    """What a job would be."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    rate = f"{estimate.objects_per_second:,.1f} images/s (probed with {estimate.probed} objects, start-up not counted)"
    failures = f"about {estimate.expected_failures:,}" if estimate.expected_failures else "none expected"
    codes = ", ".join(f"{count} {code}" for code, count in estimate.probe_failures.items())
    for name, value in (
        ("objects", f"{estimate.objects:,}"),
        ("input", f"{estimate.size_bytes / 1e6:,.1f} MB" if estimate.size_bytes else "unknown"),
        ("partitions", f"{estimate.partitions:,}"),
        ("pace", rate),
        ("ETA", duration(estimate.seconds)),
        ("failures", f"{failures} ({codes} in the probe)" if codes else failures),
    ):
        table.add_row(name, Text(value))
    return _rendered([table])


def inspection_text(inspection: "Inspection") -> str:
    """A network's tensors, and its card."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("tensor", "name", "type", "shape"):
        table.add_column(column)
    for kind, tensors in (("input", inspection.network.inputs), ("output", inspection.network.outputs)):
        for tensor in tensors:
            shape = ", ".join("?" if size is None else str(size) for size in tensor.shape or ())
            table.add_row(kind, Text(tensor.name), tensor.dtype, Text(f"[{shape}]"))
    lines: list[RenderableType] = [table, Text(f"computed in {inspection.precision}", style="dim"), ""]
    lines += [Text(f"assumed: {line}", style="yellow") for line in inspection.assumptions]
    if inspection.problem:
        lines.append(Text(f"problem: {inspection.problem}", style="red"))
    lines += [""] if inspection.assumptions or inspection.problem else []
    lines.append(Text(f"# {inspection.written or 'model.yaml'}", style="dim"))
    lines.append(Text(inspection.card_yaml.rstrip()))
    if inspection.written is None:
        lines += ["", Text("--write FILE.yaml keeps this card", style="dim")]
    return _rendered(lines)


def conversion_text(conversion: "Conversion") -> str:
    """What was assumed, and the two files that were written, on a line each."""
    lines: list[RenderableType] = [Text(f"assumed: {line}", style="yellow") for line in conversion.assumptions]
    return _rendered([*lines, Text(str(conversion.network)), Text(str(conversion.card))])


def comparison_text(comparison: "Comparison") -> str:
    """How far the answers of two runtimes are apart, and where that begins; or what a lower precision is worth."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("output", "max |Δ|", "of the largest value", "same top-1"):
        table.add_column(column, justify="left" if column == "output" else "right")
    for one in comparison.outputs:
        top1 = "" if one.top1 is None else f"{one.top1:.1%}"
        table.add_row(Text(_visible(one.name)), f"{one.absolute:.2g}", f"{one.relative:.2g}", top1)
    skipped = f", {comparison.skipped:,} cannot be decoded" if comparison.skipped else ""
    found, expected = (
        f"{runtime} in {precision}" if comparison.is_lower else runtime
        for runtime, precision in (
            (comparison.runtime, comparison.precision),
            (comparison.against, comparison.against_precision),
        )
    )
    unanswered = comparison.inputs - comparison.evidence.objects
    if unanswered:
        skipped += f", {unanswered:,} not answered with numbers by {expected}"
    what = f"{found} against {expected}: {comparison.inputs:,} inputs{skipped}"
    shown: list[RenderableType] = [Text(what), "", table, ""]
    lines = _evidence(comparison.evidence) if comparison.is_lower else []
    if lines := lines + _accuracy(comparison.evidence, f"on {expected}", f"on {found}"):
        shown += [_pairs(lines), ""]
    if comparison.is_lower and not comparison.agrees:
        shown += [_worst(("worst inputs", expected, found), comparison.worst), ""]
    verdict = _agreement(comparison) if comparison.is_lower else _difference(comparison)
    return _rendered([*shown, *verdict])


def _agreement(comparison: "Comparison") -> list[RenderableType]:
    """Whether the evidence for a lower precision is enough."""
    verdict = ("agree", "green") if comparison.agrees else ("differ", "red")
    what = "agreement" if comparison.evidence.interval is None else "interval"
    reached = f"{'reaches' if comparison.agrees else 'does not reach'} {100 * (1 - comparison.tolerance):.4g}%"
    return [Text.assemble(verdict, f": the {what} {reached}")]


def _difference(comparison: "Comparison") -> list[RenderableType]:
    """Whether the outputs differ, and where that begins."""
    tolerance, layer = f"{comparison.tolerance:g} of the largest value", comparison.layer
    if comparison.agrees:
        return [Text.assemble(("agree", "green"), f": no output differs by more than {tolerance}")]
    if layer is None:
        return [
            Text.assemble(("differ", "red"), f" by more than {tolerance}, and no layer does by itself"),
            Text("Runtimes join layers, unless they have to tell what is between: what they join is what differs."),
        ]
    name = f"{_visible(layer.node)} ({layer.operator})" if layer.operator else _visible(layer.node)
    apart = f"{layer.inside:.2g} in, {layer.outside:.2g} out ({layer.relative:.2g} of the largest value)"
    return [
        Text.assemble(("differ", "red"), f" by more than {tolerance}, first at ", (name, "bold")),
        Text(f"max |Δ| there: {apart}"),
    ]


def quantization_text(found: "Quantization") -> str:
    """The evidence for a network in int8, its worst objects where it is not enough, and the two files."""
    evidence = found.evidence
    lines = _evidence(evidence) + _accuracy(evidence, "in fp32", "in int8")
    share = "" if found.int8_share is None else f", {found.int8_share:.0%} of multiplications in int8"
    lines.append(("kept in float", f"{len(found.kept_in_float)} of {found.nodes} nodes{share}"))
    skipped = f", {found.skipped:,} cannot be decoded" if found.skipped else ""
    if found.unanswered:
        skipped += f", {found.unanswered:,} not answered with numbers by fp32"
    what_for = f"calibrated with {found.calibrated:,}, chosen with {found.selected:,}{skipped}"
    head = f"int8 against fp32 on {found.runtime}: {evidence.objects:,} objects ({what_for})"
    shown: list[RenderableType] = [Text(head), "", _pairs(lines), ""]
    if not found.passed:
        return _rendered([*shown, _worst(("worst objects", "fp32", "int8"), found.worst)])
    return _rendered([*shown, Text(_visible(str(found.network))), Text(_visible(str(found.card)))])


def _evidence(evidence: "Evidence") -> list[tuple[str, str]]:
    """How far answers are from those in fp32, as the rows of a table."""
    what = {"top-1": "the same best class", "cosine": "mean cosine similarity", "relative error": "1 - relative error"}
    lines = [(what[evidence.measure], f"{evidence.agreement:.2%}{_between(evidence.interval)}")]
    difference = "|Δ score|" if evidence.measure == "top-1" else "difference"
    lines.append((difference, f"max {evidence.max_delta:.2g}, mean {evidence.mean_delta:.2g}"))
    if evidence.nonfinite:
        lines.append(("NaN or infinity", f"{evidence.nonfinite:,} objects"))
    return lines


def _accuracy(evidence: "Evidence", *sides: str) -> list[tuple[str, str]]:
    """The accuracy of both sides, as rows of the same table; none where no object has a label."""
    return [
        (f"accuracy {side}", f"{one.share:.2%}{_between(one.interval)} of {one.of:,} with a label")
        for side, one in zip(sides, evidence.accuracy or (), strict=False)
    ]


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95 %: {interval[0]:.2%} to {interval[1]:.2%})"


def _pairs(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in lines:
        table.add_row(name, Text(value))
    return table


def _worst(columns: Sequence[str], rows: "Sequence[Worst]") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    table.add_column("|Δ|", justify="right")
    for one in rows:
        delta = "NaN" if one.delta is None else f"{one.delta:.3f}"
        table.add_row(*(Text(_visible(text or "")) for text in (one.key, one.expected, one.found)), delta)
    return table


def unpacked_text(unpacked: "Unpacked") -> str:
    """How many images lie where, and the file of their labels."""
    before = f", {unpacked.skipped:,} of them from before" if unpacked.skipped else ""
    return f"{unpacked.images:,} images in {_visible(unpacked.to)}{before}; labels in {_visible(unpacked.labels)}"


def findings_text(findings: "Sequence[Finding]") -> str:
    """What is installed and usable."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        mark = Text("✓", style="green") if finding.usable else Text("✗", style="yellow" if finding.optional else "red")
        detail = Text(finding.detail)
        if finding.hint:
            detail.append(f"\nhint: {finding.hint}", style="cyan")
        table.add_row(mark, finding.name, detail)
    return _rendered([table])


def _rendered(lines: Sequence[RenderableType]) -> str:
    """Coloured only where standard output is a terminal; there, as wide as it is."""
    is_terminal = sys.stdout.isatty()
    width = Console().width if is_terminal else 200
    console = Console(file=StringIO(), force_terminal=is_terminal, width=width, highlight=False)
    with console.capture() as capture:
        for line in lines:
            console.print(line, soft_wrap=isinstance(line, Text))
    return "\n".join(part.rstrip() for part in capture.get().rstrip().split("\n"))


def _visible(text: str) -> str:
    """Keys may hold anything; control characters, line breaks included, are shown escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
