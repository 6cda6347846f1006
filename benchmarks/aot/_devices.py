"""Accelerators to compile for that are not there."""

import os
from collections.abc import Callable
from typing import Any

# Before JAX is imported: only the compilers of the other platforms are wanted, not their drivers.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
# A TPU serves one process; its compiler serves any number.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
from jax.experimental import topologies

# What XLA's cost models read of a GPU; NVIDIA's published figures.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
"""


def _gpu(**target: Any) -> Callable[[], Any]:
    config = _TARGET.format(**target)
    return lambda: topologies.get_topology_desc(
        "", platform="cuda", target_config=config, topology="1x1x1"
    )


def _tpu(topology: str) -> Callable[[], Any]:
    return lambda: topologies.get_topology_desc(topology, platform="tpu")


DEVICES: dict[str, Callable[[], Any]] = {
    "H100": _gpu(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        cores=132,
        bandwidth=3_350_000_000_000,
        l2=52_428_800,
        memory=85_899_345_920,
    ),
    "H200": _gpu(
        name="NVIDIA H200 141GB HBM3e",
        major=9,
        cores=132,
        bandwidth=4_800_000_000_000,
        l2=52_428_800,
        memory=151_397_597_184,
    ),
    "B200": _gpu(
        name="NVIDIA B200",
        major=10,
        cores=148,
        bandwidth=8_000_000_000_000,
        l2=132_644_864,
        memory=193_273_528_320,
    ),
    "TPU v5e": _tpu("v5e:2x2"),
    "TPU v6e": _tpu("v6e:2x2"),
    "TPU7x": _tpu("tpu7x:2x2x1"),
}
"""For each name a function that returns its topology; it raises if no compiler knows the device."""


def sharding_on(device: str) -> jax.sharding.Sharding:
    """Return the sharding that puts an array on one device of this name."""
    return jax.sharding.SingleDeviceSharding(DEVICES[device]().devices[0])
