"""A trained agent: it takes observations as an environment gives them, stacks their frames, searches, and acts.

    agent = speedyzero.load("runs/pong")
    envs = envpool.make_gymnasium(agent.env_id, num_envs=8, **agent.env_settings)
    observations, _ = envs.reset()
    done = None
    for _ in range(1000):
        actions = agent.act(observations, done)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        done = terminated | truncated

A single environment of Gymnasium's gets an int, and `agent.reset()` after its own `reset`; Atari's wants the frames of training:
`AtariPreprocessing(env, frame_skip=4, screen_size=64, grayscale_obs=True)` gives those of the `cpu-atari` preset to the bit.

It acts as in an evaluation: no noise, the action that the search holds best. In the shapes `N` is the environments, `A` the actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speedyzero import agent_file
from speedyzero.act import choose_best, search_observations
from speedyzero.config import Config, ConfigError, pick_device
from speedyzero.emulators import Emulators
from speedyzero.envs import EnvSpec
from speedyzero.nets import Network
from speedyzero.processor import has_fast_bf16
from speedyzero.ring import Inbox
from speedyzero.run.trained import make_trained_network, read_run, read_scores
from speedyzero.search import SearchResult
from speedyzero.search_tree import tree_of
from speedyzero.sizes import network_spec
from speedyzero.snapshot import fold, make_snapshot
from speedyzero_kernels.gather import observations as gather


@dataclass
class Frames:
    """The last frames of every lane, a ring as short as the stack: the part of the replay ring that acting needs."""

    frames: torch.Tensor
    """[L, stack, C, H, W]."""
    first: torch.Tensor
    """[L, stack] bool."""
    head: int = 0

    def push(self, emulators: Emulators | Inbox) -> torch.Tensor:
        """Take the emulators' frames in; returns the flat index [L] of the newest slot of every lane."""
        lanes, slots = self.first.shape
        slot = self.head % slots
        self.frames[:, slot].copy_(emulators.frames)
        self.first[:, slot].copy_(emulators.first)
        self.head += 1
        return torch.arange(lanes, device=self.first.device) * slots + slot


@dataclass(frozen=True)
class Search:
    """What a search found. Of a single observation everything lacks the first dimension, and `tree` is one tree."""

    action: Any
    """[N] int64 (an int for a single observation), what `act` returns."""
    policy: np.ndarray
    """[N, A] float32, the improved policy: what the network would be taught."""
    value: Any
    """[N] float32, mean return of the root after the search."""
    network_value: Any
    """[N] float32, the network's own value of the observation."""
    visits: np.ndarray
    """[N, A] int32, simulations through each action."""
    prior: np.ndarray
    """[N, A] float32, the network's own policy."""
    q: np.ndarray
    """[N, A] float32, reward + discounted value of each action; NaN if it was not visited."""
    tree: Any
    """[N] list of SearchTree, the trees themselves."""


