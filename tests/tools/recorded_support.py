"""Files as a run leaves them in its directory, written without a run, for the tools that read them."""

import json
from pathlib import Path

CONFIG = {"env": "Pong-v5", "preset": "efficientzero", "seed": 7, "device": "cuda", "env_steps": 100_000}


def row(iteration: int, **more) -> dict:
    """A row as the log writes it, with its counts ten and two times the iteration and three seconds an iteration."""
    counts = {"iteration": iteration, "env_steps": 10 * iteration, "updates": 2 * iteration, "wall_s": 3.0 * iteration}
    return counts | {key.replace("__", "/"): value for key, value in more.items()}


def written_run(folder: Path, rows: list[dict] | str, **files) -> Path:
    """A run directory: the text or the rows of metrics.jsonl, and objects for config.json and other files of that kind."""
    folder.mkdir(parents=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(one) + "\n" for one in rows)
    (folder / "metrics.jsonl").write_text(text)
    for name, value in ({"config": CONFIG} | files).items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


ROWS = [
    row(1, updates=0, charts__episodic_return=-21.0, charts__episodes=3, search__visit_entropy=1.75),
    row(2, charts__episodic_return=-19.5, charts__episodes=5, losses__value_loss=2.5, losses__loss=None, train__skipped_updates=1),
    row(9000, env_steps=100_000, charts__episodic_return=12.0, losses__value_loss=0.5, search__priority_age=80.5),
]
EVAL = {"mean": 14.6, "episodes": 32, "env_steps": 100_000, "updates": 18_000}
SUMMARY = {"env_steps": 100_000, "updates": 18_000, "wall_s": 724.6}


def finished_run(folder: Path) -> Path:
    return written_run(folder, ROWS, eval=EVAL, summary=SUMMARY, status={"gpu": "NVIDIA H100"})


def cells(line: str) -> list[str]:
    """Of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]
