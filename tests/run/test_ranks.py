"""Two ranks are one run: the same draws, the same noise, parameters that differ by rounding, one checkpoint for any number of ranks."""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from speedyzero import loop
from speedyzero.config import preset_config, resolve
from speedyzero.envs import describe
from speedyzero.layers import BatchNorm2d
from speedyzero.norm_over_ranks import normalise_over_ranks
from speedyzero.ranks import ALONE, Ranks, RanksError, _met, check_shares, join
from speedyzero.run import checkpoint
from speedyzero.run.directory import RunDirectory, is_of_this_torchrun
from speedyzero.run.guard import Interrupt
from speedyzero.run.trained import read_config
from speedyzero.torchrun import end_with_torchrun
from tests.conftest import TINY
from tools.faults.run import Run, rows_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
LIMIT_S = 900
"""Seconds after which a test gives up on its ranks; they take ten or so."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in more.items()}


def two_workers(module: str, *arguments: str, **variables: object) -> tuple[list[int], str]:
    """Run a module as ranks 0 and 1 of two: their exit codes, and what they wrote to stderr."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=environment(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **variables),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=LIMIT_S)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], "\n".join(errors)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks found, see `tests.ranks_worker`: one object a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    config = preset_config("cpu")
    settings = TINY | {"refresh_values": 8, "augment": True, "shift": 1}
    config = resolve(dataclasses.replace(config, env="Catch-v0", run_dir=folder, device="cpu", **settings), image=False, atari=False)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    codes, errors = two_workers("tests.ranks_worker", str(folder / "config.json"), str(folder / "found"), TRITON_INTERPRET=1)
    assert codes == [0, 9], errors
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(2)]


pytestmark = pytest.mark.slow


def test_every_rank_gets_the_rows_of_all_in_order(found):
    for rank in range(2):
        assert found[rank]["messages"] == {
            "rows": [[1.5, 2.0], [11.5, 2.0]], "flags": [3, 13], "small": [True, True, True, False], "wide": [[7, 8], [17, 8]],
            "mean": [6.0], "greatest": 15, "told": {"from": 0},
        }  # fmt: skip


def test_batch_norm_of_two_shares_is_that_of_the_whole_batch_forward_and_backward(found):
    for rank in found:
        for differences in rank["normalising"].values():
            assert differences["difference"] < 1e-12
            assert differences["without a weight"] < 1e-12
            assert differences["far from zero"] < 0.01, "the inputs are rounded to 0.001 of their spread"


def test_a_batch_norm_sends_nothing_unless_it_trains_and_one_that_cannot_send_is_refused():
    norm = BatchNorm2d(3)
    normalise_over_ranks(norm, Ranks(0, 2))  # of which no other is there
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(norm.eval()(x), x / (1 + norm.eps) ** 0.5)
    with pytest.raises(ValueError, match="process group"):
        norm.train()(x)
    with pytest.raises(TypeError, match="BatchNorm1d: normalises by the rows of one rank"):
        normalise_over_ranks(nn.Sequential(nn.BatchNorm1d(3)), Ranks(0, 2))


def test_two_ranks_draw_the_windows_and_the_noise_of_one_and_their_parameters_differ_by_rounding(found):
    for rank in found:
        trained = rank["training"]
        assert trained["before"] == {}, "nothing was learned yet, so not a bit may differ"
        assert trained["drawn"] == {"index": True, "weights": True, "noise": True}
        assert trained["noise"][0] > 4, "the noise of the live lanes and of the sweep"
        assert trained["after"], "or the ranks did not share the work"
        ring_moves = {"ring.policy", "ring.action"} & trained["after"].keys()
        assert not ring_moves, "the search came before the updates"
        assert max(gap for name, gap in trained["after"].items() if name.startswith("network.")) < 1e-5


def test_what_two_ranks_make_of_a_batch_differs_by_rounding_which_is_gone_in_fp64(found):
    for rank in found:
        single, double = (rank["precision"][f"torch.float{bits}"] for bits in (32, 64))
        assert 0 < max(single) < 1e-3
        assert max(double) < 1e-12


