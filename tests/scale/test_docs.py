"""The loops that docs/scale.md shows, run as they stand there."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ._programs import assert_all_close

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")


# One worker makes what the tests of this module share.
pytestmark = pytest.mark.xdist_group("docs of scale")


@pytest.fixture(scope="module")
def after() -> list[dict[str, Any]]:
    """Return what the names of the page stand for after each of its blocks."""
    names: dict[str, Any] = {}
    states = []
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
        states.append(dict(names))
    return states


@pytest.fixture(scope="module")
def gradient(after):
    """Return the gradient of the whole batch on one device."""
    page = after[0]
    params, x = jax.device_get((page["params"], page["batch"]))

    def loss(params):
        y, terms = page["activity"](page["model"].apply)({"params": params}, x)
        return jnp.mean((y - x) ** 2) + terms.total

    return jax.jit(jax.grad(loss))(params)


def test_scan_and_shard_map_give_the_gradient_of_the_batch(after, gradient):
    setup, scan, two_passes, shard_map = after
    assert len(setup["mesh"].devices) == 8
    assert scan["gradient"] is two_passes["gradient"] is not shard_map["gradient"]
    assert_all_close(scan["gradient"], gradient, rtol=2e-6)
    assert_all_close(shard_map["gradient"], gradient, rtol=2e-6)


def test_two_passes_of_equal_and_of_unequal_microbatches(after, gradient):
    page = after[2]
    params, batch, tx = page["params"], page["batch"], page["tx"]
    expected = jax.tree.map(jnp.subtract, params, gradient)
    assert_all_close(page["params_after"], expected, rtol=2e-6)
    halves = [batch[:4], batch[4:]]
    found, _ = page["train_step"](params, tx.init(params), tx, halves)
    assert_all_close(found, expected, rtol=2e-6)
