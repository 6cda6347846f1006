"""What a penalty adds to an optimizer's step."""

import pytest

from benchmarks.aot import report
from benchmarks.aot.cases import LARGE, chains, update


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