def test_a_checkpoint_of_two_ranks_goes_on_with_two_bit_for_bit_and_with_one_from_the_same_state(found):
    for rank in found:
        trained = rank["training"]
        assert trained["restored by one"] == trained["restored by both"] == trained["went on"] == {}
        assert trained["counts"][0] == trained["counts"][1]


def test_other_flags_and_a_state_that_came_to_differ_are_said_by_one_rank(found):
    flags, state = found[0]["disagreement"]["lines"]
    assert flags.startswith("--lr 1.1: of rank 1, and rank 0 has 0.1; ")
    assert state.startswith("rank 1 no longer has the state of rank 0; ")
    assert found[1]["disagreement"]["lines"] == ["", ""]


def test_a_rank_that_dies_is_named_and_not_waited_for(found):
    assert found[0]["death"]["line"].startswith("rank 1 ended or is stuck, and so all end; go on with --resume")


def test_of_the_ranks_that_are_left_the_first_says_who_is_gone_once_the_others_had_time_to_answer():
    store, failed = dist.HashStore(), RuntimeError("Connection closed")
    with ThreadPoolExecutor() as pool:
        late = pool.submit(lambda: (time.sleep(0.5), store.set("here/3", "")))
        lines = list(pool.map(lambda rank: Ranks(rank, 4, store)._who_is_gone(failed), (1, 2)))
        late.result()
    assert lines[0].startswith("rank 0 ended or is stuck, and so all end")
    assert lines[1] == ""
    store.set("here/0", "")
    assert Ranks(0, 4, store)._who_is_gone(failed).startswith("a message between the ranks failed (Connection closed); go on with")


def test_work_that_cannot_be_shared_equally_is_refused_by_the_name_of_its_flag(tiny_config):
    config = tiny_config(lanes=4, batch_size=4, refresh_roots=16)
    check_shares(config, 2)
    check_shares(tiny_config(lanes=3, batch_size=5, refresh_roots=16), 1)
    for settings, line in (
        ({"lanes": 3}, "--lanes 3: is not shared equally by 2 ranks; give a multiple of 2, or start another number of ranks"),
        ({"batch_size": 5}, "--batch-size 5: "),
        ({"refresh_roots": 24}, "--refresh-roots 24: is not shared equally by 2 ranks; give a multiple of 16"),
        ({"refresh_values": 7}, "--refresh-values 7: "),
    ):
        with pytest.raises(RanksError, match=line):
            check_shares(tiny_config(**settings), 2)


def test_a_rank_that_does_not_come_is_named_after_the_time_limit(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(CPU, 1.0) is ALONE
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match=r"ranks: .*within 2 s \(--watchdog\); start all"):
        join(CPU, 2.0)


def test_a_rank_whose_torchrun_has_ended_says_so_at_once(monkeypatch):
    settings = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in (settings | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match="torchrun, which started this rank, has ended"):
        join(CPU, 20.0)


def test_the_first_signal_is_the_last_that_a_dying_torchrun_sends(monkeypatch):
    def signal_when_the_parent_dies() -> int:
        number = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        return number.value

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-test")
    try:
        end_with_torchrun()
        assert signal_when_the_parent_dies() == signal.SIGTERM
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested == signal.SIGTERM
        assert signal_when_the_parent_dies() == 0
    finally:
        end_with_torchrun(False)


def test_a_run_is_known_by_the_torchrun_that_began_it(tiny_config, monkeypatch):
    config = tiny_config()
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert not is_of_this_torchrun(config.run_dir)
    with contextlib.closing(RunDirectory(config)) as directory:
        directory.write_config()
    assert read_config(config.run_dir) == config  # which does not mind the name
    assert is_of_this_torchrun(config.run_dir)
    for other in ("job 8", "none"):  # torchrun's own name for itself, if it was given none
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        assert not is_of_this_torchrun(config.run_dir)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_of_this_torchrun(config.run_dir)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    (config.run_dir / "config.json").write_text('{"speedyzero": 3}')
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert not is_of_this_torchrun(config.run_dir)


