"""Files that are damaged, hostile or no files: refused in one line or harmless. The fuzz of `tools/faults/mutate.py`, and what it found."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path
from random import Random

import pytest
import torch

from speedyzero import checkpoint, evaluate
from speedyzero.__main__ import main
from speedyzero.checkpoint import CheckpointError, DamagedError
from speedyzero.config import Config, ConfigError, check, from_json, preset_config, resolve
from speedyzero.envs import describe
from speedyzero.evaluate import evaluate_run, read_config
from speedyzero.frames import FrameStore
from speedyzero.loop import Trainer

TOOLS = Path(__file__).parents[1] / "tools" / "faults"
sys.path.insert(0, str(TOOLS))
import mutate  # noqa: E402
from badfiles import run as victims  # noqa: E402
from badfiles import victim, worker  # noqa: E402
from badfiles.run import Case, Run  # noqa: E402

sys.path.remove(str(TOOLS))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two small runs that were stopped."""
    directory = tmp_path_factory.mktemp("runs")
    victims.make_all(directory)
    return directory


@pytest.fixture
def run(runs, tmp_path):
    """One of them, to be spoilt."""
    shutil.copytree(runs / "one", tmp_path / "one")
    return Run(tmp_path / "one")


@pytest.fixture(autouse=True)
def in_time():
    """A test that waits for ever on a file fails, and does not stop the others."""

    def late(*_):
        raise TimeoutError("a file was waited for")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(error: type[Exception], function, *arguments) -> str:
    """The one line that `function` refuses its arguments with."""
    with pytest.raises(error) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 600
    return line


