"""Images of 32x32 through a network of 41 million multiply-adds: where everything but the network weighs most.

And what an image costs in jobs of 1,000, 10,000 and 50,000, with the memory of each.
"""

from dataclasses import dataclass, field
from pathlib import Path

from alone import network_rate
from material import TWELVE, Material, add_records, agreement, reference, subset
from measuring import median, spread, table
from rates import FINALISTS, Series, best_of_each, failures, finalists, times
from ways import job, peer_ways


@dataclass(slots=True)
class Costs:
    """Of jobs of one size, a value a round; what a job of 12 takes is subtracted."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peaks_mb: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Ours:
    """infermill and the network alone, a value a round."""

    networks: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    "The rate after start-up, of the network alone before and after."
    whole_shares: list[float] = field(default_factory=list)
    "The same of the whole process."


def measure(made: Material) -> str:
    """Both tables, as Markdown."""
    card = add_records(made)
    ways, lacking = peer_ways(made.work / "resnet20.onnx", 32, made.peers)
    theirs = running = [Series(way) for way in ways]
    costs = {size: Costs() for size in sorted({made.records // 50, made.records // 5, made.records})}
    for size in costs:
        subset(made.work / "records", made.work / f"records-{size}", size)
    ours = Ours()
    for _ in range(made.rounds):
        _measure_ours(made, card, ours, costs)
        for series in running:
            series.measure(made, made.work / "twelve-records", made.work / "few-records", made.few_records)
            print(f"    {series.way.name}: {series.failed or f'{series.rates[-1]:.1f} images/s'}", flush=True)
        running = finalists(theirs)
    return f"{_peer_table(made, ours, theirs, best_of_each(theirs), lacking)}\n\n{_cost_table(made, costs)}"


def _measure_ours(made: Material, card: Path, ours: Ours, costs: dict[int, Costs]) -> None:
    ours.networks.append(network_rate(card))
    start = job("12", card).run(made.work / "twelve-records", made.out("twelve-records"))
    ours.starts.append(start.seconds)
    for size, found in costs.items():
        whole = job(str(size), card).run(made.work / f"records-{size}", made.out("records"))
        found.wall_ms.append(1e3 * (whole.seconds - start.seconds) / (size - TWELVE))
        found.cpu_ms.append(1e3 * (whole.cpu_seconds - start.cpu_seconds) / (size - TWELVE))
        found.peaks_mb.append(whole.peak_mb)
    ours.networks.append(network_rate(card))
    alone = sum(ours.networks[-2:]) / 2
    ours.rates.append(1e3 / found.wall_ms[-1])
    ours.shares.append(ours.rates[-1] / alone)
    ours.whole_shares.append(size / whole.seconds / alone)


def _peer_table(made: Material, ours: Ours, theirs: list[Series], chosen: list[Series], lacking: dict[str, str]) -> str:
    best = reference(made.work / "few-records", made.work / "resnet20.onnx", 32)
    against = chosen[0].rates if chosen else []
    ratio = times(ours.rates, against) if against else ""
    same = f"{agreement(made.work / 'out' / 'records', best):.1%}"
    rows = [["infermill, fp32", spread(ours.rates, ",.0f"), ratio, spread(ours.starts, ".2f"), same]]
    for series in chosen:
        same = "" if series.out is None else f"{agreement(series.out, best):.1%}"
        ratio = times(series.rates, against)
        rows.append([series.way.name, spread(series.rates, ",.0f"), ratio, spread(series.starts, ".2f"), same])
    header = ["", "images/s after start-up", "times the best peer", "12 images, whole process, s", "same top-1"]
    return (
        f"{made.records:,} PNG of 32x32, ResNet-20 (41 million multiply-adds), fp32; the peers predict "
        f"{made.few_records:,} of them, all of their ways in the first round, the {FINALISTS} fastest in each; "
        f"of each peer the better way. The network alone: {spread(ours.networks, ',.0f')} images/s; infermill after "
        f"start-up reaches **{spread(ours.shares, '.1%')}** of it, the whole process "
        f"{spread(ours.whole_shares, '.1%')}.\n\n"
        f"{table(header, rows)}\n\n" + "\n".join(failures(theirs, lacking))
    )


def _cost_table(made: Material, costs: dict[int, Costs]) -> str:
    smallest = min(costs)
    rows = []
    for size, found in costs.items():
        ratios = [one / other for one, other in zip(found.cpu_ms, costs[smallest].cpu_ms, strict=True)]
        peak = f"{median(found.peaks_mb):,.0f} MB"
        rows.append(
            [f"{size:,}", spread(found.wall_ms, ".3f"), spread(found.cpu_ms, ".3f"), spread(ratios, ".3f"), peak]
        )
    header = ["images", "ms an image", "ms of CPU an image", f"CPU, of that of {smallest:,}", "peak memory"]
    return (
        "What an image costs as a job grows (less what a job of 12 images takes, same round), and the most memory that "
        f"driver and worker had:\n\n{table(header, rows)}"
    )