def test_ranks_that_torchrun_starts_once_more_do_not_take_the_last_ones_word():
    store = dist.HashStore()
    for _ in range(2):
        end = time.monotonic() + LIMIT_S
        with ThreadPoolExecutor() as pool:
            late = pool.submit(_met, store, 1, 3, end), pool.submit(_met, store, 2, 3, end)
            time.sleep(0.1)  # the others are there first, and find what the last rank 0 left
            met = [pool.submit(_met, store, 0, 3, end).result(), *(rank.result() for rank in late)]
        assert met[0].check(["token/1"])
        met[0].set("word", "of this start")
        assert [rank.get("word") for rank in met] == [b"of this start"] * 3
        assert not dist.PrefixStore("next", store).check(["word"])
    with ThreadPoolExecutor() as pool:
        end = time.monotonic() + 0.5
        first, _ = (pool.submit(_met, store, rank, 3, end) for rank in (0, 1))
        with pytest.raises(TimeoutError, match="rank 2 of 3 did not come"):
            first.result()


def test_more_ranks_than_devices_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RanksError, match="--nproc-per-node 2: this machine has 1 CUDA devices"):
        join(torch.device("cuda"), 1.0)


BEFORE_UPDATES = 40
"""Iterations of the smoke run before its first update."""
SMOKE = ["--env", "Catch-v0", "--preset", "smoke", "--log-interval", "5", "--checkpoint-interval", "30"]


@pytest.fixture
def start(tmp_path):
    """A function that starts a torchrun with the smoke run over ranks, in `tmp_path / "run"`; in the end all are ended."""
    runs = []

    def starts(torchrun: list[str], *flags: str) -> Run:
        output = tmp_path / f"output.{len(runs)}"
        runs.append(Run([*SMOKE, "--run-dir", str(tmp_path / "run"), *flags], output, torchrun))
        return runs[-1]

    yield starts
    for run in runs:
        run.end()


def wait_for(run: Run, happened: Callable[[], object]) -> None:
    """Wait until something happened while a torchrun runs."""
    end = time.monotonic() + LIMIT_S
    while not happened():
        assert run.process.poll() is None, run.said()
        assert time.monotonic() < end, run.said()
        time.sleep(0.02)


def rows(run_dir: Path) -> list[int]:
    """The iterations that are logged."""
    path = run_dir / "metrics.jsonl"
    return [row["iteration"] for row in rows_of(path.read_bytes())[0]] if path.exists() else []


def check_complete(run_dir: Path) -> None:
    assert rows(run_dir) == sorted(set(rows(run_dir)))
    assert json.loads((run_dir / "eval.json").read_text())["episodes"] == 2
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] >= 400


