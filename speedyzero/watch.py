"""Watch a trained agent: a video of a game with what it thinks, or the search tree of a moment. `python -m speedyzero.watch RUN`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from speedyzero.agent import Agent, Search, load
from speedyzero.config import ConfigError
from speedyzero.emulators import Emulators
from speedyzero.envs import EnvError
from speedyzero.evaluate import EVALUATION_SEED
from speedyzero.pictures.actions import action_names
from speedyzero.pictures.panel import Panel
from speedyzero.pictures.scene import Scene
from speedyzero.pictures.tree import draw_tree
from speedyzero.pictures.video import frames_a_second, writing
from speedyzero.processor import prepare
from speedyzero.run.checkpoint import CheckpointError

LINES = {".mp4": 630, ".gif": 420}
"""Height of a video, about: the picture is scaled by a whole number."""
GIF_STEPS = 600
SHORT = 100
"""Games are added until there are as many steps: those of Catch are over after nine."""


class Moment(NamedTuple):
    """A moment of a game: what is seen, and what the agent thinks."""

    picture: np.ndarray
    """[H, W, 3] u8."""
    search: Search | None
    """Of this moment; None where the game is over."""
    game: int
    """Games that were over before it."""
    step: int
    """Steps of this game so far."""
    score: float
    """Raw rewards of this game so far."""
    reward: float
    """Raw reward that came with it."""


def play(agent: Agent, seed: int) -> Iterator[Moment]:
    """The moments of whole games, one after the other, without end.

    Raises:
        EnvError: the environment has no picture, or its emulators failed.
    """
    limit = agent.config.max_episode_steps
    sticky = agent.config.sticky_actions
    emulators = Emulators(agent.spec, 1, seed, training=False, threads=1, max_episode_steps=limit, sticky_actions=sticky)
    game, step, score = 0, 0, 0.0
    with closing(emulators), closing(Scene(emulators, limit)) as scene:
        emulators.reset()
        scene.reset()
        agent.reset()
        while True:
            over = bool(emulators.game_over[0])
            search = None if over else _one(agent.search(emulators.frames.numpy()))
            reward = float(emulators.reward[0])
            score += reward
            yield Moment(scene.picture(), search, game, step, score, reward)
            if over:
                agent.reset()
                game, step, score = game + 1, -1, 0.0
            else:
                emulators.actions[0] = search.action
            emulators.send()
            scene.send()
            emulators.recv()
            scene.recv()
            step += 1


def _one(found: Search) -> Search:
    """The search of the only environment."""
    return Search(*(getattr(found, name)[0] for name in Search.__dataclass_fields__))


def record(agent: Agent, out: Path, seed: int, games: int | None, steps: int | None, fps: float) -> str:
    """Write a video of games; returns a line about it.

    games: None for one, and more while they are short. steps: at most, or None. fps: steps in a second of the video.
    """
    names = action_names(agent.spec)
    panel = Panel(agent.env_id, names, LINES.get(out.suffix, 0))
    scores: list[float] = []
    size, taken = (0, 0), 0
    with writing(out, fps) as add, closing(play(agent, seed)) as moments:
        for moment in moments:
            frame = panel.frame(moment.picture, moment.search, moment.step, moment.score, moment.reward)
            add(frame)
            if moment.search is None:
                for _ in range(round(fps / 2)):  # half a second to see how it ended
                    add(frame)
                scores.append(moment.score)
                if len(scores) >= (games or 1) and (games or taken >= SHORT):
                    break
            elif steps is not None and taken >= steps:
                break
            taken += moment.search is not None
            _progress(f"game {moment.game + 1}, step {moment.step}, score {moment.score:g}")
            size = frame.shape[1], frame.shape[0]
    _progress("")
    ends = f"{len(scores)} game{'s' * (len(scores) != 1)}, mean score {np.mean(scores):g}" if scores else f"score {moment.score:g} so far"
    return f"{out}: {ends}, {taken} steps, {size[0]} x {size[1]} at {fps:g} frames a second, {out.stat().st_size / 1e6:.2f} MB"


def _progress(text: str) -> None:
    """Show how far it is on a terminal, over what was shown last."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def draw_moment(agent: Agent, stem: Path, seed: int, step: int) -> str:
    """Draw the search tree after `step` steps of play; returns a line about it. Raises ConfigError if a game ends there."""
    ends: list[int] = []
    with closing(play(agent, seed)) as moments:
        for count, moment in zip(range(step + 1), moments, strict=False):
            if moment.search is None:
                ends.append(moment.step)
            _progress(f"step {count} of {step}, game {moment.game + 1}, score {moment.score:g}")
    _progress("")
    if moment.search is None:
        raise ConfigError(f"--tree {step}: the game is over there, after {moment.step} steps; give another step")
    names = action_names(agent.spec)
    within = "" if moment.game == 0 else f" (step {moment.step} of game {moment.game + 1})"
    title = f"{agent.env_id}, step {step}{within}: {names[moment.search.action]} after {int(moment.search.visits.sum())} simulations"
    paths = draw_tree(stem, moment.search, moment.picture, names, title)
    line = f"{' and '.join(map(str, paths))}: {len(moment.search.tree)} nodes, {int(moment.search.tree.depth.max())} deep"
    return line + (f"; in game {moment.game + 1}, as the first was over after {ends[0]} steps" if ends else "")


