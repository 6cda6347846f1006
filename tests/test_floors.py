"""Imports inside the package point down the floors that `docs/design.md` lists, and only down."""

import ast
import re
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jaxreg").rglob("*.py"))
TABLE = (ROOT / "docs/design.md").read_text("utf-8").split("| floor |")[1].split("\n\n")[0]
# From the ground up; `jaxreg` itself is the roof.
FLOORS = [*re.findall(r"`(\w+)(?:/|\.py)`", TABLE), "__init__"]


def floor(path: Path) -> str:
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def imported(path: Path, source: str) -> set[str]:
    """Return the floors that a file imports, which may be its own."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    ours = [name.split(".") for name in names if name.split(".")[0] == "jaxreg"]
    return {name[1] if name[1:] and name[1] in FLOORS else "__init__" for name in ours}


def not_below(path: Path, source: str) -> set[str]:
    """Return the floors that a file imports and must not."""
    own = floor(path)
    # Rules know no penalties.
    below = [] if own == "rules" else FLOORS[: FLOORS.index(own)]
    return imported(path, source) - {own, *below}


def test_every_module_has_a_floor():
    assert sorted(FLOORS) == sorted({floor(path) for path in FILES})


def test_imports_point_down_only():
    found = {str(path): not_below(path, path.read_text("utf-8")) for path in FILES}
    assert {path: floors for path, floors in found.items() if floors} == {}


@pytest.mark.parametrize(
    ("file", "source", "above"),
    [
        ("penalties/_base.py", "from jaxreg.rules import TOP", "rules"),
        ("penalties/_base.py", "from ..terms import measure", "terms"),
        ("penalties/_base.py", "from jaxreg import kernel", "kernel"),
        ("rules.py", "import jaxreg.penalties._base", "penalties"),
        ("terms.py", "from . import kernel", "kernel"),
        ("kernel.py", "import jaxreg as jr", "__init__"),
        ("kernel.py", "from jaxreg import __version__", "__init__"),
        ("ops/mlp/_api.py", "def f():\n    from ...gates import top_k", "gates"),
    ],
)
def test_an_import_that_points_up_is_found(file, source, above):
    assert not_below(ROOT / "jaxreg" / file, source) == {above}


def test_a_name_says_what_is_inside():
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in FILES]
    names = {name.strip("_") for names in parts for name in names}
    assert not names & {"util", "utils", "helper", "helpers", "common", "misc"}
