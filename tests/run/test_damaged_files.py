"""Damaged files of a run: whatever happened to their bytes, they are refused with one line or do no harm."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero.config import Config, ConfigError, check, preset_config, resolve
from speedyzero.envs import EnvError, describe
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint, resume
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.files import write_json
from speedyzero.run.frames import FrameStore
from speedyzero.run.trained import read_config
from tests.conftest import TINY
from tests.runs import save

CPU = torch.device("cpu")
# Also numbers that no tensor, file or memory can hold.
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text("az 1é", max_size=5) | st.sampled_from([-1, 0, 1, 2**31, 2**48, 2**63, 10**30]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("az", max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Config, Path]:
    """A small run that was stopped in its training: its config, and its newest checkpoint."""
    run_dir = tmp_path_factory.mktemp("run")
    settings = {**TINY, "env": "Catch-v0", "device": "cpu", "run_dir": run_dir}
    config = resolve(replace(preset_config("cpu"), **settings), image=True, atari=False)
    trainer = Trainer(config, describe(config.env), CPU)
    trainer.start()
    while trainer.updates < 4:
        trainer.step(trainer.phase())
    write_json(run_dir / "config.json", config.to_json())
    return config, save(trainer, run_dir / "checkpoints")


@st.composite
def damage(draw, good: bytes) -> bytes:
    """`good` with flipped bits, cut, with two parts swapped, with another number in its header, or lengthened."""
    place = st.integers(0, len(good) - 1) | st.integers(0, min(2000, len(good) - 1))  # half of them in the header
    kind = draw(st.sampled_from(["bits", "cut", "swap", "number", "longer"]))
    bad = bytearray(good)
    if kind == "bits":
        for at in draw(st.lists(place, min_size=1, max_size=3)):
            bad[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del bad[draw(place) :]
    elif kind == "swap":
        size, (one, two) = draw(st.sampled_from([1, 4, 64])), sorted((draw(place), draw(place)))
        one = min(one, max(0, two - size))
        bad[one : one + size], bad[two : two + size] = bad[two : two + size], bad[one : one + size]
    elif kind == "number":
        numbers = list(itertools.islice(re.finditer(rb"\d+", good), 300))
        old, new = draw(st.sampled_from(numbers)), draw(st.sampled_from([0, 1, 255, 2**31, 2**48, 2**63, 10**30]))
        bad[old.start() : old.end()] = str(new).encode()
    else:
        bad += draw(st.binary(min_size=1, max_size=9))
    return bytes(bad)


def refused(function, *arguments):
    """What `function` returns, or None if it refuses its arguments; the refusal is one line."""
    try:
        return function(*arguments)
    except (CheckpointError, ConfigError, EnvError) as error:
        line = str(error)
    assert line.isprintable(), ascii(line)
    return None


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_refused_in_one_line_or_reads_as_before(run, tmp_path, data):
    config, path = run
    good = path.read_bytes()
    bad = tmp_path / path.name
    bad.write_bytes(data.draw(damage(good)))
    loaded = refused(checkpoint.load, bad)
    assert loaded is None or (equal(loaded[0], checkpoint.load(path)[0]) and loaded[1] == checkpoint.load(path)[1])

    store, _ = FrameStore(path.parent / "frames"), tmp_path.joinpath("frames").mkdir(exist_ok=True)
    piece = store.path_of(0)
    (tmp_path / "frames" / piece.name).write_bytes(data.draw(damage(piece.read_bytes())))
    slots, shape = checkpoint.read_meta(path)["slots"], (config.lanes, config.slots, 1, 10, 5)
    mine, theirs = torch.zeros(shape), torch.zeros(shape)
    store.read(theirs, slots)
    assert theirs.any()
    if refused(lambda: FrameStore(tmp_path / "frames").read(mine, slots) or True):
        assert torch.equal(mine, theirs)

    (tmp_path / "config.json").write_bytes(data.draw(damage((config.run_dir / "config.json").read_bytes())))
    read = refused(read_config, tmp_path)
    if read is not None:
        check(read)


@settings(max_examples=60)
@given(name=st.sampled_from([*resume.COUNTS, "env_steps", "turn_owed", "best", "env", "emulators", "emulators.*"]), value=JSON)
def test_a_meta_of_other_types_is_refused_in_one_line_or_the_run_goes_on(run, tmp_path, name, value):
    config, path = run
    tensors, meta = checkpoint.load(path)
    part = meta["emulators"] if name == "emulators.*" else meta
    for key in part if name == "emulators.*" else [name]:
        part[key] = value
    checkpoint.save(tmp_path / path.name, tensors, meta)
    trainer = Trainer(config, describe(config.env), CPU)
    try:
        if refused(lambda: resume.restore(trainer, tmp_path / path.name, FrameStore(path.parent / "frames"), str) or True):
            trainer.step(trainer.phase())
            trainer.state.turn.check()
            trainer.improved()
    finally:
        trainer.state.emulators.close()


@settings(max_examples=100)
@given(data=st.data(), value=JSON)
def test_a_config_of_other_types_is_refused_in_one_line_or_is_a_config(run, tmp_path, data, value):
    fields = json.loads((run[0].run_dir / "config.json").read_text())
    write_json(tmp_path / "config.json", fields | {data.draw(st.sampled_from(sorted(fields))): value})
    read = refused(read_config, tmp_path)
    if read is not None:
        check(read)
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert refused(read_config, tmp_path) is None
