"""Every setting, its default and the range it must lie in, in groups.

Each field is a flag of the command line under the heading of its group; `config.Config` is all groups together.
Sources of the defaults, which are those of the `efficientzero` preset: EfficientZero (Ye et al., NeurIPS 2021), appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from speedyzero.search import SearchConfig
from speedyzero_kernels.tree import MAX_SIMULATIONS


class Range(NamedTuple):
    """The values that a setting may take: `low` to `high`, without `low` itself if `open`.

    Above `high` a setting can only be a slip, and what comes of it is not an error message. The default is such that no product of two
    whole numbers leaves int64 and no fraction leaves fp32.
    """

    low: int
    high: float
    open: bool = False

    def fault(self, value: float) -> str | None:
        """What is wrong with a value, if anything."""
        if (self.low, self.high) == (0, 1):
            return None if 0 <= value <= 1 else "must lie between 0 and 1"
        if value > self.high:
            return f"must be at most {self.high}"
        if self.open or self.low == 1:
            return None if value > 0 else "must be greater than 0"
        return None if value >= self.low else "must not be negative"


Count = Annotated[int, Range(1, 10**9)]
Whole = Annotated[int, Range(0, 10**9)]
Positive = Annotated[float, Range(0, 1e30, open=True)]
NotNegative = Annotated[float, Range(0, 1e30)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class RunSettings:
    """What is run, where, and for how long."""

    env: str = "Pong-v5"
    """EnvPool id of an environment with discrete actions, as Pong-v5, Catch-v0 or CartPole-v1."""
    preset: Literal["auto", "efficientzero", "speedyzero", "cpu-atari", "cpu", "smoke"] = "auto"
    """Set of defaults for all other flags; auto: efficientzero on CUDA, else cpu-atari on Atari and cpu on all other environments."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the network, the search noise, the sampling and the emulators."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything but the emulators runs; auto: cuda if there is one."""
    threads: Annotated[int, Range(1, 1024)] | None = None
    """PyTorch's CPU threads; default: all cores for cpu-atari, else 1, as very small networks gain nothing from a second. Another number
    may round differently."""
    graph: Literal["auto", "on", "split", "off"] = "auto"
    """Capture each iteration in a CUDA graph and replay it; auto: on, if on CUDA. split: in two graphs, and the main thread steps the
    emulators beside the second, for drivers that run no kernels while a graph calls the host. off: run it as it is, to debug. The numbers
    are the same."""
    deterministic: bool = False
    """Refuse whatever PyTorch does not promise to repeat bit for bit; only CUDA has any, and it may be slower."""
    watchdog: Annotated[float, Range(0, 1e9, open=True)] = 300.0
    """Seconds after which an iteration counts as stuck and the run is ended."""
    run_dir: Path | None = None
    """Folder of this run; default: runs/ENV_PRESET_seedSEED."""
    resume: bool = False
    """Go on with the run in --run-dir from its newest checkpoint, with the settings of its config.json."""
    env_steps: Count = 100_000
    """Environment steps (agent decisions) to take in all; on Atari a step is four frames."""


@dataclass(frozen=True)
class EmulatorSettings:
    """The environments, and what the agent sees of them."""

    lanes: Annotated[int, Range(1, 65_536)] = 8
    """Environments stepped side by side."""
    env_threads: Annotated[int, Range(1, 1024)] | None = None
    """Threads of EnvPool; default: as many as there are cores, at most one a lane."""
    frame_size: int | None = None
    """Atari only: side of the square frame in pixels, 32 to 256; default: 96."""
    gray: bool | None = None
    """Atari only: frames of one channel in the place of RGB; default: RGB."""
    frame_stack: Annotated[int, Range(1, 64)] | None = None
    """Frames in an observation; default: 4 for pixels, 1 otherwise."""
    normalize_frames: bool = False
    """Pixels only: normalise each by its mean and spread over the random start, so that what never moves does not drown what does."""
    clip_reward: bool | None = None
    """Train on the sign of the reward; default: on for Atari only."""
    max_episode_steps: Count | None = None
    """Time limit in steps; default: 27000 on Atari (108k frames), else the environment's own."""
    sticky_actions: Annotated[float, Range(0, 1)] = 0.0
    """Atari only: chance that an emulator repeats its last action for a frame in the place of the chosen one; 0.25 is the protocol of
    Machado et al. (2018), 0 that of Atari-100k."""


