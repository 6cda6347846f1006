"""Every test runs on eight CPU devices; set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Most of the suite's time is compilation.
    + " --xla_backend_optimization_level=0"
)


def pytest_ignore_collect(collection_path, config):
    """Leave `tests/aot` to those who ask for it by name: it needs an environment of its own."""
    named = any("aot" in argument for argument in config.args)
    return True if collection_path.name == "aot" and not named else None
