"""The sparse autoencoder on two processes: the numbers of one, and its checkpoints too.

Two processes of two CPU devices each train the network of `sparse_autoencoder_nnx.py` for 50 steps,
over a mesh of the four devices: each process reads its half of every batch, the kernels are split
over all devices, and the L1 of the code is that of the whole batch. One process of four devices
does the same, and then once more from the checkpoint that the two wrote after 25 steps.

On other machines, or on accelerators, only the arguments of `jax.distributed.initialize` differ.

Run:
    python examples/two_processes.py
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sparse_autoencoder_nnx import BATCH, Autoencoder, load, measure, train_epoch

DEVICES, STEPS, EVERY, STRENGTH = 4, 50, 25, 0.02


class Run:
    """A network, its optimizer and its data, on all devices of all processes."""

    def __init__(self) -> None:
        self.mesh = Mesh(np.array(jax.devices()), ("devices",))
        self.model = Autoencoder(100, rngs=nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(5e-3), wrt=nnx.Param)
        self.update(jax.tree.map(self.spread, self.state))

        training, test = map(np.asarray, load())
        self.training, self.test = self.put(training), self.put(test)
        order = np.random.default_rng(0).permuted(np.tile(np.arange(1300), (STEPS, 1)), axis=1)
        # Each process reads its own part of each batch.
        part = BATCH // jax.process_count()
        mine = slice(part * jax.process_index(), part * (jax.process_index() + 1))
        self.batches = self.put(training[order[:, :BATCH][:, mine]], None, "devices")

    @property
    def state(self) -> nnx.State:
        """The arrays of the model and the optimizer."""
        return nnx.state((self.model, self.optimizer))

    def update(self, state: nnx.State) -> None:
        """Replace the arrays of the model and the optimizer."""
        nnx.update((self.model, self.optimizer), state)

    def put(self, local: np.ndarray, *axes: str | None) -> jax.Array:
        """Return the array of which each process holds this part."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*axes))
        return jax.make_array_from_process_local_data(sharding, local)

    def spread(self, x: jax.Array) -> jax.Array:
        """Return the array with its last axis split over all devices, if it is a matrix."""
        spec = PartitionSpec(*(None, "devices") if x.ndim == 2 else ())
        host = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape, NamedSharding(self.mesh, spec), lambda index: host[index]
        )

    def train(self, name: str, first: int, last: int) -> None:
        """Take the steps from the first to the last, and print how the network does."""
        batches = self.batches[first:last]
        train_epoch(self.model, self.optimizer, batches, STRENGTH)
        active, error, dead = map(float, measure(self.model, self.training, self.test))
        if jax.process_index() == 0:
            print(
                f"{name:<32}{last:>5}  {active:>12.4f}  {error:>10.7f}  {dead:>10.0f}", flush=True
            )

    def save(self, directory: Path) -> None:
        """Write a checkpoint: each process its part."""
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory, jax.tree.leaves(self.state))

    def saved(self, directory: Path) -> nnx.State:
        """Return the arrays of a checkpoint, split as they are here."""
        leaves, structure = jax.tree.flatten(self.state)
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            return jax.tree.unflatten(structure, checkpointer.restore(directory, like))

    def difference(self, state: nnx.State) -> float:
        """Return the largest difference of a weight to another state."""
        weights = zip(jax.tree.leaves(self.state[0]), jax.tree.leaves(state[0]), strict=True)
        return max(float(jnp.max(jnp.abs(ours - theirs))) for ours, theirs in weights)


def one_of_two(address: str, process: int, directory: Path) -> None:
    """Train as one of two processes, and write a checkpoint halfway and at the end."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, process)
    run = Run()
    for step in range(0, STEPS, EVERY):
        run.train("two processes", step, step + EVERY)
        run.save(directory / str(step + EVERY))


def alone(directory: Path) -> None:
    """Train as the only process, from the start and from the two processes' checkpoint."""
    run = Run()
    for step in range(0, STEPS, EVERY):
        run.train("one process", step, step + EVERY)
    theirs = run.saved(directory / str(STEPS))
    apart = run.difference(theirs)
    run.update(run.saved(directory / str(EVERY)))
    run.train("one, from the checkpoint of two", EVERY, STEPS)
    print(f"largest difference of a weight to the two processes': {apart:.1e}")
    print(f"                              from their checkpoint: {run.difference(theirs):.1e}")


def start_two(directory: str) -> None:
    """Start this script twice, and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--address", address, "--directory", directory]
    processes = [subprocess.Popen([*command, "--process", str(i)]) for i in range(2)]
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                sys.exit("One of the two processes failed.")
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    """Start two processes and then train alone, or be one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--process", type=int, help="which of two this is; none starts both")
    parser.add_argument("--address", help="where the first of two listens for the other")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are")
    arguments = parser.parse_args()

    alone_here = arguments.process is None
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
        f"{DEVICES if alone_here else DEVICES // 2}"
    )
    if not alone_here:
        one_of_two(arguments.address, arguments.process, arguments.directory)
        return
    print(f"{'':<32}steps  active units  test error  dead units", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        start_two(directory)
        alone(Path(directory))


if __name__ == "__main__":
    main()
