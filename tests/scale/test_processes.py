"""Two processes, started by the command that the documentation gives."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_processes.py"


def test_two_processes_train_as_one_and_write_what_one_resumes():
    completed = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, encoding="utf-8", timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    printed = completed.stdout

    def rows(name):
        found = re.findall(rf"^{name} +(\d+) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
        return np.array(found, float)

    two, one, resumed = map(rows, ("two processes", "one process", "one, from .* of two"))
    assert [*two[:, 0]] == [25, 50]
    assert two[1, 1] < 10  # active units of 100: the penalty is at work
    np.testing.assert_allclose(two, one, rtol=1e-4)
    np.testing.assert_allclose(resumed, one[1:], rtol=1e-4)
    differences = re.findall(r"(?:processes'|checkpoint): (\S+)", printed)
    assert len(differences) == 2
    assert all(0 <= float(difference) < 1e-5 for difference in differences)