@contextlib.contextmanager
def taking_less_than(mib: int):
    """What is done within takes less memory than that at any time."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = worker._memory("VmRSS")
    yield
    assert worker._memory("VmHWM") - before < mib << 20


def resume(run: Run) -> Trainer:
    trainer = Trainer(run.config, run.spec, CPU)
    try:
        trainer.load(run.paths["checkpoint"], FrameStore(run.checkpoints / "frames"), lambda line: None)
    finally:
        trainer.state.emulators.close()
    return trainer


GAMES, LOG = "emulators.finished", "emulators.log"


def resaved(run: Run, change) -> Run:
    """The run with its checkpoint saved anew, checksums and all, after `change(tensors, meta)`."""
    tensors, meta = run.held("checkpoint")
    change(tensors, meta)
    run.paths["checkpoint"].write_bytes(run.saved(tensors, meta))
    return run


def with_header(path: Path, change, sums: dict | None = None) -> None:
    """A checkpoint of one float32 tensor, its header changed by `change(header)` and summed anew, by the format's description alone."""
    data = bytes(24)
    metadata = {"header_crc32": "00000000", "format": "2", "crc32": json.dumps(sums or {"a": f"{zlib.crc32(data):08x}"}), "meta": "{}"}
    header = {"__metadata__": metadata, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len('{"__metadata__":{"header_crc32":"')
    text = text[:begin] + b"%08x" % zlib.crc32(text[begin + 9 :]) + text[begin + 8 :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# The fuzz, and that it would see something.


def test_files_spoilt_in_every_way_are_refused_in_one_line_or_do_no_harm(runs):
    done = mutate.run_cases(runs, 220, seed=1, batch=220)
    assert [case for case in done if case["outcome"] == "failed"] == []
    assert [case["case"] for case in done] == list(range(220))
    assert {case["kind"].split(":")[0] for case in done} == {kind.target + " " + kind.name.split(":")[0] for kind in worker.KINDS}
    assert sum(case["outcome"] == "refused" for case in done) > 150
    assert sum(case["outcome"] == "accepted" for case in done) > 10
    harmless = ("damage: nothing", "everything twice", "metadata more")
    assert [case for case in done if (case["outcome"] == "same") != case["kind"].endswith(harmless)] == []


WORSE = """
import os, signal, time
from badfiles import worker
from badfiles.victim import Outcome

def meet(run, target, case, calls=[]):
    calls.append(1)
    if len(calls) == 4 and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
    if len(calls) == 5:
        bytes(bytearray(200 << 20))
    if len(calls) == 6:
        time.sleep(60)
    return Outcome("refused", "no")

worker.meet, worker.LIMIT = meet, 1
worker.main()
"""


def test_a_process_that_dies_grows_or_hangs_is_named_and_the_cases_after_it_are_run(runs, tmp_path, monkeypatch):
    """Two calls come before the first case of each process."""
    (tmp_path / "worse.py").write_text(WORSE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = mutate.run_cases(runs, 7, batch=40, worker="worse")
    assert [case["case"] for case in done] == list(range(7))
    failed = {case["case"]: case["why"] for case in done if case["outcome"] == "failed"}
    assert failed.pop(1).startswith("ended the process by SIGSEGV")
    assert 380 < int(failed.pop(4).removeprefix("took ").removesuffix(" MiB")) < 420
    assert failed == {5: "hung: the process was ended"}


def test_a_worker_that_cannot_start_is_told(runs):
    with pytest.raises(RuntimeError, match=r"outside of a case, a process ended .* exit code 1: .*No module named"):
        mutate.run_cases(runs, 3, worker="badfiles.nothing")


def test_a_case_is_the_same_whenever_it_is_made_and_every_kind_is_among_a_thousand(run):
    def spoilt(kind):
        case = kind.make(Random(f"7 {kind.name}"), run)
        return case.expect, case.note, case.spoilt if isinstance(case.spoilt, bytes) else None

    some = worker.KINDS[::4]
    assert [spoilt(kind) for kind in some] == [spoilt(kind) for kind in some]
    assert {kind.name for _, kind in worker.plan(1000, 0)} == {kind.name for kind in worker.KINDS}
    some = worker.plan(1000, 0, "frames pieces")
    assert len(some) > 20
    assert [pair for pair in worker.plan(1000, 0) if pair[1].target == "frames" and "pieces" in pair[1].name] == some
    assert worker.plan(40, 0) == worker.plan(1000, 0)[:40] != worker.plan(1000, 1)[:40]


def test_what_a_spoilt_file_does_is_judged_by_what_it_was_to_do(run, monkeypatch):
    good = run.good["frames"]
    assert victim.meet(run, "frames", Case(good, "same")).what == "same"
    assert victim.meet(run, "frames", Case(good, "accepted")).what == "same"
    assert victim.meet(run, "frames", Case(good, "refused")).what == "failed"
    assert victim.meet(run, "frames", Case(b"other", "same")).what == "failed"
    assert victim.meet(run, "frames", Case(b"other", "either")).what == "accepted"
    run.put("frames", bad := Case(good[:-1], "refused"))
    assert victim.meet(run, "frames", bad).what == "refused"
    assert victim.meet(run, "frames", Case(good[:-1], "accepted")).what == "failed"
    for error in (KeyError("x"), CheckpointError("two\nlines"), CheckpointError(""), CheckpointError("x" * 2000), SystemExit(1)):
        def refuse(*_, error=error):
            raise error

        monkeypatch.setattr(FrameStore, "read", refuse)
        assert victim.meet(run, "frames", bad).what == "failed", error
    monkeypatch.undo()
    assert victim.meet(run, "checkpoint", Case(b"", "refused")).what == "failed"
    run.put("checkpoint", None)
    run.put("frames", None)
    assert {path.read_bytes() for path in run.paths.values()} == set(run.good.values())


@pytest.mark.parametrize("line", ["", "two\nlines", "\x1b[2J", "\ud800", "x" * 801])
def test_what_is_not_one_printable_line_is_no_refusal(line):
    assert victim.refusal(ConfigError("--lr é: " + "x" * 700)).startswith("--lr")
    with pytest.raises(victim.BadLine):
        victim.refusal(ConfigError(line))


def test_the_table_counts_kinds_by_outcome():
    outcomes = ("refused", "refused", "same", "failed")
    done = [{"kind": kind, "outcome": outcome} for kind, outcome in zip("aaab", outcomes, strict=True)]
    rows = [line.split() for line in mutate.table(done).splitlines()]
    assert rows == [
        ["tried", "refused", "accepted", "equivalent", "failed"], ["a", "3", "2", "0", "1", "0"], ["b", "1", "0", "0", "0", "1"],
        ["all", "4", "2", "0", "1", "1"],
    ]  # fmt: skip


# What is no file.

PLACES = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "/dev/zero": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a folder": (Path.mkdir, "Is a directory"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "what cannot be read": (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_at_once_wherever_a_file_is_read(run, name):
    put, says = PLACES[name]
    for path in run.paths.values():
        path.unlink()
        put(path)
    assert f"config.json: cannot be read ({says})" in refused(ConfigError, read_config, run.directory)
    run.put("config", None)
    path = run.paths["checkpoint"]
    for read in (checkpoint.load, checkpoint.read_meta):
        assert f"{path.name} cannot be read ({says})" in refused(CheckpointError, read, path)
    assert f"cannot be read ({says})" in refused(CheckpointError, evaluate_run, run.directory, 1, "cpu", 0, str(path))
    assert f"cannot be read ({says})" in refused(CheckpointError, checkpoint.newest_whole, run.checkpoints, print)
    assert os.path.lexists(path), "it is not put aside as damaged: it was not read"
    into = torch.zeros(4, 24, 1, 10, 5)
    assert f"cannot be read ({says})" in refused(CheckpointError, FrameStore(run.checkpoints / "frames").read, into, 25)


@pytest.mark.parametrize("target", ["config", "checkpoint"])
def test_the_program_says_so_in_one_line_and_ends(run, capsys, target):
    run.paths[target].unlink()
    os.mkfifo(run.paths[target])
    with pytest.raises(SystemExit) as end:
        main(["--resume", "--run-dir", str(run.directory)])
    assert end.value.code.startswith(f"error: {run.paths[target]}")
    assert "not a regular file" in end.value.code
    assert "\n" not in end.value.code


def test_files_of_other_kinds_are_refused_in_each_others_places(run):
    good = dict(run.good)
    for target, error, read in (
        ("config", ConfigError, lambda: read_config(run.directory)),
        ("checkpoint", CheckpointError, lambda: checkpoint.load(run.paths["checkpoint"])),
        ("frames", CheckpointError, lambda: FrameStore(run.checkpoints / "frames").read(torch.zeros(4, 24, 1, 10, 5), 25)),
    ):
        for other, contents in (*good.items(), ("empty", b""), ("picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")):
            if other != target and (target, other) != ("checkpoint", "frames"):  # a piece is in a checkpoint's format
                run.paths[target].write_bytes(contents)
                refused(error, read)
        run.paths[target].write_bytes(good[target])
    run.paths["checkpoint"].write_bytes(good["frames"])
    assert "is a checkpoint of None" in refused(CheckpointError, resume, run)
    assert "does not say how far" in refused(DamagedError, evaluate_run, run.directory, 1, "cpu", 0)


# config.json


@pytest.mark.parametrize("text", ["[" * 100_000, '{"env":' * 100_000, "[" * 900 + "]" * 900, '{"lr": ' + "1" * 5000 + "}", "\ufeff{}"])
def test_json_that_nests_for_ever_or_is_none_is_no_config(run, text):
    run.paths["config"].write_text(text)
    assert "config.json: " in refused(ConfigError, read_config, run.directory)


def test_a_config_of_a_gigabyte_is_not_read_to_its_end(run):
    good = run.paths["config"].read_text()
    run.paths["config"].write_text(good + " " * (2**20 - len(good)))
    assert read_config(run.directory) == run.config
    run.paths["config"].write_text(good + " " * (2**20 - len(good) + 1))
    assert "cannot be read (longer than 1048576 bytes)" in refused(ConfigError, read_config, run.directory)
    with open(run.paths["config"], "wb") as file:
        file.truncate(2**40)
    with taking_less_than(16):
        refused(ConfigError, read_config, run.directory)


def odd_id(value: object) -> str:
    return ascii(value)[:40]


NESTED = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    "value", ["two\nlines", "\ud800", "\x1b[2J", "x" * 10**5, NESTED, [0] * 10**5, {"a\nb": 1}, 10**400, -(10**400)], ids=odd_id
)
def test_whatever_a_config_holds_the_refusal_is_one_line(value):
    fields = resolve(preset_config("cpu"), image=False, atari=False).to_json()
    names = ("lanes", "lr", "search", "temperatures", "augment", "run_dir") if isinstance(value, list | dict) else ("lanes", "search", "lr")
    for name in names:
        line = refused(ConfigError, lambda name=name: check(from_json(fields | {name: value}, Path("c.json"))))
        assert line.startswith((f"c.json: {name} is ", f"--{name} "))
    if isinstance(value, str):
        refused(ConfigError, from_json, fields | {value: 1}, Path("c.json"))
        refused(ConfigError, check, from_json(fields | {"env": value}, Path("c.json")))
    refused(ConfigError, from_json, fields | {f"{i}{value!s:.30}": value for i in range(100)}, Path("c.json"))


def test_of_many_unknown_settings_the_first_are_named_and_the_rest_counted():
    fields = Config().to_json() | {f"x{i}": 0 for i in range(9)}
    assert "(x0, x1, x2, x3, x4 and 4 more)" in refused(ConfigError, from_json, fields, Path("c.json"))


def test_no_number_of_a_config_is_beyond_what_tensors_hold():
    config = resolve(preset_config("cpu"), image=False, atari=False)
    floats = [field.name for field in dataclasses.fields(Config) if field.type == "float"]
    wholes = [field.name for field in dataclasses.fields(Config) if field.type in ("int", "int | None")]
    assert len(floats) > 20
    assert len(wholes) > 20
    for name in floats:
        for number in (float("nan"), float("inf"), 1.1e30, 1e308):
            assert refused(ConfigError, check, dataclasses.replace(config, **{name: number})).startswith("--" + name.replace("_", "-"))
    for name in wholes:
        flag = "--" + name.replace("_", "-")
        for number in (2**63, 10**30, 10**400):
            assert refused(ConfigError, check, dataclasses.replace(config, **{name: number})).startswith(flag)
    refused(ConfigError, check, dataclasses.replace(config, temperatures=(1e31, 1.0, 1.0)))
    for fine in ({"lr": 1e30}, {"c_visit": 1e30}, {"max_grad_norm": 1e12}, {"log_interval": 10**9}, {"seed": 2**31 - 1}):
        check(dataclasses.replace(config, **fine))


def test_a_whole_number_in_the_place_of_a_fraction_becomes_one_if_it_is_exact():
    fields = Config().to_json()
    config = from_json(fields | {"lr": 2**53, "temperatures": [1, 2, 3]}, Path("c.json"))
    assert [type(number) for number in (config.lr, *config.temperatures)] == [float] * 4
    assert (config.lr, config.temperatures) == (2.0**53, (1.0, 2.0, 3.0))
    assert "lr is 9007199254740993" in refused(ConfigError, from_json, fields | {"lr": 2**53 + 1}, Path("c.json"))


def test_a_config_of_a_network_that_no_memory_holds_is_refused_by_the_evaluation_before_it_is_made(run):
    giant = run.fields() | {"channels": 4096, "projection": 65_536, "lstm": 65_536, "head_hidden": 65_536, "support": 65_536}
    run.paths["config"].write_text(json.dumps(giant))
    with taking_less_than(64):
        line = refused(CheckpointError, evaluate_run, run.directory, 1, "cpu", 0)
    assert "holds another network than config.json describes (network.representation.0.weight differs)" in line


def test_the_outline_of_a_network_has_the_shapes_of_the_network(run):
    sizes = evaluate.network_spec(run.config, run.spec.frame_shape, run.spec.num_actions)
    hollow, whole = evaluate.outline(sizes).state_dict(), evaluate.Network(sizes).state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in hollow.items()} == {n: (t.shape, t.dtype) for n, t in whole.items()}
    assert {tensor.device.type for name, tensor in hollow.items() if tensor.numel() > 1} == {"meta"}
    assert torch.ones(1).device.type == "cpu"


# The header of a checkpoint.


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0.0, 24.0]}, {"data_offsets": [0, 24.0]}, {"data_offsets": [False, 24]}, {"shape": [2.0, 3]},
        {"shape": [True, 6]}, {"shape": [-2, -3]}, {"shape": [6], "data_offsets": [8, 32]}, {"shape": "23"}, {"dtype": ["F32"]},
        {"shape": [1] * 65 + [6]}, {"dtype": "x" * 10**5},
    ],
    ids=odd_id,
)  # fmt: skip
def test_an_entry_that_is_not_what_save_writes_is_damage(tmp_path, entry):
    path = tmp_path / "c.safetensors"
    with_header(path, lambda header: None)
    assert checkpoint.load(path)[0]["a"].shape == (2, 3)
    with_header(path, lambda header: header["a"].update(entry))
    refused(DamagedError, checkpoint.load, path)
    refused(DamagedError, checkpoint.read_meta, path)


