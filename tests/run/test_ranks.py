"""Two ranks are one run: the same draws, the same noise, parameters that differ by rounding, one checkpoint for any number of ranks."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from speedyzero.config import preset_config, resolve
from speedyzero.ranks import ALONE, RanksError, _met, check_shares, join
from tests.conftest import TINY

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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks found, see `tests.ranks_worker`: one object a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    config = preset_config("cpu")
    settings = TINY | {"refresh_values": 8, "augment": True, "shift": 1}
    config = resolve(dataclasses.replace(config, env="Catch-v0", run_dir=folder, device="cpu", **settings), image=False, atari=False)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    port = free_port()
    command = [sys.executable, "-m", "tests.ranks_worker", str(folder / "config.json"), str(folder / "found")]
    workers = [
        subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=environment(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=LIMIT_S)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 9], "\n".join(errors)
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(2)]


pytestmark = pytest.mark.slow


def test_every_rank_gets_the_rows_of_all_in_order(found):
    for rank in range(2):
        assert found[rank]["messages"] == {
            "rows": [[1.5, 2.0], [11.5, 2.0]], "flags": [3, 13], "small": [True, True, True, False], "wide": [[7, 8], [17, 8]],
            "mean": [6.0], "greatest": 15, "told": {"from": 0},
        }  # fmt: skip


def test_batch_norm_of_two_shares_is_that_of_the_whole_batch_forward_and_backward(found):
    assert max(rank["normalising"]["difference"] for rank in found) < 1e-12


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


def test_torchrun_trains_to_the_end_though_a_rank_is_killed_on_the_way(tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--env", "Catch-v0", "--preset", "smoke", "--checkpoint-interval", "30", "--log-interval", "5"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    with open(tmp_path / "output", "w+") as output:
        run = subprocess.Popen(
            [*torchrun, "-m", "speedyzero", *flags, "--run-dir", str(run_dir)],
            stdout=output, stderr=output, env=environment(), cwd=tmp_path,
        )  # fmt: skip
        try:
            end = time.monotonic() + LIMIT_S
            while not list(run_dir.glob("checkpoints/checkpoint_*")) and run.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            os.kill(rank_1_of(run.pid), signal.SIGKILL)
            assert run.wait(LIMIT_S) == 0, (tmp_path / "output").read_text()
        finally:
            run.terminate()
    said = (tmp_path / "output").read_text()
    assert "rank 1 ended or is stuck" in said
    assert f"resumed {run_dir} at iteration " in said
    rows = [json.loads(line)["iteration"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows))
    assert json.loads((run_dir / "eval.json").read_text())["episodes"] == 2
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] >= 400


def rank_1_of(agent: int) -> int:
    """The process that a torchrun started as rank 1."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("torchrun has no rank 1")
