"""The catalogue of the kernels: its example runs, and its table names the configurations that the presets launch today."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels" / "README.md").read_text()
SIZES = "ROOTS, ACTIONS, SIMULATIONS, WIDTH = 64, 5, 24, 32"


def test_the_example_searches_and_imports_nothing_of_the_trainer(device, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "speedyzero." not in example
    assert SIZES in example
    # Fewer of everything: the interpreter is slow.
    space: dict = {}
    exec(compile(example.replace(SIZES, "ROOTS, ACTIONS, SIMULATIONS, WIDTH = 3, 5, 6, 8"), "kernels/README.md", "exec"), space)
    assert "actions: [" in capsys.readouterr().out
    assert space["visits"].sum(dim=1).tolist() == [6] * 3
    assert bool(space["values"].isfinite().all())


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