@pytest.mark.parametrize("shape", [[0, 2**47, 2**47], [2**47, 2**47, 0], [0] * 2 + [2**40] * 3, [0, 2**48], [0, 2**400]])
def test_an_empty_tensor_with_sides_beyond_all_strides_is_damage(tmp_path, shape):
    path, sums = tmp_path / "c.safetensors", {"a": f"{zlib.crc32(bytes(24)):08x}", "e": "00000000"}
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [24, 24]}
    with_header(path, lambda header: header.update(e=entry), sums)
    assert "tensor e: impossible shape or place" in refused(DamagedError, checkpoint.load, path)
    with_header(path, lambda header: header.update(e=entry | {"shape": [0, 2**47]}), sums)
    assert checkpoint.load(path)[0]["e"].shape == (0, 2**47)


@pytest.mark.parametrize("name", ["two\nlines", "\ud800", "\x1b[2J", "x" * 10**6, ""], ids=odd_id)
def test_whatever_a_tensor_is_called_the_refusal_is_one_line(tmp_path, name):
    path = tmp_path / "c.safetensors"
    with_header(path, lambda header: header.update({name: header.pop("a")}), {name: "12345678"})
    refused(DamagedError, checkpoint.load, path)
    with_header(path, lambda header: header.update({name: header.pop("a") | {"shape": [7]}}), {name: "12345678"})
    refused(DamagedError, checkpoint.load, path)
    with_header(path, lambda header: header["__metadata__"].update(format=name))
    assert "has checkpoint format" in refused(CheckpointError, checkpoint.load, path)