@dataclass
class Arguments:
    """Watch an agent play: write a video of a game, with the agent's value and the visits of each action beside the picture."""

    agent: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or a file that python -m speedyzero.export wrote."""
    out: Path | None = None
    """The video, FILE.mp4 or FILE.gif; with --tree the drawing, written as .svg and as .png. Default: watch.mp4 or tree_STEP in the run's
    folder, or beside the file."""
    tree: int | None = None
    """Instead of a video, draw the search tree after so many steps, counted over all games."""
    games: int | None = None
    """Games to play; default: one, and further ones while there are fewer than 100 steps."""
    steps: int | None = None
    """Stop after so many steps; default: after whole games, and after 600 steps in a GIF."""
    seed: int | None = None
    """Seed of the emulator; default: that of the run's evaluation."""
    checkpoint: str = "newest"
    """Which one of a run: newest, best (of the best games while training), or a file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto: cuda if there is one."""
    fps: float | None = None
    """Steps shown in a second; default: the pace of the game."""


def run(arguments: Arguments) -> str:
    """Do what the command line asks for; returns the line to print. Raises ConfigError, EnvError, CheckpointError, OSError."""
    for name, least in (("games", 1), ("steps", 1), ("tree", 0), ("fps", 0.1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**31:
            raise ConfigError(f"--{name} {value}: must be at least {least}")
    agent = load(arguments.agent, arguments.checkpoint, arguments.device)
    prepare(agent.config.threads)
    seed = (agent.config.seed + EVALUATION_SEED) % 2**31 if arguments.seed is None else arguments.seed
    folder = arguments.agent if arguments.agent.is_dir() else arguments.agent.parent
    if arguments.tree is not None:
        return draw_moment(agent, (arguments.out or folder / f"tree_{arguments.tree}").with_suffix(""), seed, arguments.tree)
    out = arguments.out or folder / "watch.mp4"
    steps = GIF_STEPS if arguments.steps is None and arguments.games is None and out.suffix == ".gif" else arguments.steps
    return record(agent, out, seed, arguments.games, steps, arguments.fps or frames_a_second(agent.spec))


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m speedyzero.watch")
    try:
        print(run(arguments))
    except (ConfigError, EnvError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out: {error.strerror or error} ({error.filename}); make it writable, make room, or give another file")
    except KeyboardInterrupt:
        _progress("")
        sys.exit(130)


if __name__ == "__main__":
    main()
