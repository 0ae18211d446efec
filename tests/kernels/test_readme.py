"""The READMEs: every example runs, and its table names the configurations that the presets launch today."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels" / "README.md").read_text()
BLOCKS = [
    pytest.param(name, code, id=f"{name}-{number}")
    for name in ("README.md", "kernels/README.md")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL))
]
SIZES = ("ROOTS, ACTIONS, SIMULATIONS, WIDTH = 64, 5, 24, 32", "ROOTS, ACTIONS, SIMULATIONS, WIDTH = 3, 5, 6, 8")


@pytest.mark.parametrize(("name", "code"), BLOCKS)
def test_every_python_block_of_the_readmes_runs_as_it_stands(name, code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agents").symlink_to(ROOT / "agents")
    for larger, smaller in (SIZES, ("range(100)", "range(3)")):  # the interpreter is slow
        code = code.replace(larger, smaller)
    exec(compile(code, name, "exec"), {"__name__": name})


def test_the_example_of_the_kernels_searches_by_both_and_imports_nothing_of_the_trainer(device, capsys):
    example = next(block.values[1] for block in BLOCKS if block.values[0] == "kernels/README.md")
    assert "speedyzero." not in example
    assert SIZES[0] in example
    space: dict = {}
    exec(compile(example.replace(*SIZES), "kernels/README.md", "exec"), space)
    assert capsys.readouterr().out.count("best actions: [") == 2
    for kind in ("puct", "gumbel"):
        policy, values = space["search"](space["model"], torch.randn(3, 8, device=device), kind)
        torch.testing.assert_close(policy.sum(dim=1).cpu(), torch.ones(3, dtype=policy.dtype))
        assert bool(values.isfinite().all())


def rows_of_the_table() -> set[tuple[str, ...]]:
    table = README.partition("<!-- compile table: begin -->")[2].partition("<!-- compile table: end -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("|")]
    return {tuple(line[:4]) for line in lines[2:]}


@pytest.mark.slow
def test_the_compile_table_has_a_row_for_each_configuration_that_the_presets_launch():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.profile.compile_table", "--list"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    launched = {(row["operation"], row["kernel"], row["configuration"] or "-", ", ".join(row["presets"])) for row in rows}
    assert rows_of_the_table() == launched, "run: python -m tools.profile.compile_table --write kernels/README.md"


def test_the_catalogue_names_every_operation():
    for module in {row[0] for row in rows_of_the_table()}:
        assert f"`{module}." in README, module
