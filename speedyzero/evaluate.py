"""Playing whole games with a trained network: no noise, the most visited action, raw rewards. `python -m speedyzero.evaluate RUN_DIR`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from speedyzero.act import choose_best, search_observations
from speedyzero.config import Config, ConfigError, check, from_json, pick_device
from speedyzero.envs import Emulators, EnvError, EnvSpec, describe
from speedyzero.nets import Network, fold, make_snapshot
from speedyzero.processor import prepare
from speedyzero.run import checkpoint
from speedyzero.run.files import open_regular, write_json
from speedyzero.run.saver import BEST
from speedyzero.scores import human_normalised
from speedyzero.sizes import network_spec
from speedyzero.state import make_network
from speedyzero_kernels.gather import observations

# Added to the run's seed, so that the games of an evaluation are not the ones trained on.
EVALUATION_SEED = 10_000_019


@dataclass
class Frames:
    """The last frames of every lane, a ring as short as the stack: the part of the replay ring that acting needs."""

    frames: torch.Tensor
    """[L, stack, C, H, W]."""
    first: torch.Tensor
    """[L, stack] bool."""
    head: int = 0

    def push(self, emulators: Emulators) -> torch.Tensor:
        """Take the emulators' frames in; returns the flat index [L] of the newest slot of every lane."""
        lanes, slots = self.first.shape
        slot = self.head % slots
        self.frames[:, slot].copy_(emulators.frames)
        self.first[:, slot].copy_(emulators.first)
        self.head += 1
        return torch.arange(lanes, device=self.first.device) * slots + slot


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


def read_config(run_dir: Path) -> Config:
    """The settings of a run.

    Raises:
        ConfigError: there is no run in `run_dir`, or its config.json is damaged.
    """
    path = run_dir / "config.json"
    try:
        with open_regular(path) as file:
            fields = json.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{run_dir}: no run there (config.json is missing); give the --run-dir of a run") from None
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({why}); start a new run with another --run-dir") from None
    config = from_json(fields, path)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; start a new run with another --run-dir") from None
    return config


def load_weights(network: Network, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put the weights of a checkpoint into a training network.

    Raises:
        CheckpointError: the checkpoint is of a network of other sizes.
    """
    if odd := checkpoint.differing({f"network.{name}": tensor for name, tensor in network.state_dict().items()}, tensors):
        raise checkpoint.CheckpointError(
            f"{path}: holds another network than config.json describes ({odd} differs); evaluate it with the run's own config.json"
        )
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(tensors[f"network.{name}"])


def pick_checkpoint(run_dir: Path, which: str) -> Path:
    """The checkpoint that `--checkpoint` names: newest, best, or a file.

    Raises:
        CheckpointError: there is none.
    """
    newest, best = checkpoint.latest(run_dir / "checkpoints"), run_dir / "checkpoints" / BEST
    if which == "newest" and newest is None:
        raise checkpoint.CheckpointError(f"{run_dir}: has no checkpoint yet; let it train until the first one")
    if which == "best" and not best.exists():
        raise checkpoint.CheckpointError(f"{run_dir}: has no best checkpoint yet, as that takes some games; give --checkpoint newest")
    return {"newest": newest, "best": best}.get(which, Path(which))


def evaluate_run(run_dir: Path, episodes: int, device: str, seed: int | None, which: str = "newest") -> dict:
    """Evaluate a checkpoint of a run, see `pick_checkpoint`, and write the run's `eval.json`.

    Raises:
        ConfigError, EnvError, CheckpointError: one line each.
    """
    config = read_config(run_dir)
    if episodes < 1:
        raise ConfigError(f"--episodes {episodes}: must be greater than 0")
    where = pick_device(device)
    prepare(config.threads)
    spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    path = pick_checkpoint(run_dir, which)
    tensors, meta = checkpoint.load(path)
    network = make_network(network_spec(config, spec.frame_shape, spec.num_actions), config.seed, where)
    load_weights(network, tensors, path)
    config = dataclasses.replace(config, eval_episodes=episodes)
    result = evaluate_network(network, config, spec, meta.get("env_steps"), meta.get("updates"), seed) | {"checkpoint": path.name}
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
    except (ConfigError, EnvError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {arguments.run_dir}: {error.strerror or error}; make it writable or make room")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
