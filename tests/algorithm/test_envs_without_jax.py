"""EnvPool imports JAX where it is installed; the trainer keeps it from doing so."""

import subprocess
import sys

from tools.faults.run import environment

PLAY = """
import sys
from speedyzero.emulators import Emulators
from speedyzero.envs import describe
emulators = Emulators(describe("Catch-v0"), 2, seed=0, training=True)
emulators.reset()
emulators.close()
assert "jax" not in sys.modules
import jax
assert jax.numpy == "there"
"""


def test_envpool_does_not_import_a_jax_that_is_installed_and_others_still_can(tmp_path):
    package = tmp_path / "jax"
    package.mkdir()
    (package / "__init__.py").write_text('numpy = "there"\nprint("imported")\n')
    env = environment()
    done = subprocess.run(
        [sys.executable, "-c", PLAY], capture_output=True, text=True, check=False,
        env=env | {"PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported\n"
