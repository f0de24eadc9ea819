"""Which nodes stay in float: the fewest of those that harm most, in a bounded number of tries."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from infermill.evidence import Evidence, Proportion
from infermill.sensitivity import LEAST_INT8, MAX_GROUPS, Nodes, choose_nodes


@dataclass
class Network:
    """Nodes with the harm of each, which adds up; all cost the same."""

    harms: list[float]
    breaking: str = ""
    "The node whose quantization makes half of the answers NaN."
    large: list[Nodes] = field(default_factory=list)
    small: int = 0

    @property
    def nodes(self) -> Nodes:
        return tuple(f"node{number}" for number in range(len(self.harms)))

    def measure(self, kept: Nodes, few: bool) -> Evidence:
        harm = sum(harm for name, harm in zip(self.nodes, self.harms, strict=True) if name not in kept)
        if few:
            self.small += 1
        else:
            self.large.append(kept)
        nonfinite = 50 if self.breaking and self.breaking not in kept else 0
        agreement = max(1.0 - harm, 0.0) * (1 - nonfinite / 100)
        return Evidence("cosine", 100, agreement, None, harm, harm, nonfinite, None, ())

    def share(self, kept: Nodes) -> float:
        return 1 - len(kept) / len(self.harms)


def test_where_int8_suffices_nothing_else_is_tried() -> None:
    network = Network([0.001] * 9)
    found = choose_nodes(network.nodes, network.measure, network.share, 0.99)
    assert (found.kept, found.tries) == ((), 1)
    assert found.reached == pytest.approx(0.991)


def test_the_node_that_harms_is_kept() -> None:
    network = Network([0.001] * 5 + [0.3] + [0.001] * 4)
    found = choose_nodes(network.nodes, network.measure, network.share, 0.99)
    assert found.kept == ("node5",)
    assert found.reached == pytest.approx(0.991)


def test_the_node_that_makes_numbers_none_is_the_worst() -> None:
    network = Network([0.001] * 4 + [0.0] + [0.001] * 5, breaking="node4")
    found = choose_nodes(network.nodes, network.measure, network.share, 0.99)
    assert found.kept == ("node4",)


def test_what_is_chosen_reaches_the_target_on_other_inputs() -> None:
    nodes = tuple(f"node{number}" for number in range(24))
    passed = 0
    for seed in range(100):
        # An input has another best class where what is left in int8 harms more than it can bear.
        bears = np.random.default_rng(seed).exponential(40, 700)

        def measure(kept: Nodes, few: bool, bears: NDArray[np.float64] = bears[:200]) -> Evidence:
            harm = sum(1 / (number + 1) ** 2 for number, name in enumerate(nodes) if name not in kept)
            same = Proportion(int((bears > harm).sum()), len(bears))
            return Evidence("top-1", same.of, same.share, same.interval, harm, harm, 0, None, ())

        found = choose_nodes(nodes, measure, lambda kept: 1 - len(kept) / len(nodes), 0.99)
        passed += measure(found.kept, False, bears[200:]).agreement >= 0.99
    assert passed > 80


@given(st.lists(st.floats(0, 0.02), min_size=2, max_size=30), st.floats(0.8, 1.0))
def test_as_few_as_the_target_needs(harms: list[float], target: float) -> None:
    network = Network(harms)
    found = choose_nodes(network.nodes, network.measure, network.share, target)
    assert network.share(found.kept) >= LEAST_INT8
    assert found.tries == len(network.large) + network.small
    ordered = sorted(harms, reverse=True)
    reachable = [count for count in range(len(harms) // 2 + 1) if 1 - sum(ordered[count:]) >= target + 1e-9]
    if reachable:
        assert found.reached >= target
        assert len(found.kept) <= reachable[0]
    if found.reached < target:
        best = max(network.measure(kept, few=False).agreement for kept in list(network.large))
        assert found.reached == best, "or the best of what was tried"


def test_tries_are_bounded_for_large_networks() -> None:
    network = Network([0.01 / (number + 1) for number in range(1000)])
    found = choose_nodes(network.nodes, network.measure, network.share, 0.9999)
    assert network.small <= MAX_GROUPS
    assert len(network.large) <= 10
    assert found.kept


def test_a_node_with_most_of_the_work_is_not_kept() -> None:
    network = Network([0.1, 0.2])
    found = choose_nodes(network.nodes, network.measure, lambda kept: 0.1 if "node1" in kept else 0.9, 0.99)
    assert found.kept == ("node0",)
    assert found.reached == pytest.approx(0.8)


def test_a_network_of_one_node_is_what_it_is() -> None:
    network = Network([0.5])
    assert choose_nodes(network.nodes, network.measure, network.share, 0.99).kept == ()
