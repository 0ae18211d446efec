"""EnvPool's environments: the only file that imports EnvPool, when first needed, since that takes more than a second.

`describe` turns an EnvPool id into the shapes that the trainer is built from; `make_pool` starts what `emulators.Emulators` steps.
"""

import difflib
import re
import reprlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

ATARI = {
    "stack_num": 1,
    "frame_skip": 4,
    "noop_max": 30,
    "use_fire_reset": False,
    "full_action_space": False,
    "repeat_action_probability": 0.0,
    "reward_clip": False,
}
"""EfficientZero's Atari, one frame a step. An id belongs to the Atari family if its config takes all of these."""

FRAME_SIZE, FRAME_SIZES = 96, (32, 256)
"""Side of a square Atari frame: EfficientZero's, and the least and the greatest there is."""

ATARI_STEPS = 27_000
"""Agent steps of an Atari game at most: 108k frames."""

STICKY = 0.25
"""Chance of a repeated action in the protocol of Machado et al., "Revisiting the Arcade Learning Environment" (JAIR 2018)."""

ONE_HOT_LIMIT = 4096


class EnvError(ValueError):
    """What is wrong with the environment asked for, in one line that names the flag."""


@dataclass(frozen=True)
class EnvSpec:
    """What the rest of the trainer needs to know of an environment.

    frame_shape: (C, H, W) of a single frame; u8 pixels if `image`, f32 otherwise.
    num_actions: A; actions are 0 to A-1.
    """

    env_id: str
    family: str  # "atari" or "other"
    image: bool
    frame_shape: tuple[int, int, int]
    num_actions: int

    def settings(self) -> dict[str, int | float | bool]:
        """EnvPool's settings that make frames of `frame_shape`: those of Atari, elsewhere none."""
        if self.family != "atari":
            return {}
        channels, height, width = self.frame_shape
        return ATARI | {"gray_scale": channels == 1, "img_height": height, "img_width": width}

    def game_settings(self, *, training: bool, sticky_actions: float, max_episode_steps: int | None) -> dict[str, int | float | bool]:
        """EnvPool's settings for games with such frames: whole games, or in training of Atari one a life.

        sticky_actions: of Atari alone. max_episode_steps: None for Atari's own limit, and elsewhere the environment's.
        """
        settings = self.settings()
        if self.family == "atari":
            settings |= {"episodic_life": training, "max_episode_steps": ATARI_STEPS, "repeat_action_probability": sticky_actions}
        return settings if max_episode_steps is None else settings | {"max_episode_steps": max_episode_steps}


def frame_fault(env_id: str, atari: bool, frame_size: int | None, gray: bool | None) -> str | None:
    """What is wrong with the frames asked for, in one line that names the flag, or None; settings that are None are in order."""
    least, greatest = FRAME_SIZES
    if not atari and (frame_size is not None or gray is not None):
        given = f"--frame-size {reprlib.repr(frame_size)}" if frame_size is not None else f"--gray {gray}"
        return f"{given}: {env_id} is no Atari game, its frames are as they are; leave it out"
    if frame_size is not None and not least <= frame_size <= greatest:
        return f"--frame-size {reprlib.repr(frame_size)}: must lie between {least} and {greatest}; {FRAME_SIZE} is EfficientZero's"
    return None


def sticky_fault(env_id: str, atari: bool, sticky_actions: float) -> str | None:
    """What is wrong with the sticky actions asked for, in one line that names the flag, or None."""
    if not 0 <= sticky_actions < 1:
        return f"--sticky-actions {sticky_actions}: must be at least 0 and below 1; {STICKY} is Machado et al.'s"
    if sticky_actions and not atari:
        return f"--sticky-actions {sticky_actions}: {env_id} is no Atari game; leave it out"
    return None


