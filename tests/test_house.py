"""The rules of the house: floors, no cycles, one name that must not be mistaken for another."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "kernels": set[str](),
    "model": {"kernels"},
    "server": {"model"},
    "benchmarks": {"tests", "server", "model", "kernels"},
    "tests": {"benchmarks", "server", "model", "kernels"},
}


def modules() -> dict[str, Path]:
    found = {}
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path, anywhere: bool = True) -> Iterator[str]:
    """Modules of the house that a file imports; `anywhere`: inside functions too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}: relative import"
            whole = node.module or ""
            for alias in node.names:
                inner = f"{whole}.{alias.name}"
                yield inner if inner in MODULES else whole
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", MODULES)
def test_floors(name: str) -> None:
    """A floor imports only the one right below; only tests and benchmarks import each other."""
    floor = name.split(".")[0]
    allowed = FLOORS[floor] | {floor}
    for imported in imports(MODULES[name]):
        target = imported.split(".")[0]
        assert target not in FLOORS or target in allowed, f"{name} imports {imported}"


def test_no_cycles() -> None:
    """Not even one hidden in a function."""
    graph = {
        name: {imported for imported in imports(path) if imported in MODULES and imported != name}
        for name, path in MODULES.items()
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_is_not_the_package_of_that_name() -> None:
    """transformers probes for a distribution called kernels; ours must not look like it."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)
    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    assert version
    assert not version[1].startswith("0.18.")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def test_transformers_stays_out_of_what_serves() -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] in ("kernels", "model", "server"):
            assert "transformers" not in {i.split(".")[0] for i in imports(path)}, name


def test_nothing_dangerous_is_called() -> None:
    """T41: no pickle, no eval, no shell, in anything that serves."""
    banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for name, path in MODULES.items():
        if name.split(".")[0] in ("tests", "benchmarks"):
            continue
        text = path.read_text()
        assert not banned & {i.split(".")[0] for i in imports(path)}, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "os.system", "torch.load", "yaml.load"}, name
                assert not any(
                    key.arg == "shell" and ast.unparse(key.value) == "True" for key in node.keywords
                ), name


def test_help_does_not_load_torch() -> None:
    code = "import sys, server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
