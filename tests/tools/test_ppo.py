import json
import subprocess
import sys

import torch

from tools.peers.ppo import advantages


def test_advantages_by_hand_stop_at_the_end_of_an_episode():
    rewards, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.5], [1.0], [2.0]])
    got = advantages(rewards, values, torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([3.0]), discount=0.5, decay=0.5)
    last = 4 + 0.5 * 3 - 2
    middle = 2 - 1.0
    first = 1 + 0.5 * 1 - 0.5 + 0.25 * middle
    torch.testing.assert_close(got, torch.tensor([[first], [middle], [last]]))


def test_it_plays_learns_and_writes_rows(tmp_path):
    out = tmp_path / "ppo"
    command = ["-m", "tools.peers.ppo", "--out", out, "--env", "Pong-v5", "--threads", "1"]
    command += ["--rollout", "32", "--steps", "512", "--log-interval", "1"]
    subprocess.run([sys.executable, *map(str, command)], check=True, timeout=300)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [256, 512]