def test_a_checkpoint_larger_than_the_memory_is_refused_in_one_line(tmp_path):
    """A file that takes no room on the disk: its end is all zeros."""
    path, size = tmp_path / "c.safetensors", 2**43
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    with_header(path, lambda header: header.update(a=entry))
    os.truncate(path, path.stat().st_size - 24 + size)
    assert "cannot be read (Cannot allocate memory)" in refused(CheckpointError, checkpoint.load, path)


def test_a_header_holds_the_frames_of_the_most_lanes_and_nothing_much_longer_is_written_or_read(tmp_path):
    piece = {f"lane_{lane:05d}": torch.empty(1, dtype=torch.uint8).expand(10**7) for lane in range(65_536)}
    assert len(checkpoint._header(list(piece.items()), {}, dict.fromkeys(piece, 0))) < checkpoint._MOST_HEADER
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {}, {"x": "x" * (checkpoint._MOST_HEADER - 1000)})
    assert len(checkpoint.load(path)[1]["x"]) == checkpoint._MOST_HEADER - 1000
    before = path.read_bytes()
    with pytest.raises(ValueError, match="0 tensors and their meta make a header of 838"):
        checkpoint.save(path, {}, {"x": "x" * checkpoint._MOST_HEADER})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]


# The contents of a checkpoint.


