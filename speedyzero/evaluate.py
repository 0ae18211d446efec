"""Playing whole games with a trained network: no noise, the most visited action, raw rewards. `python -m speedyzero.evaluate RUN`."""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro

from speedyzero.act import choose_best, search_observations
from speedyzero.agent import Frames
from speedyzero.config import Config, ConfigError, pick_device
from speedyzero.emulators import Emulators
from speedyzero.envs import ATARI_STEPS, EnvError, EnvSpec
from speedyzero.graph import GraphError, Graphs
from speedyzero.nets import Network
from speedyzero.processor import before_cuda, prepare
from speedyzero.ranks import ALONE, Ranks
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.files import write_json
from speedyzero.run.guard import Interrupt, Interrupted
from speedyzero.run.saver import BEST
from speedyzero.run.trained import make_trained_network, read_run
from speedyzero.scores import ATARI_100K, human_normalised
from speedyzero.search import SearchResult
from speedyzero.snapshot import fold, make_snapshot
from speedyzero_kernels.gather import observations

# Added to the run's seed, so that the games of an evaluation are not the ones trained on.
EVALUATION_SEED = 10_000_019
EVALUATIONS = "evaluations"
"""Folder of a run with a file for each evaluation; `eval.json` is the newest by the run's own rules."""
INTERRUPTED = "interrupted"
"""Folder in it with those that were stopped before all games were over, which no report takes for an evaluation."""


class Game(NamedTuple):
    """One game that was played.

    score: its raw return. length: steps. cut: ended by a limit, of steps or of time, and counts with what it has. start: CRC of its first
    frame. course: CRC of all its frames: two games with the same are the same game.
    """

    score: float
    length: int
    cut: bool
    start: int
    course: int


