"""What a penalty adds to an optimizer's step."""

import pytest

from benchmarks.aot import report
from benchmarks.aot.cases import LARGE, SMALL, chains, update


@pytest.mark.parametrize("device", ["TPU v5e", "H200"])
def test_a_penalty_in_the_chain_is_free(device):
    costs = {
        name: report(*update(chain, LARGE), device)
        for name, chain in chains().items()
        if "in the loss" not in name
    }
    assert len(costs) == 4
    for name, cost in costs.items():
        for key in ("kernels", "bytes"):
            moved = f"{device}: {key} of {name}, {cost[key]}; of AdamW, {costs['AdamW'][key]}"
            assert cost[key] <= costs["AdamW"][key], moved


def test_many_small_leaves_end_in_one_sum():
    alone, ours, by_hand = (
        report(*update(chains()[name], SMALL), "H200")
        for name in ("AdamW", "AdamW + L2 in the loss", "AdamW + L2 in the loss, leaf by leaf")
    )
    assert ours["kernels"] <= 207, ours
    assert ours["bytes"] <= 1.002 * alone["bytes"], ours
    # The measure would see a kernel for each leaf.
    assert by_hand["kernels"] - alone["kernels"] >= 200, by_hand
