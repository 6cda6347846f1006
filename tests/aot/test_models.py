"""What a penalty adds to a model's step."""

import pytest

from benchmarks.aot import report
from benchmarks.aot.cases import CASES

# For each the most that bytes and temporary memory may grow by, with ÷ without, and how many more
# kernels may touch the activation. Where it is not 1.000 and 0 on a TPU, that is XLA's schedule:
# see docs/fused.md.
TPU = {
    "dense, L1": (1.000, None, 0),
    "dense, L2": (1.000, None, 0),
    "dense, KL": (1.000, None, 0),
    "dense, group": (1.000, None, 0),
    "MLP, L1": (1.000, 1.001, 0),
    "SAE, L1": (1.038, 2.07, 0),
    "convolution, L1": (1.000, 1.000, 0),
    "attention, L2": (1.105, 1.04, 1),
    "LayerNorm block, L1": (1.000, 1.05, 0),
}
GPU = {
    "dense, L1": (1.92, None, 1),
    "dense, L2": (1.92, None, 1),
    "dense, KL": (1.95, None, 1),
    "dense, group": (1.92, None, 1),
    "MLP, L1": (1.11, 1.0, 1),
    "SAE, L1": (1.11, 1.0, 1),
    "convolution, L1": (1.17, 1.0, 1),
    "attention, L2": (1.01, 1.0, 1),
    "LayerNorm block, L1": (1.17, 1.2, 1),
}
# Every case on one device of each kind; on the others the plain layer, as compiling takes long.
PINS = (
    [("TPU v5e", name) for name in TPU]
    + [("H200", name) for name in GPU]
    + [(device, "dense, L1") for device in ("TPU v6e", "TPU7x", "H100", "B200")]
)


@pytest.mark.parametrize(("device", "name"), PINS)
def test_a_penalty_adds_no_more_than_is_known(device, name):
    case = CASES[name]
    without, penalized = (
        report(*case.step(p), device, donate=(), touching=case.code) for p in (False, True)
    )
    most_bytes, most_memory, most_kernels = (TPU if "TPU" in device else GPU)[name]
    moved = f"{device}, {name}: without {without}, with {penalized}"
    # A dozen bytes are the value itself.
    assert penalized["bytes"] - 64 <= most_bytes * without["bytes"], f"bytes: {moved}"
    if most_memory is not None:
        assert penalized["temporary"] <= most_memory * without["temporary"], f"memory: {moved}"
    assert penalized["touching"] - without["touching"] <= most_kernels, f"kernels: {moved}"
    assert without["touching"] > 0, f"the activation is not there: {moved}"