def test_the_checkpoint_that_is_spoilt_below_is_a_good_one(run):
    assert resume(resaved(run, lambda tensors, meta: None)).iterations == 31


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, meta: meta.pop("best"), "best is missing"),
        (lambda tensors, meta: meta.update(best=float("nan")), "best is nan"),
        (lambda tensors, meta: meta.update(best=float("-inf")), "best is -inf"),
        (lambda tensors, meta: meta.update(best=3), "best is 3"),
        (lambda tensors, meta: meta.update(env="a\nb"), "is a checkpoint of 'a\\nb'"),
        (lambda tensors, meta: meta.update(env=NESTED), "is a checkpoint of [[[[[[[...]]]]]]]"),
        (lambda tensors, meta: meta.update(updates="a\nb"), "updates is 'a\\nb'"),
        (lambda tensors, meta: meta.update(swept=2**48), "swept is 281474976710656"),
        (lambda tensors, meta: meta.update(episodes=True), "episodes is True"),
        (lambda tensors, meta: meta.update(env_steps=-1), "env_steps is -1"),
        (lambda tensors, meta: meta.update(turn_owed=NESTED), "turn_owed is [[["),
        (lambda tensors, meta: meta.update(emulators=[]), "emulators is []"),
        (lambda tensors, meta: meta["emulators"].update(envpool="1.2.5\nx"), "emulators: envpool is '1.2.5\\nx'"),
        (lambda tensors, meta: meta["emulators"].update(seed=NESTED), "emulators: seed is [[["),
        (lambda tensors, meta: meta["emulators"].update(finished=[["nan", 1]]), "emulators: finished is [['nan', 1]]"),
        (lambda tensors, meta: meta["emulators"].update(log=5), "emulators: log is 5"),
        (lambda tensors, meta: tensors.update({"emulators.seed": torch.zeros(1)}), "emulators: seed is 0"),
        (lambda tensors, meta: tensors.update({"emulators.returns": torch.zeros(4, dtype=torch.bfloat16)}), "is of torch.bfloat16"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 1), 1e308), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 1), -1.0), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 1), 0.5), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 0), float("nan")), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 0), 1e300), "the games in recent"),
        (lambda tensors, meta: tensors.update(recent=torch.zeros(1001, 2, dtype=torch.float64)), "the games in recent"),
        (lambda tensors, meta: tensors.update({GAMES: torch.tensor([[float("nan"), 1.0]]).double()}), "the games in emulators.finished"),
        (lambda tensors, meta: tensors.update({GAMES: torch.zeros(2, 3).double()}), "the games in emulators.finished"),
        (lambda tensors, meta: tensors.pop(GAMES), "the games in emulators.finished"),
    ],
)  # fmt: skip
def test_what_no_run_can_have_saved_is_refused_in_one_line(run, change, says):
    assert says in refused(CheckpointError, resume, resaved(run, change))