class Agent:
    """A trained network with the search around it, and the last frames of each environment it plays.

    config: the settings it was trained with. spec: the environment's shapes. path: the file its weights come from. env_steps, updates: how
    long it had trained then. scores: its evaluation, as `eval.json` has it, or None. device: where it runs.
    """

    def __init__(
        self, snapshot: Network, config: Config, spec: EnvSpec, path: Path, env_steps: int, updates: int, scores: dict[str, Any] | None
    ):  # fmt: skip
        self.snapshot, self.config, self.spec, self.path = snapshot, config, spec, path
        self.env_steps, self.updates, self.scores = env_steps, updates, scores
        self._memory: Frames | None = None
        self._begins: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"Agent({self.env_id}, {self.env_steps} environment steps, {self.updates} updates, from {self.path}, on {self.device})"

    @property
    def env_id(self) -> str:
        """EnvPool's id of the environment."""
        return self.spec.env_id

    @property
    def device(self) -> torch.device:
        return next(self.snapshot.parameters()).device

    @property
    def env_settings(self) -> dict[str, Any]:
        """EnvPool's settings for whole games with the frames that the agent knows: `envpool.make_gymnasium(agent.env_id, **...)`."""
        config = self.config
        return self.spec.game_settings(training=False, sticky_actions=config.sticky_actions, max_episode_steps=config.max_episode_steps)

    def act(self, observations: Any, done: Any = None) -> Any:
        """Actions for observations that follow those of the last call; an int for a single one, else [N] int64.

        observations: one, or [N, ...], of single frames: pixels are uint8, `frame_shape` C x H x W or H x W x C, gray ones also H x W;
            vectors have D numbers; discrete ones are integers.
        done: [N] bool, terminated | truncated as they came with these observations, for environments that reset at the step after (EnvPool,
            Gymnasium's default for vectors): the next observation of such a lane begins an episode. Where you reset by yourself,
            or environments reset in the step that ends the episode, call `reset` instead.

        Raises:
            ValueError: the observations are of another shape or kind, or of other lanes than before.
        """
        result, _, single = self._find(observations, done, keep_tree=False)
        action = choose_best(self.config, result).cpu().numpy()
        return int(action[0]) if single else action

    def search(self, observations: Any, done: Any = None) -> Search:
        """What `act` does, and all that the search found; takes the observations in, too: call one or the other for an observation."""
        result, value, single = self._find(observations, done, keep_tree=True)
        trees = result.tree
        q = torch.where(trees.child_visits[:, 0] > 0, trees.child_q[:, 0], torch.nan).float()
        fields = (choose_best(self.config, result), result.policy, result.value, value.float(), result.visits, trees.prior[:, 0].float(), q)
        arrays = [field.cpu().numpy() for field in fields]
        found = [tree_of(trees, lane) for lane in range(trees.roots)]
        if not single:
            return Search(*arrays, found)
        action, policy, mean, own, *rest = (array[0] for array in arrays)
        return Search(int(action), policy, float(mean), float(own), *rest, found[0])

    def reset(self, lanes: Any = None) -> None:
        """Let the next observation begin an episode: of all environments, however many come then, or of lanes [N] bool."""
        if lanes is None:
            self._memory = self._begins = None
        elif self._begins is not None:
            self._begins |= self._lanes("lanes", lanes)

    def _find(self, observations: Any, done: Any, keep_tree: bool) -> tuple[SearchResult, torch.Tensor, bool]:
        """What a search of observations found, the network's values [N], and whether it was a single observation."""
        frames, single = _frames(observations, self.spec)
        index, memory = self._remember(frames, done), self._memory
        stacked = gather(memory.frames, memory.first, index, self.config.frame_stack, **self.snapshot.input_format)
        return *search_observations(self.snapshot, stacked, self.config, noise=None, keep_tree=keep_tree), single

    def _remember(self, frames: torch.Tensor, done: Any) -> torch.Tensor:
        """Push frames [N, C, H, W]; returns where the newest lie."""
        count, stack = frames.shape[0], self.config.frame_stack
        if self._memory is None:
            self._memory = Frames(
                torch.zeros(count, stack, *frames.shape[1:], dtype=frames.dtype, device=self.device),
                torch.zeros(count, stack, dtype=torch.bool, device=self.device),
            )
            self._begins = torch.ones(count, dtype=torch.bool)
        if count != self._begins.shape[0]:
            raise ValueError(f"observations: {count} after {len(self._begins)} in the last call; give as many, or call agent.reset() first")
        ended = torch.zeros(count, dtype=torch.bool) if done is None else self._lanes("done", done)
        index = self._memory.push(Inbox(frames, reward=ended, done=ended, first=self._begins))
        self._begins = ended
        return index

    def _lanes(self, name: str, flags: Any) -> torch.Tensor:
        """Flags of all lanes [N] bool."""
        given = torch.as_tensor(np.asarray(flags)).reshape(-1)
        if given.dtype != torch.bool or given.shape != self._begins.shape:
            raise ValueError(f"{name}: want {self._begins.shape[0]} flags of type bool, got {given.dtype} {list(np.shape(flags))}")
        return given.clone()