@dataclass(frozen=True)
class RingSettings:
    """The replay ring."""

    ring_positions: Annotated[int, Range(1, 10**12)] = 100_000
    """Positions that the replay ring holds, over all lanes."""
    start_transitions: Count = 2_000
    """Random transitions before training starts."""


@dataclass(frozen=True)
class SearchSettings:
    """The tree search, and how it explores."""

    search: Literal["puct", "gumbel"] = "puct"
    """Tree search: pUCT as in EfficientZero, or Gumbel MuZero (Danihelka et al., ICLR 2022)."""
    simulations: Annotated[int, Range(1, MAX_SIMULATIONS)] | None = None
    """Simulations of a search; default: 50 for puct, 16 for gumbel."""
    discount: Share = 0.997**4
    """Discount of one environment step."""
    c_base: Positive = 19652.0
    """pUCT: base of the exploration rate's logarithm."""
    c_init: NotNegative = 1.25
    """pUCT: exploration rate at few visits."""
    value_delta_min: Positive | None = None
    """Least range of Q by which Q are normalised: the smaller, the more a search trusts small differences; default: 0.01 for puct,
    1e-8 for gumbel."""
    noise_fraction: Share = 0.25
    """pUCT: share of Dirichlet noise in the root prior."""
    dirichlet_alpha: Positive = 0.3
    """pUCT: concentration of the Dirichlet noise."""
    lstm_horizon: Count = 5
    """Steps after which the value prefix and its LSTM state start again from zero."""
    max_considered_actions: Count = 16
    """gumbel: root actions of the sequential halving."""
    c_visit: NotNegative = 50.0
    """gumbel: visits added to the greatest visit count when Q is scaled."""
    c_scale: NotNegative = 0.1
    """gumbel: scale of Q against the logits."""
    temperatures: tuple[Positive, Positive, Positive] = (1.0, 0.5, 0.25)
    """puct: temperature of the acting distribution from 0, 50 and 75 percent of the training on."""

    def search_config(self) -> SearchConfig:
        """The settings of the tree search."""
        return SearchConfig(
            kind=self.search,
            num_simulations=self.simulations,
            discount=self.discount,
            c_base=self.c_base,
            c_init=self.c_init,
            value_delta_min=self.value_delta_min,
            noise_fraction=self.noise_fraction,
            lstm_horizon=self.lstm_horizon,
            max_considered_actions=self.max_considered_actions,
            c_visit=self.c_visit,
            c_scale=self.c_scale,
        )


@dataclass(frozen=True)
class RefreshSettings:
    """What is searched again, and what targets bootstrap from."""

    refresh: Literal["sweep", "sampled"] = "sweep"
    """Positions searched again: all of the ring, oldest refresh first, or exactly the windows of the next batches."""
    refresh_roots: Count = 4096
    """Positions that a sweep searches in an iteration once the ring is full; fewer while it fills."""
    refresh_values: Whole = 0
    """Positions whose value and priority alone are brought up to the network in an iteration, by a second sweep without searches. A target
    bootstraps from such a value: where --refresh-roots is small beside the ring, values need it to spread."""
    priority_refresh: bool = True
    """SpeedyZero's Priority Refresh: what is searched again, or whose value is, also gets a priority from the present snapshot. Without,
    a position has the priority that the last update which drew it gave it."""
    bootstrap: Literal["network", "root"] = "network"
    """Value that bootstraps the n-step target: the snapshot's, or the root value of the search."""


