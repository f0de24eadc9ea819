"""Photos of 500x375 through ResNet-18: against the limit of the machine, and against the peers.

The limit is 1 / (1/network + 1/(cores · decode per core)): what the machine could do if decoding JPEG and running the
network, in the same precision, were all there is, and neither ever waited. Decoding is JPEG to RGB alone; resizing is
not in the limit. Everything is measured in turn in each round, and ratios are those within a round.
"""

from dataclasses import dataclass, field

from alone import additive_limit, decode_rate, network_rate
from material import Material, add_precisions, agreement, reference
from measuring import median, spread, table
from rates import FINALISTS, Series, best_of_each, failures, finalists, times
from ways import job, peer_ways, versions

PROFILES = ("exact", "fast")


@dataclass(slots=True)
class Limits:
    """Of one precision, a value a measurement."""

    networks: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    wholes: dict[str, list[float]] = field(default_factory=lambda: {profile: [] for profile in PROFILES})
    "By decode profile: images per second of the whole job, start-up included, as a share of the limit around it."
    rates: dict[str, list[float]] = field(default_factory=lambda: {profile: [] for profile in PROFILES})
    "The same of the rate after start-up."


def measure(made: Material) -> str:
    """Both tables, as Markdown."""
    add_precisions(made)
    decodes: list[float] = []
    limits = {precision: Limits() for precision in made.cards}
    ours = {
        (precision, profile): Series(job(f"infermill, {precision}, {profile}", card, "--decode", profile))
        for precision, card in made.cards.items()
        for profile in PROFILES
    }
    other = Series(
        job("infermill, fp32, exact, `--runtime onnxruntime`", made.cards["fp32"], "--runtime", "onnxruntime")
    )
    ways, lacking = peer_ways(made.work / "resnet18.onnx", 224, made.peers)
    theirs = running = [Series(way) for way in ways]
    for _ in range(made.rounds):
        decodes.append(decode_rate(made.work / "photos"))
        for precision, card in made.cards.items():
            found = limits[precision]
            found.networks.append(network_rate(card))
            folder, count = ("photos", made.photos) if precision == "fp32" else ("half", made.photos // 2)
            for profile in PROFILES:
                series = ours[precision, profile]
                start = ours[precision, "exact"].starts[-1] if profile == "fast" else None
                series.measure(made, made.work / "twelve", made.work / folder, count, start)
                if series.failed:
                    raise SystemExit(f"{series.way.name}: {series.failed}")
                # Between two measurements of the network alone: the speed of a shared machine drifts.
                found.networks.append(network_rate(card))
                found.limits.append(additive_limit(sum(found.networks[-2:]) / 2, decodes[-1]))
                found.wholes[profile].append(count / series.wholes[-1] / found.limits[-1])
                found.rates[profile].append(series.rates[-1] / found.limits[-1])
                told = f"{found.wholes[profile][-1]:.1%}, after start-up {found.rates[profile][-1]:.1%}"
                print(f"    {series.way.name}: {series.rates[-1]:.1f} images/s; of the limit {told}", flush=True)
        other.measure(made, made.work / "twelve", made.work / "half", made.photos // 2)
        for series in running:
            series.measure(made, made.work / "twelve", made.work / "few", made.few)
            print(f"    {series.way.name}: {series.failed or f'{series.rates[-1]:.1f} images/s'}", flush=True)
        running = finalists(theirs)
    return "\n\n".join(
        (
            _limit_table(made, limits, decodes),
            _peer_table(made, [*ours.values(), other], theirs, best_of_each(theirs), lacking),
        )
    )


def _limit_table(made: Material, limits: dict[str, Limits], decodes: list[float]) -> str:
    rows = []
    for precision, found in limits.items():
        shares = [spread(of[profile], ".1%") for profile in PROFILES for of in (found.wholes, found.rates)]
        rows.append([precision, spread(found.networks, ".1f"), f"{median(found.limits):.1f}", *shares])
    header = [
        "",
        "the network alone, images/s",
        "additive limit",
        "the whole job, exact",
        "after start-up",
        "… `--decode fast`",
        "after start-up",
    ]
    lacking = "".join(f"\n- {precision}: not measured: {reason}" for precision, reason in made.lacking.items())
    return (
        f"{made.photos:,} photos of 500x375 (half of them in less precision), ResNet-18. The whole job is everything "
        "from starting the command to its "
        f"end, as a share of the additive limit `1 / (1/network + 1/(cores · decoding))`, medians of {made.rounds} "
        f"rounds (lowest to highest). Decoding JPEG alone: {spread(decodes, ',.0f')} images/s a core.\n\n"
        f"{table(header, rows)}\n{lacking}"
    )


def _peer_table(
    made: Material,
    ours: list[Series],
    theirs: list[Series],
    chosen: list[Series],
    lacking: dict[str, str],
) -> str:
    """Ours and, of each peer, its better way; the other ways below."""
    best = reference(made.work / "few", made.work / "resnet18.onnx", 224)
    against = chosen[0] if chosen else None
    rows = []
    for series in (*ours, *chosen):
        same = "" if series.out is None else f"{agreement(series.out, best):.1%}"
        ratio = times(series.rates, against.rates) if against else ""
        start, peak = spread(series.starts, ".2f"), f"{max(series.peaks_mb):,.0f} MB"
        rows.append([series.way.name, spread(series.rates, ".1f"), ratio, start, peak, same])
    header = ["", "images/s after start-up", "times the best peer", "12 photos, whole process, s", "peak memory"]
    others = [series for series in theirs if series not in chosen and not series.failed]
    slower = [f"- {series.way.name}: {spread(series.rates, '.1f')} images/s" for series in others]
    notes = [*failures(theirs, lacking), *slower]
    return (
        f"Against the peers, the same photos and network, Parquet with the best five classes: infermill over "
        f"{made.photos:,} photos or half of them, the peers over {made.few}, all of their ways in the first round, the "
        f"{FINALISTS} fastest in each; of each peer the better way; a rate is (N - 12) / (seconds of N - "
        "seconds of 12), of whole processes. The last column is how many photos "
        "have the best class that Pillow and ONNX Runtime in fp32 "
        f"give them, of {made.few}.\n\n"
        f"{table([*header, 'same top-1'], rows)}\n\n" + "\n".join(notes) + "\n\nPeers, pinned: " + "; ".join(versions())
    )