@pytest.mark.parametrize(
    ("left", "following", "can"),
    [
        (1, 0, True), (1, 624, True), (624, 1, True), (2, 623, True), (300, 325, True),  # as PyTorch counts: new, or `left` to come
        (624, 624, False), (2, 624, False), (624, 2, False), (1, 623, False), (0, 624, False), (0, 0, False), (2, 0, False),
        (625, 0, False), (-1, 2, False), (624, -1, False), (1, 2**32, False), (-(2**31), 0, False),
    ],
)  # fmt: skip
def test_a_generator_that_would_read_beyond_its_words_is_refused(run, left, following, can):
    def change(tensors, meta):
        tensors["generator"][8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
        tensors["generator"][16:24] = torch.tensor([following], dtype=torch.int64).view(torch.uint8)

    resaved(run, change)
    if can:
        torch.rand(2000, generator=resume(run).state.generator)
    else:
        assert "the generator's state" in refused(DamagedError, resume, run)


def test_every_state_that_a_generator_comes_to_is_accepted(run):
    from speedyzero.contents import _can_draw

    generator = torch.Generator().manual_seed(3)
    for draw in range(1500):
        assert _can_draw(generator.get_state(), CPU), draw
        torch.rand(1 + draw % 3, generator=generator)
    unseeded = generator.get_state()
    unseeded[12:16] = 0
    assert not _can_draw(unseeded, CPU)


def test_an_action_that_there_is_not_never_reaches_the_emulators(run, monkeypatch):
    """Neither from the ring, whose newest ones are sent again after a failed step, nor from the log."""
    from speedyzero.envs import Emulators, EnvError

    def log_too(tensors, meta):
        tensors[LOG][3, 2] = 3
        meta["emulators"]["log_crc"] = zlib.crc32(tensors[LOG].numpy().tobytes())

    sent = []
    monkeypatch.setattr(Emulators, "send", lambda self: sent.append(self.actions.clone()))
    refused(DamagedError, resume, resaved(run, lambda tensors, meta: tensors["ring.action"].__setitem__((1, 0), 3)))
    refused(DamagedError, resume, resaved(run, lambda tensors, meta: tensors["ring.action"].__setitem__((1, 0), -1)))
    assert "action log is damaged" in refused(EnvError, resume, resaved(run, log_too))
    assert sent == []


def test_an_evaluation_wants_counts_that_are_counts(run):
    for name in ("env_steps", "updates"):
        for value in (-1, 2**48, True, "1", 1.0, None):
            resaved(run, lambda tensors, meta, name=name, value=value: meta.update({name: value}))
            assert "does not say how far it was trained" in refused(DamagedError, evaluate_run, run.directory, 1, "cpu", 0)


# Pieces of frames.


def packed(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda streams, meta, data: streams.update(lane_00001=packed(data)[:-4]), "lane_00001 does not unpack to 4800 bytes"),
        (lambda streams, meta, data: streams.update(lane_00001=torch.cat((packed(data), packed(data)))), "lane_00001 does not unpack"),
        (lambda streams, meta, data: streams.update(lane_00001=packed(data)[None]), "lane_00001 does not unpack"),
        (lambda streams, meta, data: streams.update(lane_00001=packed(data).view(torch.int8)), "lane_00001 does not unpack"),
        (lambda streams, meta, data: streams.update(lane_00009=streams.pop("lane_00001")), "holds frames of another run"),
        (lambda streams, meta, data: streams.update({"a\nb": streams.pop("lane_00001")}), "holds frames of another run"),
        (lambda streams, meta, data: meta.update(first=True), "holds frames of another run"),
    ],
)  # fmt: skip
def test_a_stream_that_the_store_would_not_write_is_refused(run, change, says):
    streams, meta = run.held("frames")
    into = torch.zeros(4, 24, 1, 10, 5)
    store = FrameStore(run.checkpoints / "frames")
    store.read(into, 25)
    change(streams, meta, zlib.decompress(streams["lane_00001"].numpy().tobytes()))
    run.paths["frames"].write_bytes(run.saved(streams, meta))
    assert says in refused(CheckpointError, store.read, into, 25)


