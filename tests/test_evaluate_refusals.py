"""What an evaluation does not believe of a run: a network that no memory holds, and counts that are none."""

import json

from speedyzero.evaluate import evaluate_run
from speedyzero.run.checkpoint import CheckpointError, DamagedError
from tests.run.bad_files_support import in_time as in_time
from tests.run.bad_files_support import refused, resaved, taking_less_than
from tests.run.bad_files_support import run as run
from tests.run.bad_files_support import runs as runs


def test_a_config_of_a_network_that_no_memory_holds_is_refused_by_the_evaluation_before_it_is_made(run):
    giant = run.fields() | {"channels": 4096, "projection": 65_536, "lstm": 65_536, "head_hidden": 65_536, "support": 65_536}
    run.paths["config"].write_text(json.dumps(giant))
    with taking_less_than(64):
        line = refused(CheckpointError, evaluate_run, run.directory, 1, "cpu", 0)
    assert "holds another network than config.json describes (network.representation.0.weight differs)" in line


def test_an_evaluation_wants_counts_that_are_counts(run):
    for name in ("env_steps", "updates"):
        for value in (-1, 2**48, True, "1", 1.0, None):
            resaved(run, lambda tensors, meta, name=name, value=value: meta.update({name: value}))
            assert "does not say how far it was trained" in refused(DamagedError, evaluate_run, run.directory, 1, "cpu", 0)
