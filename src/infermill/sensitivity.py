"""Which nodes of a network in int8 have to stay in float, found by measuring.

    every group of nodes alone in int8 ─► the harm that it does ─► the worst 1, 2, 4, … groups in float ─► enough?
    on a few inputs                       sorted                   on all inputs of the selection

Enough is a standard error more than the target, which other inputs are to reach. Doubling ends there, or where half of
the multiplications would be in float; halving then finds how few will do. That is at most 32 small trials and about 10
large ones, however many nodes there are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from infermill.evidence import Evidence

MAX_GROUPS = 32
LEAST_INT8 = 0.5
Nodes = tuple[str, ...]
Measure = Callable[[Nodes, bool], Evidence]
"Evidence for a network with these nodes in float; of few inputs where the flag says so."
Share = Callable[[Nodes], float]
"The part of a network's multiplications that is in int8 when these nodes are in float."


@dataclass(frozen=True, slots=True)
class Choice:
    """The nodes to keep in float, what that reaches on the selection, and how often was measured."""

    kept: Nodes
    reached: float
    tries: int


def choose_nodes(nodes: Nodes, measure: Measure, int8_share: Share, target: float) -> Choice:
    """Find the nodes whose quantization harms most, and keep as few of them in float as the target needs.

    Args:
        nodes: all that can be in float, in topological order.
        measure: what is measured of a choice.
        int8_share: what a choice leaves in int8, at least half.
        target: the agreement that other inputs are to reach.

    Returns:
        The fewest nodes that reach it here, with a margin; or where none do, the choice that agrees best.
    """
    first = measure((), False)
    tried: dict[int, float] = {0: first.agreement}
    target = _with_margin(target, first)
    if tried[0] >= target or len(nodes) < 2:
        return Choice((), tried[0], 1)
    groups = _groups(nodes)
    harm = [_harm(measure(tuple(name for name in nodes if name not in group), True)) for group in groups]
    worst: list[Nodes] = []
    for at in sorted(range(len(groups)), key=lambda at: harm[at], reverse=True):
        if int8_share(tuple(chain(*worst, groups[at]))) >= LEAST_INT8:
            worst.append(groups[at])

    def kept(count: int) -> Nodes:
        chosen = set(chain(*worst[:count]))
        return tuple(name for name in nodes if name in chosen)

    def reaches(count: int) -> bool:
        tried[count] = measure(kept(count), False).agreement
        return tried[count] >= target

    low, count = 0, min(1, len(worst))
    while count > low and not reaches(count):
        low, count = count, min(2 * count, len(worst))
    if count == low:  # all that may be in float does not suffice
        best = min(tried, key=lambda one: (-tried[one], one))
        return Choice(kept(best), tried[best], len(groups) + len(tried))
    while count - low > 1:
        middle = (low + count) // 2
        low, count = (low, middle) if reaches(middle) else (middle, count)
    return Choice(kept(count), tried[count], len(groups) + len(tried))


def _with_margin(target: float, evidence: Evidence) -> float:
    """A standard error more, where inputs are counted: what just reaches the target here often fails it elsewhere."""
    if evidence.measure != "top-1":
        return target
    return min(target + math.sqrt(target * (1 - target) / evidence.objects), 1.0)


def _harm(evidence: Evidence) -> tuple[int, float]:
    """What sorts groups: a number that is none any more has no delta, and is worse than any."""
    return evidence.nonfinite, evidence.mean_delta


def _groups(nodes: Sequence[str]) -> list[Nodes]:
    """Neighbours together, so that there are at most MAX_GROUPS."""
    size = math.ceil(len(nodes) / MAX_GROUPS)
    return [tuple(nodes[at : at + size]) for at in range(0, len(nodes), size)]
