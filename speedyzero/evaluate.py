"""Playing whole games with a trained network: no noise, the most visited action, raw rewards. `python -m speedyzero.evaluate RUN_DIR`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from speedyzero.act import choose_best, search_observations
from speedyzero.agent import Frames
from speedyzero.config import Config, ConfigError, pick_device
from speedyzero.envs import Emulators, EnvError, EnvSpec
from speedyzero.nets import Network, fold, make_snapshot
from speedyzero.processor import prepare
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.files import write_json
from speedyzero.run.trained import make_trained_network, read_run
from speedyzero.scores import human_normalised
from speedyzero_kernels.gather import observations

# Added to the run's seed, so that the games of an evaluation are not the ones trained on.
EVALUATION_SEED = 10_000_019


def play(
    snapshot: Network, config: Config, spec: EnvSpec, episodes: int, seed: int, between_steps: Callable[[], None] = lambda: None
) -> list[tuple[float, int]]:
    """Play `episodes` whole games side by side, the first of each lane; returns (raw return, steps) of each.

    A game that is not over after `eval_max_steps` steps counts with what it has. Not every environment of EnvPool keeps to a limit, so it
    is kept here. What `between_steps` raises ends it.

    Raises:
        EnvError: the emulators failed.
    """
    device = next(snapshot.parameters()).device
    limit = config.max_episode_steps
    emulators = Emulators(spec, episodes, seed, training=False, threads=config.env_threads, max_episode_steps=limit)
    emulators.reset()
    shape = (episodes, config.frame_stack)
    memory = Frames(
        torch.zeros(*shape, *spec.frame_shape, dtype=emulators.frames.dtype, device=device),
        torch.zeros(shape, dtype=torch.bool, device=device),
    )
    games: list[tuple[float, int] | None] = [None] * episodes
    try:
        for _ in range(config.eval_max_steps):
            between_steps()
            index = memory.push(emulators)
            frames = observations(memory.frames, memory.first, index, config.frame_stack, **snapshot.input_format)
            result, _ = search_observations(snapshot, frames, config, noise=None)
            emulators.actions.copy_(choose_best(config, result))
            emulators.send()
            emulators.recv()
            ended = emulators.game_over.nonzero().flatten().tolist()
            for lane, game in zip(ended, emulators.drain_finished(), strict=True):
                if games[lane] is None:
                    games[lane] = game
            if None not in games:
                break
        return [game or so_far for game, so_far in zip(games, emulators.unfinished(), strict=True)]
    finally:
        emulators.close()


def summarise(env_id: str, games: list[tuple[float, int]], env_steps: int, updates: int, seed: int) -> dict:
    """What `eval.json` holds: mean, median, std (population), per-episode scores, and the human-normalised score of the mean."""
    scores = np.array([score for score, _ in games])
    return {
        "env": env_id,
        "episodes": len(games),
        "mean": float(scores.mean()),
        "median": float(np.median(scores)),
        "std": float(scores.std()),
        "human_normalised": human_normalised(env_id, float(scores.mean())),
        "scores": scores.tolist(),
        "lengths": [length for _, length in games],
        "env_steps": env_steps,
        "updates": updates,
        "seed": seed,
    }


def evaluate_network(
    network: Network, config: Config, spec: EnvSpec, env_steps: int, updates: int, seed: int | None = None,
    between_steps: Callable[[], None] = lambda: None,
) -> dict:
    """Evaluate a training network; returns what `eval.json` holds. What `between_steps` raises ends it."""
    device = next(network.parameters()).device
    snapshot = make_snapshot(network.spec, device, config.amp)
    fold(network, snapshot)
    seed = (config.seed + EVALUATION_SEED) % 2**31 if seed is None else seed
    games = play(snapshot, config, spec, config.eval_episodes, seed, between_steps)
    return summarise(spec.env_id, games, env_steps, updates, seed)


def evaluate_run(run_dir: Path, episodes: int, device: str, seed: int | None, which: str = "newest") -> dict:
    """Evaluate a checkpoint of a run, see `read_run`, and write the run's `eval.json`.

    Raises:
        ConfigError, EnvError, CheckpointError: one line each.
    """
    if episodes < 1:
        raise ConfigError(f"--episodes {episodes}: must be greater than 0")
    where = pick_device(device)
    run = read_run(run_dir, which)
    prepare(run.config.threads)
    network = make_trained_network(run, where)
    config = dataclasses.replace(run.config, eval_episodes=episodes)
    counts = (run.meta.get(name) for name in ("env_steps", "updates"))
    result = evaluate_network(network, config, run.spec, *counts, seed) | {"checkpoint": run.path.name}
    write_json(run_dir / "eval.json", result)
    return result


def describe_result(result: dict) -> str:
    """One line for a person."""
    normalised = result["human_normalised"]
    human = "" if normalised is None else f", human-normalised {normalised:.3f}"
    return (
        f"{result['env']}: mean {result['mean']:.2f}, median {result['median']:.2f}, std {result['std']:.2f} "
        f"over {result['episodes']} episodes{human}"
    )


@dataclass
class Arguments:
    """Evaluate a checkpoint of a run and write RUN_DIR/eval.json."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    checkpoint: str = "newest"
    """Which one: newest, best (of the best games while training), or a file."""
    episodes: int = 32
    """Whole games to play."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto: cuda if there is one."""
    seed: int | None = None
    """Seed of the emulators; default: one that follows from the run's."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m speedyzero.evaluate")
    try:
        print(describe_result(evaluate_run(arguments.run_dir, arguments.episodes, arguments.device, arguments.seed, arguments.checkpoint)))
    except (ConfigError, EnvError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {arguments.run_dir}: {error.strerror or error}; make it writable or make room")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