def test_sizes_of_frames_that_are_equal_as_fractions_are_sizes(run):
    """A JSON writer may make 10 of 10.0 and the other way round; nothing may fall over it."""
    streams, meta = run.held("frames")
    meta["shape"] = [4.0, meta["shape"][1], 1.0, 10.0, 5.0]
    run.paths["frames"].write_bytes(run.saved(streams, meta))
    into, good = torch.zeros(4, 24, 1, 10, 5), torch.zeros(4, 24, 1, 10, 5)
    FrameStore(run.checkpoints / "frames").read(into, 25)
    run.put("frames", None)
    FrameStore(run.checkpoints / "frames").read(good, 25)
    assert torch.equal(into, good)
    assert good.any()


def test_frames_with_a_bomb_in_them_come_from_the_replay(run):
    good = resume(run).state.ring.frames.clone()
    streams, meta = run.held("frames")
    run.paths["frames"].write_bytes(run.saved(dict.fromkeys(streams, packed(bytes(64 << 20))), meta))
    said = []
    trainer = Trainer(run.config, describe(run.config.env), CPU)
    with taking_less_than(32):
        trainer.load(run.paths["checkpoint"], FrameStore(run.checkpoints / "frames"), said.append)
    assert len(said) == 1
    assert said[0].endswith("the frames come from replaying the emulators")
    assert torch.equal(trainer.state.ring.frames, good)
    trainer.state.emulators.close()
