"""Which part of the code may import which: the kernels nothing, the algorithm only itself, and nobody the loop."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "speedyzero"
ALGORITHM = [
    "iteration", "ring", "search", "act", "refresh", "learn", "nets", "layers", "optim", "state", "stages", "envs", "graph", "config",
    "schedule", "batch", "settings", "presets", "sizes", "pixels", "ranks", "norm_over_ranks", "torchrun",
    "emulators", "node_states", "noise", "precision", "snapshot", "staleness",
]  # fmt: skip
# Run by a person, as is `python -m speedyzero`.
ENTRANCES = ("__main__", "loop")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, by full name; not those that only a type checker sees."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def within(package: str, names: set[str]) -> set[str]:
    """Those of `names` that are `package` or in it."""
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_the_kernels_import_nothing_of_the_trainer():
    for path in (ROOT / "kernels" / "speedyzero_kernels").glob("*.py"):
        assert not within("speedyzero", imports(path)), path


def test_nothing_imports_the_loop():
    for path in PACKAGE.rglob("*.py"):
        found = imports(path)
        assert path.stem in ENTRANCES or not within("speedyzero.loop", found), path
        assert not any(name.startswith(".") for name in found), f"{path}: a relative import, which this test does not resolve"


def test_the_algorithm_imports_neither_what_keeps_a_run_nor_what_reports_it():
    paths = [PACKAGE / f"{name}.py" for name in ALGORITHM]
    for path in filter(Path.exists, paths):
        found = imports(path)
        assert not within("speedyzero.run", found) | within("speedyzero.report", found) | within("speedyzero.evaluate", found), path


def test_only_ranks_knows_the_other_processes_of_a_run():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem == "ranks" or not within("torch.distributed", imports(path)), path


def test_an_import_is_found_wherever_it_stands(tmp_path):
    lines = "from typing import TYPE_CHECKING", "if TYPE_CHECKING:", "    import c", "def f():", "    from speedyzero import loop"
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert imports(tmp_path / "a.py") == {"typing", "typing.TYPE_CHECKING", "speedyzero", "speedyzero.loop"}