def play(
    snapshot: Network, config: Config, spec: EnvSpec, episodes: int, seed: int, between_steps: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> list[Game]:
    """Play `episodes` whole games side by side, the first of each lane, in the order of the lanes.

    A game that is not over after `eval_max_steps` steps counts with what it has. Not every environment of EnvPool keeps to a limit, so it
    is kept here. On CUDA the search of a step is captured, unless the config says `graph` off. `ranks` share the work, step by step, and
    all return all games.

    between_steps: what it raises ends the evaluation, and comes out. But of Interrupted the games that are over then are left, if there
        are any, and are returned: fewer than `episodes`.

    Raises:
        EnvError: the emulators failed.
        GraphError: no memory is left, or the search could not be captured.
    """
    device = next(snapshot.parameters()).device
    run = _runner(config, device)
    limit = config.max_episode_steps
    lanes = -(-episodes // ranks.size) * ranks.size  # shares are equal: the games beyond `episodes` are left out
    mine = ranks.share(lanes)
    emulators = Emulators(
        spec, lanes, seed, training=False, threads=config.env_threads, max_episode_steps=limit, sticky_actions=config.sticky_actions,
        pin=device.type == "cuda", ranks=ranks,
    )  # fmt: skip
    emulators.reset()
    shape = (lanes, config.frame_stack)
    memory = Frames(
        torch.zeros(*shape, *spec.frame_shape, dtype=emulators.frames.dtype, device=device),
        torch.zeros(shape, dtype=torch.bool, device=device),
    )
    index = torch.zeros(lanes // ranks.size, dtype=torch.int64, device=device)
    actions = torch.zeros(lanes, dtype=torch.int64, device=device)

    def search() -> None:
        frames = observations(memory.frames, memory.first, index, config.frame_stack, **snapshot.input_format)
        result, _ = search_observations(snapshot, frames, config, noise=None)
        actions.copy_(choose_best(config, SearchResult(*ranks.gather(*result.of_each_root()))))

    starts = [zlib.crc32(frame.numpy().data) for frame in emulators.frames]
    courses = list(starts)
    games: list[Game | None] = [None] * lanes
    try:
        for _ in range(config.eval_max_steps):
            try:
                between_steps()
            except Interrupted:
                if over := [game for game in games[:episodes] if game is not None]:
                    return over
                raise
            index.copy_(memory.push(emulators)[mine])
            run("the evaluation's search", search)
            emulators.actions.copy_(actions)
            emulators.send()
            emulators.recv()
            for lane, frame in enumerate(emulators.frames):
                if games[lane] is None:
                    courses[lane] = zlib.crc32(frame.numpy().data, courses[lane])
            ended = emulators.game_over.nonzero().flatten().tolist()
            for lane, game in zip(ended, emulators.drain_finished(), strict=True):
                if games[lane] is None:
                    games[lane] = Game(*game, bool(emulators.cut[lane]), starts[lane], courses[lane])
            if None not in games[:episodes]:
                break
        for lane, so_far in enumerate(emulators.unfinished()):
            if games[lane] is None:
                games[lane] = Game(*so_far, True, starts[lane], courses[lane])
        return games[:episodes]
    finally:
        emulators.close()


def _runner(config: Config, device: torch.device) -> Callable[[Hashable, Callable[[], None]], None]:
    """How the work of a step on fixed tensors is run: captured on CUDA if the config lets it, elsewhere as it is."""
    if device.type != "cuda":
        return lambda key, function: function()
    fewer = "--eval-episodes, or --episodes of python -m speedyzero.evaluate", "play fewer games"
    return Graphs(device, None, "off" if config.graph == "off" else "on", too_little=fewer).run


def summarise(env_id: str, games: list[Game], env_steps: int, updates: int, seed: int) -> dict:
    """What `eval.json` holds: mean, median, std (population), the games one by one, and the human-normalised score of the mean.

    That score is None if a game was cut before the benchmark's own limit, 27,000 steps: a game of Pong that is cut while nobody has
    scored yet would be at 59 % of human.
    """
    scores = np.array([game.score for game in games])
    too_soon = any(game.cut and game.length < ATARI_STEPS for game in games)
    return {
        "env": env_id,
        "episodes": len(games),
        "mean": float(scores.mean()),
        "median": float(np.median(scores)),
        "std": float(scores.std()),
        "human_normalised": None if too_soon else human_normalised(env_id, float(scores.mean())),
        "scores": scores.tolist(),
        "lengths": [game.length for game in games],
        "cut": [game.cut for game in games],
        "distinct_games": len({game.course for game in games}),
        "distinct_starts": len({game.start for game in games}),
        "env_steps": env_steps,
        "updates": updates,
        "seed": seed,
    }


def evaluate_network(
    network: Network, config: Config, spec: EnvSpec, env_steps: int, updates: int, seed: int | None = None,
    between_steps: Callable[[], None] = lambda: None, ranks: Ranks = ALONE,
) -> dict:
    """Evaluate a training network; returns what `eval.json` holds. `between_steps` and `ranks` as in `play`.

    If it was interrupted the result also has `asked`, how many games there were to be, and no human-normalised score: the games that are
    over are the short ones.
    """
    device = next(network.parameters()).device
    snapshot = make_snapshot(network.spec, device, config.amp)
    fold(network, snapshot)
    seed = (config.seed + EVALUATION_SEED) % 2**31 if seed is None else seed
    games = play(snapshot, config, spec, config.eval_episodes, seed, between_steps, ranks)
    rules = {"sticky_actions": config.sticky_actions, "max_steps": config.eval_max_steps}
    result = summarise(spec.env_id, games, env_steps, updates, seed) | rules
    return result if len(games) == config.eval_episodes else result | {"asked": config.eval_episodes, "human_normalised": None}


def write_result(run_dir: Path, result: dict, iterations: int, own_rules: bool = True) -> Path:
    """Write an evaluation to a file of its own, which is returned, and if it was by the run's own rules to `eval.json`. Raises OSError.

    One that was interrupted goes to a folder of its own, and never to `eval.json`.
    result: also names its `checkpoint`. iterations: of that checkpoint, as the best one is replaced in time.
    """
    stem = Path(result["checkpoint"]).stem
    name = f"{stem}_{iterations:09d}" if Path(result["checkpoint"]).name == BEST else stem
    sticky = f"_sticky{result['sticky_actions']:g}" if result["sticky_actions"] else ""
    interrupted = "asked" in result
    folder = run_dir / EVALUATIONS / INTERRUPTED if interrupted else run_dir / EVALUATIONS
    games = f"{result['episodes']}of{result['asked']}" if interrupted else result["episodes"]
    path = folder / f"{name}_{games}games_seed{result['seed']}{sticky}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    if own_rules and not interrupted:
        write_json(run_dir / "eval.json", result)
    return path


def evaluate_run(
    run_dir: Path, episodes: int, device: str, seed: int | None, which: str = "newest", sticky_actions: float | None = None,
    graph: str = "auto", between_steps: Callable[[], None] = lambda: None,
) -> tuple[dict, Path]:  # fmt: skip
    """Evaluate a checkpoint of a run, see `read_run`, and write the result; returns it and its file.

    sticky_actions: in the place of the run's own; the run's `eval.json` then stays as it is. graph: `off` captures nothing.
    between_steps: as in `play`.

    Raises:
        ConfigError, EnvError, CheckpointError, GraphError: one line each.
    """
    if episodes < 1:
        raise ConfigError(f"--episodes {episodes}: must be greater than 0")
    where = pick_device(device)
    run = read_run(run_dir, which)
    prepare(run.config.threads)
    network = make_trained_network(run, where)
    own = run.config.sticky_actions
    config = dataclasses.replace(
        run.config, eval_episodes=episodes, sticky_actions=own if sticky_actions is None else sticky_actions, graph=graph
    )
    counts = (run.meta.get(name) for name in ("env_steps", "updates"))
    result = evaluate_network(network, config, run.spec, *counts, seed, between_steps) | {"checkpoint": run.path.name}
    return result, write_result(run_dir, result, run.meta["iterations"], config.sticky_actions == own)


def describe_result(result: dict) -> str:
    """One line for a person: the scores, the checkpoint, and what makes them worth less than they look."""
    normalised, episodes, cut = result["human_normalised"], result["episodes"], sum(result["cut"])
    played = f"{episodes} of {result['asked']}" if "asked" in result else episodes
    parts = [
        f"{result['env']}: mean {result['mean']:.2f}, median {result['median']:.2f}, std {result['std']:.2f} over {played} episodes "
        f"of {Path(result['checkpoint']).stem}"
    ]
    if "asked" in result:
        parts.append("interrupted: the games that take longer are not among them")
    if normalised is not None:
        parts.append(f"human-normalised {normalised:.3f}")
    if result["sticky_actions"]:
        parts.append(f"sticky actions {result['sticky_actions']:g}")
    if cut:
        withheld = normalised is None and "asked" not in result and result["env"] in ATARI_100K
        parts.append(f"{cut} cut by the limit" + (", so no human-normalised score" if withheld else ""))
    if result["distinct_games"] < episodes:
        why = "" if result["sticky_actions"] else ", as only the start of a game is random"
        parts.append(f"only {result['distinct_games']} distinct{why} (docs/PROTOCOL.md)")
    return ", ".join(parts)


@dataclass
class Arguments:
    """Evaluate a checkpoint of a run; writes a file in RUN/evaluations, and RUN/eval.json."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    checkpoint: str = "newest"
    """Which one: newest, best (of the best games while training), or a file."""
    episodes: int = 32
    """Whole games to play."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto: cuda if there is one."""
    seed: int | None = None
    """Seed of the emulators; default: one that follows from the run's."""
    sticky_actions: float | None = None
    """Atari only: chance of a repeated action in the place of the run's own; eval.json then stays as it is."""
    graph: Literal["auto", "off"] = "auto"
    """Capture the search in a CUDA graph; auto: on CUDA. off: run it as it is."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m speedyzero.evaluate")
    before_cuda()
    interrupt = Interrupt()
    try:
        with interrupt:
            result, path = evaluate_run(
                arguments.run_dir, arguments.episodes, arguments.device, arguments.seed, arguments.checkpoint, arguments.sticky_actions,
                arguments.graph, interrupt.check_stop,
            )  # fmt: skip
        print(f"{describe_result(result)}\n{path}")
        if "asked" in result:
            sys.exit(128 + interrupt.requested)
    except Interrupted:
        print(f"stopped by {interrupt.requested.name} before a game was over", file=sys.stderr)
        sys.exit(128 + interrupt.requested)
    except (ConfigError, EnvError, CheckpointError, GraphError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {arguments.run_dir}: {error.strerror or error}; make it writable or make room")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
