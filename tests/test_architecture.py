"""Imports go down only: cli, api, pipeline and peers, stages, source and runtime, qtensor, numerics, spec, errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "auto_round"
LAYERS = [
    {"errors"},
    {"registry"},
    {"spec"},
    {"numerics"},
    {"qtensor"},
    {"runtime"},
    {"source"},
    {"calibrate", "tune", "formats", "inference"},
    {"evaluate", "report"},
    {"pipeline", "load", "conversion"},
    {"api"},
    {"cli"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
FREE = {"__init__", "__main__", "py"}
# transformers calls this shim by name; it hands over to load.py, which is above it.
UPWARD = {("inference", "load")}


def imports(file: Path) -> set[str]:
    """Units of this package that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("auto_round."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("auto_round.")}
    return found


def unit_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_down_only() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        unit = unit_of(file)
        if unit in FREE:
            continue
        for target in imports(file) - {unit}:
            allowed = LEVEL[target] < LEVEL[unit] or ((unit, target) in UPWARD and file.name == "convert_model.py")
            if not allowed:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {target}")
    assert wrong == []


def test_every_unit_has_its_place() -> None:
    assert {unit_of(f) for f in PACKAGE.rglob("*.py")} - FREE == set(LEVEL)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, auto_round, auto_round.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_nothing_switches_on_environment_variables_or_swallows_everything() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "os.environ" not in text, file
        assert "except Exception" not in text, file


def test_the_public_names_are_sorted_and_exist() -> None:
    import auto_round

    assert auto_round.__all__ == sorted(auto_round.__all__)
    assert all(hasattr(auto_round, name) for name in auto_round.__all__)
