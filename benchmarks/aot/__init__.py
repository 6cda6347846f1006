"""What XLA makes of a function on an accelerator that is not there: kernels, bytes, memory.

Compiles for NVIDIA's H100, H200 and B200 and for Google's TPUs on any Linux x86-64 machine, with
JAX's own compilers and no device. Needs an environment of its own, since the CUDA plugin complains
wherever JAX is used otherwise:

    pip install -e ".[aot]"

Run:
    python -m benchmarks.aot [--device NAME ...] [--json FILE]
"""

from ._devices import DEVICES as DEVICES
from ._registers import Registers as Registers
from ._registers import registers as registers
from ._report import compiled_for as compiled_for
from ._report import report as report