def describe(env_id: str, *, frame_size: int | None = None, gray: bool | None = None) -> EnvSpec:
    """Shapes of an EnvPool id, without starting it.

    frame_size, gray: of a config, for Atari alone: S, or None for 96, and whether a frame has one channel, or None for three.

    Atari is 3 x S x S u8, gray 1 x S x S. Other boxes become C x H x W, u8 if the box is u8 and else f32: H x W -> 1 x H x W,
    D -> D x 1 x 1, H x W x C with C <= 4 < H -> C x H x W. Discrete(n) observations become one-hot n x 1 x 1.

    Raises:
        EnvError: speedyzero cannot play it, the size is out of bounds, or an environment that is not Atari was given size or gray.
    """
    raw = _raw_spec(env_id)
    atari = set(ATARI) <= set(raw.config._fields)
    if fault := frame_fault(env_id, atari, frame_size, gray):
        raise EnvError(fault)
    if atari:
        side = frame_size or FRAME_SIZE
        raw = _raw_spec(env_id, **ATARI, gray_scale=bool(gray), img_height=side, img_width=side)
    if raw.config.max_num_players != 1:
        raise EnvError(f"--env {env_id}: {raw.config.max_num_players} players; speedyzero plays alone, as in Catch-v0")
    with _quiet():
        actions, observations = raw.action_space, raw.observation_space
    kind = type(actions).__name__
    if kind != "Discrete":
        what = f"continuous actions (Box{tuple(actions.shape)})" if kind == "Box" else f"{kind} actions"
        raise EnvError(f"--env {env_id}: {what}; speedyzero needs discrete actions, as in CartPole-v1")
    if actions.start != 0:
        raise EnvError(f"--env {env_id}: actions start at {actions.start}, not at 0 as in CartPole-v1")
    shape, _ = _layout(env_id, observations)
    return EnvSpec(env_id, "atari" if atari else "other", observations.dtype == np.uint8, shape, int(actions.n))


def make_pool(spec: EnvSpec, seeds: list[int], settings: dict[str, Any]) -> tuple[Any, str]:
    """EnvPool itself in sync mode, a lane for each seed; and how an observation goes into a frame, as `_layout` says.

    Raises:
        EnvError: its frames are not as `spec` says.
    """
    lanes = len(seeds)
    with _quiet():
        pool = _envpool().make(spec.env_id, env_type="gymnasium", num_envs=lanes, batch_size=lanes, seed=seeds, **settings)
        shape, order = _layout(spec.env_id, pool.observation_space)
    if shape != spec.frame_shape:
        raise EnvError(f"--env {spec.env_id}: frames are {shape}, described as {spec.frame_shape}")
    return pool, order


def envpool_version() -> str:
    """The version that is installed."""
    return _envpool().__version__


def _envpool() -> Any:
    """EnvPool, imported when first needed."""
    with _quiet():
        import envpool
    return envpool


def _raw_spec(env_id: str, **settings: Any) -> Any:
    """EnvPool's own description of an id."""
    envpool = _envpool()
    ids = envpool.list_all_envs()
    if env_id not in ids:
        near = _nearest(env_id, ids)
        hint = f"did you mean {near}?" if near else "envpool.list_all_envs() lists them"
        raise EnvError(f"--env {env_id}: not an EnvPool id; {hint}")
    try:
        with _quiet():
            return envpool.make_spec(env_id, **settings)
    except (ImportError, RuntimeError) as error:
        raise EnvError(f"--env {env_id}: EnvPool cannot load it: {' '.join(str(error).split())}") from error


def _nearest(env_id: str, ids: list[str]) -> str | None:
    """The id that was most likely meant: the newest version of the same name, or of the most similar one."""

    def stem(name: str) -> str:
        return re.sub(r"^ale/|(noframeskip|deterministic)?(-v\d+)?$", "", name.lower())

    by_stem: dict[str, str] = {}
    for name in sorted(ids):
        by_stem[stem(name)] = name
    near = difflib.get_close_matches(stem(env_id), by_stem, n=1)
    return by_stem[near[0]] if near else None


def _layout(env_id: str, space: Any) -> tuple[tuple[int, int, int], str]:
    """Frame shape (C, H, W), and how an observation goes into it: "chw" by reshape, "hwc" by permutation, "one-hot"."""
    kind = type(space).__name__
    if kind == "Discrete" and space.n <= ONE_HOT_LIMIT:
        return (int(space.n), 1, 1), "one-hot"
    if kind == "Discrete":
        raise EnvError(f"--env {env_id}: {space.n} discrete observations; speedyzero one-hots at most {ONE_HOT_LIMIT}")
    if kind != "Box" or len(space.shape) > 3:
        what = f"{len(space.shape)}-dimensional" if kind == "Box" else kind
        raise EnvError(f"--env {env_id}: {what} observations; speedyzero needs one array of at most 3 dimensions")
    shape = tuple(int(size) for size in space.shape)
    if len(shape) == 3:
        first, middle, last = shape
        return ((last, first, middle), "hwc") if last <= 4 < first else (shape, "chw")
    return ((1, *shape), "chw") if len(shape) == 2 else ((*shape, 1, 1, 1)[:3], "chw")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence gymnasium's remarks on the precision of box bounds, here and nowhere else, and let EnvPool find no JAX: it imports it where
    it is installed, for functions that nobody here calls, and that costs seconds and memory."""
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = None  # an import of it fails as if it were not installed
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    finally:
        if hidden:
            del sys.modules["jax"]
