import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_in_the_readme_runs_as_written(capsys):
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert re.search(r"head/kernel +\(100, 64\) +\"head/\*\*\" +exempt", printed)
    assert re.search(r"encoder/kernel +\(64, 100\) +\"\*\*/kernel\" +L2\(", printed)
    assert "{'code': " in printed
    assert "'encoder': " in printed
    assert bool((namespace["params"]["head"]["kernel"] == 0).any())
    assert float(namespace["penalty"]) > 0


@pytest.mark.parametrize("name", re.findall(r"`jr\.(\w+)", README))
def test_every_name_in_the_readme_is_exported(name):
    import jaxreg

    assert hasattr(jaxreg, name)