@dataclass(frozen=True)
class LearnSettings:
    """The updates: how many, of what, and the optimiser."""

    updates_per_iteration: Count = 8
    """Updates of the network for each step of the lanes."""
    final_updates: Whole = 20_000
    """Updates after the last environment step."""
    batch_size: Annotated[int, Range(1, 65_536)] = 256
    """Windows of an update."""
    unroll: Annotated[int, Range(1, 256)] = 5
    """Steps the model is unrolled in training."""
    n_step: Annotated[int, Range(1, 256)] = 5
    """Longest n of the n-step value target; it shrinks with the age of the position."""
    n_step_age: Annotated[float, Range(0, 1e6, open=True)] = 0.3
    """Share of --env-steps after which a position's n is one less."""
    amp: bool | None = None
    """Learn in bf16 mixed precision (the weights stay fp32); default: on CUDA, and for cpu-atari where the CPU has bf16 instructions."""
    optimizer: Literal["sgd", "clipped-lars"] = "sgd"
    """SGD with momentum, or SpeedyZero's Clipped LARS."""
    lr: Positive = 0.2
    """Learning rate after the warm-up."""
    lr_warmup: Share = 0.01
    """Share of the planned updates over which the learning rate rises from 0."""
    lr_decay: Share = 0.1
    """Factor on the learning rate once the planned updates are done."""
    momentum: Share = 0.9
    """Momentum of SGD and of Clipped LARS."""
    weight_decay: NotNegative = 1e-4
    """L2 weight decay."""
    max_grad_norm: Positive = 5.0
    """Bound on the norm of the gradient."""
    max_skipped: Count = 100
    """Updates in a row that may be skipped, their loss or gradient not being finite, before the run stops."""
    trust_coefficient: Positive = 0.02
    """clipped-lars: eta, the step of a layer relative to its norm. The last layers, which start at zero, do not take it."""
    trust_clip: Positive = 1.0
    """clipped-lars: upper bound of a layer's rate; at 1 no layer steps further than SGD would, at 1e30 it is LARS without the clip."""
    prefix_weight: NotNegative = 1.0
    """Weight of the value-prefix loss."""
    value_weight: NotNegative = 0.25
    """Weight of the value loss."""
    policy_weight: NotNegative = 1.0
    """Weight of the policy loss."""
    consistency_weight: NotNegative = 2.0
    """Weight of the self-supervised consistency loss."""
    consistency_steps: Count | None = None
    """How many steps of an unroll the consistency loss compares in an update, all taking their turn; default: all. Fewer save passes."""
    priority_alpha: NotNegative = 0.6
    """Exponent of the priorities in sampling; 0: uniform."""
    priority_beta: Share = 0.4
    """Exponent of the importance weights at the start; it rises to 1 over the planned updates."""
    augment: bool | None = None
    """Random shifts and intensity on both branches; default: on for pixels only."""
    shift: Whole = 4
    """Greatest random shift, in pixels."""
    intensity: NotNegative = 0.05
    """Scale of the random intensity."""
    snapshot_interval: Count = 100
    """Updates between two copies of the network for search, acting and bootstrap values."""


@dataclass(frozen=True)
class NetworkSettings:
    """The sizes of the network."""

    representation: Literal["efficientzero", "compact"] = "efficientzero"
    """How a large frame becomes a latent. compact: begins with a 7x7 convolution of stride 4 and ends at an eighth of
    the side; for small gray frames."""
    action_encoding: Literal["scalar", "one-hot"] = "scalar"
    """How the dynamics reads an action: a plane of action / A, as EfficientZero, or a plane for each action, far easier to learn."""
    channels: Annotated[int, Range(1, 4096)] = 64
    """Channels of the latent state."""
    stem_channels: Annotated[int, Range(1, 4096)] = 32
    """Channels of the first convolution on large frames."""
    head_channels: Annotated[int, Range(1, 4096)] = 16
    """Channels of the 1x1 convolution in front of each head."""
    head_hidden: Annotated[int, Range(1, 65_536)] = 32
    """Width of the hidden layer of each head."""
    lstm: Annotated[int, Range(1, 65_536)] = 512
    """Units of the value-prefix LSTM."""
    support: Annotated[int, Range(1, 65_536)] = 300
    """Scalars are categorical on -support..support after the transform h."""
    projection: Annotated[int, Range(1, 65_536)] = 1024
    """Width of the consistency projection; its predictor is half as wide."""


@dataclass(frozen=True)
class RecordSettings:
    """The evaluation at the end, the log and the checkpoints."""

    eval_episodes: Annotated[int, Range(1, 65_536)] = 32
    """Games of the evaluation at the end."""
    eval_max_steps: Count | None = None
    """Longest game of an evaluation in steps; default: --max-episode-steps, or else 27000."""
    log_interval: Count = 25
    """Iterations between two rows of metrics."""
    checkpoint_interval: Count = 1_000
    """Iterations between two checkpoints; there is always one at the end."""
    keep: Count = 2
    """Checkpoints kept, the newest; besides them best.safetensors, that of the best games so far."""
    checkpoint_ring: bool = True
    """Keep the frames of the ring with the checkpoints, compressed; without them --resume makes them again by replaying the emulators."""
    track: bool = False
    """Send the rows of metrics and the scores to Weights & Biases as well; needs `pip install wandb`."""
    wandb_project_name: str = "speedyzero"
    """Project of Weights & Biases."""
    wandb_entity: str | None = None
    """Team or user of Weights & Biases; default: the one that is logged in."""
