"""The lane that compiles for accelerators that are not there: `pytest tests/aot`.

In an environment of its own, with the extra `aot`; without its compilers each test fails.
"""

import os

# What the other tests set to compile fast on the CPU would change what these compile.
os.environ["XLA_FLAGS"] = ""