def test_torchrun_trains_to_the_end_though_a_rank_is_killed_on_the_way(start, tmp_path):
    run = start(["--standalone", "--nproc-per-node=2", "--max-restarts=1"])
    wait_for(run, lambda: list(tmp_path.glob("run/checkpoints/checkpoint_*")))
    run.strike(signal.SIGKILL, 1)
    assert run.process.wait(LIMIT_S) == 0, run.said()
    assert "rank 1 ended or is stuck" in run.said()
    assert f"resumed {tmp_path / 'run'} at iteration " in run.said()
    check_complete(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_all_ranks_end_saved_when_torchrun_is_asked_to_end_or_killed(start, tmp_path, number):
    run = start(["--standalone", "--nproc-per-node=2"])
    wait_for(run, lambda: rows(tmp_path / "run"))
    run.strike(number)
    assert run.wait_gone(LIMIT_S) == []
    assert run.process.wait(LIMIT_S) == (1 if number == signal.SIGINT else -number)
    ((name, iteration),) = re.findall(r"^stopped by (\w+) at iteration (\d+) and saved; go on with", run.said(), re.MULTILINE)
    assert name == ("SIGINT" if number == signal.SIGINT else "SIGTERM")
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.latest(folder) == checkpoint.path_of(folder, int(iteration))


def test_a_second_ctrl_c_ends_ranks_whose_iteration_does_not(start, tmp_path):
    run = start(["--standalone", "--nproc-per-node=2"], "--updates-per-iteration", "100000", "--log-interval", "1")
    wait_for(run, lambda: len(rows(tmp_path / "run")) == BEFORE_UPDATES)
    run.strike(signal.SIGINT)
    assert len(run.wait_gone(1.0)) == 2, "the first lets the iteration end"
    run.strike(signal.SIGINT)
    assert run.wait_gone(LIMIT_S) == []
    assert run.process.wait(LIMIT_S) == 1
    assert "stopped by" not in run.said()


def nodes(start: Callable, count: str, port: int, *flags: str) -> Run:
    """A torchrun of one rank, as on one of several machines."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=a-test", "--rdzv-conf=last_call_timeout=1"]
    return start([f"--nnodes={count}", "--nproc-per-node=1", "--max-restarts=2", *meeting], *flags)


def test_a_request_that_comes_after_the_ranks_agreed_to_go_on_waits_for_the_next_time(tiny_config, monkeypatch):
    made, asked = [], []

    def greatest(ranks: Ranks, number: int) -> int:
        asked.append(number)
        if len(asked) == 3:
            made[0].requested = signal.SIGTERM  # as a signal might, now that the others are told that nobody wants to stop
        return number

    class Made(Interrupt):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(Ranks, "greatest", greatest)
    monkeypatch.setattr(loop, "Interrupt", Made)
    config = tiny_config()
    assert loop.train(config, describe("Catch-v0"), CPU) == signal.SIGTERM
    assert asked == [0, 0, 0, signal.SIGTERM]
    assert checkpoint.latest(config.run_dir / "checkpoints") == checkpoint.path_of(config.run_dir / "checkpoints", 4)


def test_two_machines_train_one_agent_and_both_start_again_when_a_rank_of_one_is_killed(start, tmp_path):
    port = free_port()
    machines = [nodes(start, "2", port) for _ in range(2)]
    wait_for(machines[0], lambda: list(tmp_path.glob("run/checkpoints/checkpoint_*")))
    assert sorted(rank for machine in machines for rank in machine.pids()) == [0, 1]
    struck = next(machine for machine in machines if 1 in machine.pids())
    struck.strike(signal.SIGKILL, 1)
    assert [machine.process.wait(LIMIT_S) for machine in machines] == [0, 0], machines[0].said() + machines[1].said()
    assert f"resumed {tmp_path / 'run'} at iteration " in machines[0].said() + machines[1].said()
    check_complete(tmp_path / "run")


def test_a_machine_may_come_and_go_while_the_run_goes_on(start, tmp_path, monkeypatch):
    # Where torchrun shares its store (torch 2.13), the first does not tell a machine that comes later where that is, which then hangs.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    port, folder = free_port(), tmp_path / "run" / "checkpoints"
    first = nodes(start, "1:2", port, "--env-steps", "1200")
    wait_for(first, lambda: rows(tmp_path / "run"))
    alone = set(first.pids().values())
    second = nodes(start, "1:2", port, "--env-steps", "1200")
    wait_for(first, lambda: second.pids() and first.pids() and not alone & set(first.pids().values()))
    saved = checkpoint.latest(folder)
    wait_for(first, lambda: checkpoint.latest(folder) != saved)
    second.strike(signal.SIGTERM)
    assert second.process.wait(LIMIT_S) == 1
    assert first.process.wait(LIMIT_S) == 0, first.said()
    said = first.said() + second.said()
    assert len(re.findall(r"^resumed .* at iteration [1-9]", said, re.MULTILINE)) == 2, said
    check_complete(tmp_path / "run")
