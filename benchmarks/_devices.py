"""A data-parallel step on 1 to 8 CPU devices, with a penalty and without; prints JSON.

A process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import workloads
from ._timing import interleaved, ratios
from .train_step import by_hand, penalized, step_of, without


def main(smoke: bool, rounds: int) -> None:
    """Print the quartiles of with ÷ without by the number of devices."""
    workload = workloads.WORKLOADS["mlp"](smoke)
    params = workload.init()
    expected = by_hand(workload)(params, *workload.batch)
    found = {}
    for count in (1, 2, 4, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        batch = jax.device_put(workload.batch, NamedSharding(mesh, PartitionSpec("data")))
        everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        value = jax.jit(penalized(workload))(everywhere, *batch)
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=f"on {count} devices")
        losses = {"with": penalized(workload), "without": without(workload)}
        steps = {name: step_of(loss, everywhere, batch) for name, loss in losses.items()}
        found[count] = ratios(interleaved(steps, rounds), "with", "without")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1] == "smoke", int(sys.argv[2]))