def _frames(observations: Any, spec: EnvSpec) -> tuple[torch.Tensor, bool]:
    """Observations as frames [N, C, H, W], and whether it was a single one. What can be read as either is a vector of one environment."""
    given = np.asarray(observations)
    channels, height, width = spec.frame_shape
    vector = height == width == 1
    if vector and given.dtype.kind in "iu" and given.ndim <= 1:  # discrete observations
        if given.size and not 0 <= int(given.min()) <= int(given.max()) < channels:
            raise ValueError(f"observations: {given.tolist()} among discrete ones of 0 to {channels - 1}")
        given, single = np.eye(channels, dtype=np.float32)[given.reshape(-1)], given.ndim == 0
    else:
        shapes = [(channels,), spec.frame_shape] if vector else [(channels, height, width), (height, width, channels)]
        shapes += [(height, width)] if channels == 1 and not vector else []
        many = next((shape for shape in shapes if given.ndim == len(shape) + 1 and given.shape[1:] == shape), None)
        single = many is None
        shape = many or next((shape for shape in shapes if given.shape == shape), None)
        wanted = np.dtype(np.uint8 if spec.image else np.float32)
        if shape is None or not given.size:
            says = " or ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys(shapes))
            raise ValueError(f"observations: have shape {list(given.shape)}; the agent sees single frames of {says}, or N of them; see "
                             "agent.env_settings, and leave out wrappers that stack")  # fmt: skip
        if (given.dtype == np.uint8) != spec.image or given.dtype.kind not in "iufb":
            raise ValueError(f"observations: are {given.dtype}; the agent knows {wanted}")
        given = given.astype(wanted, copy=False).reshape(-1, *shape)
        if not vector and shape == (height, width, channels) != (channels, height, width):
            given = given.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(given)).reshape(-1, *spec.frame_shape), single


def load(path: str | Path, checkpoint: str = "newest", device: str = "auto") -> Agent:
    """The agent of a run's folder, or of a file that `python -m speedyzero.export` wrote. Runs no code of theirs.

    checkpoint: of a run: newest, best, or a file, by its path or by its name in the run's folder of checkpoints.
    device: auto (cuda if there is one), cpu or cuda. On CUDA the network runs in bf16; on a CPU in fp32, or in bf16 if the run did and the
        CPU has bf16 instructions.

    Raises:
        ConfigError, EnvError, CheckpointError: ValueErrors of one line: nothing there, damaged, foreign, or no such device.
    """
    path, where = Path(path), pick_device(device)
    if path.is_file() or path.suffix == ".safetensors":
        if checkpoint != "newest":
            raise ConfigError(f"--checkpoint {checkpoint}: {path} is a file and holds one agent; leave it out, or give a run's folder")
        saved = agent_file.read(path)
        snapshot = _snapshot(saved.config, saved.spec, where)
        with torch.no_grad():
            for name, tensor in snapshot.state_dict().items():
                tensor.copy_(saved.tensors[name])
        return Agent(snapshot, saved.config, saved.spec, path, saved.env_steps, saved.updates, saved.scores)
    run = read_run(path, checkpoint)
    snapshot = _snapshot(run.config, run.spec, where)
    fold(make_trained_network(run, where), snapshot)
    steps, updates = (run.meta.get(name) for name in ("env_steps", "updates"))
    return Agent(snapshot, run.config, run.spec, run.path, steps, updates, read_scores(path, steps, updates))


def _snapshot(config: Config, spec: EnvSpec, device: torch.device) -> Network:
    """An empty snapshot of the precision that `load` describes."""
    bf16 = config.amp and (device.type == "cuda" or has_fast_bf16())
    return make_snapshot(network_spec(config, spec.frame_shape, spec.num_actions), device, bf16)
