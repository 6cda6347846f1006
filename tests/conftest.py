"""Every test runs on eight CPU devices; set before JAX starts."""

import os
from importlib.metadata import version

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"
flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Much of the suite's time is compilation; one thread for each program, as the workers use them all.
flags += " --xla_cpu_parallel_codegen_split_count=1"
if "xla_backend_optimization_level" not in flags:
    flags += " --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):
        # There the older code generator takes two thirds of the time; the newest JAX has none.
        flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = flags


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests of one case to one worker, so that they share compilations."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        case = parameters and parameters.params.get("case")
        if case:
            item.add_marker(pytest.mark.xdist_group(str(case)))


def pytest_ignore_collect(collection_path, config):
    """Leave `tests/aot` to those who ask for it by name: it needs an environment of its own."""
    named = any("aot" in argument for argument in config.args)
    return True if collection_path.name == "aot" and not named else None
