"""Every hyperparameter and its default: one flat dataclass that is also the command line, and the presets.

Sources of the `efficientzero` values: EfficientZero (Ye et al., NeurIPS 2021), appendix A.1; of `speedyzero`: SpeedyZero
(ICLR 2023) for the sample count, the large batch and Clipped LARS.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from speedyzero.envs import FRAME_SIZE, frame_fault, sticky_fault
from speedyzero.processor import has_fast_bf16, usable_cores
from speedyzero.search import LEAST_RANGE, SearchConfig
from speedyzero_kernels.tree import MAX_SIMULATIONS

# Steps of the longest game of an evaluation: Atari's 108k frames.
LONGEST_GAME = 27_000

# Above these a setting can only be a slip, and what comes of it is not an error message.
AT_MOST = {
    "threads": 1024, "env_threads": 1024, "lanes": 65_536, "simulations": MAX_SIMULATIONS, "eval_episodes": 65_536, "batch_size": 65_536,
    "channels": 4096, "stem_channels": 4096, "head_channels": 4096, "head_hidden": 65_536, "lstm": 65_536, "support": 65_536,
    "projection": 65_536, "unroll": 256, "n_step": 256, "frame_stack": 64, "seed": 2**31 - 1, "watchdog": 10**9, "n_step_age": 10**6,
    "ring_positions": 10**12,
}  # fmt: skip
# Fields that the config.json of an older run lacks; their defaults are what such a run did.
NEWER = {"sticky_actions"}
# All others: so that no product of two leaves int64, and no fraction fp32.
MOST = 10**9
GREATEST = 1e30


def short_repr(value: object) -> str:
    """A value that a file holds, for a message: on one line, printable, and short however long or deep it is."""
    plain = isinstance(value, str) and value.isprintable() and 0 < len(value) <= 80
    return value if plain else reprlib.repr(value)


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that names the flag and the mend."""


@dataclass(frozen=True)
class Config:
    """Train an EfficientZero agent. Every flag below can be given on top of a preset; --dry-run prints what memory a run would take."""

    env: str = "Pong-v5"
    """EnvPool id of an environment with discrete actions, as Pong-v5, Catch-v0 or CartPole-v1."""
    preset: Literal["auto", "efficientzero", "speedyzero", "cpu-atari", "cpu", "smoke"] = "auto"
    """Set of defaults for all other flags; auto: efficientzero on CUDA, else cpu-atari on Atari and cpu on all other environments."""
    seed: int = 0
    """Seed of the network, the search noise, the sampling and the emulators."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything but the emulators runs; auto: cuda if there is one."""
    threads: int | None = None
    """PyTorch's CPU threads; default: all cores for cpu-atari, else 1, as very small networks gain nothing from a second. Another number
    may round differently."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Capture each iteration in a CUDA graph and replay it; auto: on CUDA. off: run it as it is, to debug; the numbers are the same."""
    deterministic: bool = False
    """Refuse whatever PyTorch does not promise to repeat bit for bit; only CUDA has any, and it may be slower."""
    watchdog: float = 300.0
    """Seconds after which an iteration counts as stuck and the run is ended."""
    run_dir: Path | None = None
    """Folder of this run; default: runs/ENV_PRESET_seedSEED."""
    resume: bool = False
    """Go on with the run in --run-dir from its newest checkpoint, with the settings of its config.json."""
    env_steps: int = 100_000
    """Environment steps (agent decisions) to take in all; on Atari a step is four frames."""

    # emulators
    lanes: int = 8
    """Environments stepped side by side (N)."""
    env_threads: int | None = None
    """Threads of EnvPool; default: as many as there are cores, at most one a lane."""
    frame_size: int | None = None
    """Atari only: side of the square frame in pixels, 32 to 256; default: 96."""
    gray: bool | None = None
    """Atari only: frames of one channel in the place of RGB; default: RGB."""
    frame_stack: int | None = None
    """Frames in an observation; default: 4 for pixels, 1 otherwise."""
    normalize_frames: bool = False
    """Pixels only: normalise each by its mean and spread over the random start, so that what never moves does not drown what does."""
    clip_reward: bool | None = None
    """Train on the sign of the reward; default: on for Atari only."""
    max_episode_steps: int | None = None
    """Time limit in steps; default: 27000 on Atari (108k frames), else the environment's own."""
    sticky_actions: float = 0.0
    """Atari only: chance that an emulator repeats its last action for a frame in the place of the chosen one; 0.25 is the protocol of
    Machado et al. (2018), 0 that of Atari-100k."""

    # ring
    ring_positions: int = 100_000
    """Positions that the replay ring holds, over all lanes."""
    start_transitions: int = 2_000
    """Random transitions before training starts."""

    # search
    search: Literal["puct", "gumbel"] = "puct"
    """Tree search: pUCT as in EfficientZero, or Gumbel MuZero (Danihelka et al., ICLR 2022)."""
    simulations: int | None = None
    """Simulations of a search (S); default: 50 for puct, 16 for gumbel."""
    discount: float = 0.997**4
    """Discount of one environment step."""
    c_base: float = 19652.0
    """pUCT: base of the exploration rate's logarithm."""
    c_init: float = 1.25
    """pUCT: exploration rate at few visits."""
    value_delta_min: float | None = None
    """Least range of Q by which Q are normalised: the smaller, the more a search trusts small differences; default: 0.01 for puct,
    1e-8 for gumbel."""
    noise_fraction: float = 0.25
    """pUCT: share of Dirichlet noise in the root prior."""
    dirichlet_alpha: float = 0.3
    """pUCT: concentration of the Dirichlet noise."""
    lstm_horizon: int = 5
    """Steps after which the value prefix and its LSTM state start anew."""
    max_considered_actions: int = 16
    """gumbel: root actions of the sequential halving."""
    c_visit: float = 50.0
    """gumbel: visits added to the greatest visit count when Q is scaled."""
    c_scale: float = 0.1
    """gumbel: scale of Q against the logits."""
    temperatures: tuple[float, float, float] = (1.0, 0.5, 0.25)
    """puct: temperature of the acting distribution from 0, 50 and 75 percent of the training on."""

    # refresh
    refresh: Literal["sweep", "sampled"] = "sweep"
    """Positions searched anew: the whole ring, oldest refresh first, or exactly the windows of the next batches."""
    refresh_roots: int = 4096
    """Positions that a sweep searches anew in an iteration (R) once the ring is full; fewer while it fills."""
    refresh_values: int = 0
    """Positions whose value and priority alone are brought up to the network in an iteration, by a second sweep without searches. A target
    bootstraps from such a value: where R is small beside the ring, values need it to spread."""
    bootstrap: Literal["network", "root"] = "network"
    """Value that bootstraps the n-step target: the snapshot's, or the root value of the search."""

    # learn
    updates_per_iteration: int = 8
    """Updates of the network for each step of the lanes (U)."""
    final_updates: int = 20_000
    """Updates after the last environment step."""
    batch_size: int = 256
    """Windows of an update (B)."""
    unroll: int = 5
    """Steps the model is unrolled in training (K)."""
    n_step: int = 5
    """Longest n of the n-step value target; it shrinks with the age of the position."""
    n_step_age: float = 0.3
    """Share of --env-steps after which a position's n is one less."""
    amp: bool | None = None
    """Learn in bf16 mixed precision (the weights stay fp32); default: on CUDA, and for cpu-atari where the CPU has bf16 instructions."""
    optimizer: Literal["sgd", "clipped-lars"] = "sgd"
    """SGD with momentum, or SpeedyZero's Clipped LARS."""
    lr: float = 0.2
    """Learning rate after the warm-up."""
    lr_warmup: float = 0.01
    """Share of the planned updates over which the learning rate rises from 0."""
    lr_decay: float = 0.1
    """Factor on the learning rate once the planned updates are done."""
    momentum: float = 0.9
    """Momentum of SGD and of Clipped LARS."""
    weight_decay: float = 1e-4
    """L2 weight decay."""
    max_grad_norm: float = 5.0
    """Bound on the norm of the whole gradient."""
    max_skipped: int = 100
    """Updates in a row that may be skipped, their loss or gradient not being finite, before the run stops."""
    trust_coefficient: float = 0.02
    """clipped-lars: eta, the step of a layer relative to its norm."""
    trust_clip: float = 1.0
    """clipped-lars: upper bound of a layer's rate; at 1 no layer steps further than SGD would."""
    prefix_weight: float = 1.0
    """Weight of the value-prefix loss."""
    value_weight: float = 0.25
    """Weight of the value loss."""
    policy_weight: float = 1.0
    """Weight of the policy loss."""
    consistency_weight: float = 2.0
    """Weight of the self-supervised consistency loss."""
    consistency_steps: int | None = None
    """Steps of an unroll, drawn at random for each update, that the consistency loss compares; default: all. Fewer save forward passes."""
    priority_alpha: float = 0.6
    """Exponent of the priorities in sampling; 0: uniform."""
    priority_beta: float = 0.4
    """Exponent of the importance weights at the start; it rises to 1 over the planned updates."""
    augment: bool | None = None
    """Random shifts and intensity on both branches; default: on for pixels only."""
    shift: int = 4
    """Greatest random shift, in pixels."""
    intensity: float = 0.05
    """Scale of the random intensity."""
    snapshot_interval: int = 100
    """Updates between two copies of the network for search, acting and bootstrap values."""

    # network
    representation: Literal["efficientzero", "compact"] = "efficientzero"
    """How a large frame becomes a latent. compact: begins with a 7x7 convolution of stride 4 and ends at an eighth of
    the side; for small gray frames."""
    action_encoding: Literal["scalar", "one-hot"] = "scalar"
    """How the dynamics reads an action: a plane of action / A, as EfficientZero, or a plane for each action, far easier to learn."""
    channels: int = 64
    """Channels of the latent state."""
    stem_channels: int = 32
    """Channels of the first convolution on large frames."""
    head_channels: int = 16
    """Channels of the 1x1 convolution in front of each head."""
    head_hidden: int = 32
    """Width of the hidden layer of each head."""
    lstm: int = 512
    """Units of the value-prefix LSTM."""
    support: int = 300
    """Scalars are categorical on -support..support after the transform h."""
    projection: int = 1024
    """Width of the consistency projection; its predictor is half as wide."""

    # evaluation and records
    eval_episodes: int = 32
    """Games of the evaluation at the end."""
    eval_max_steps: int | None = None
    """Longest game of an evaluation in steps; default: --max-episode-steps, or else 27000."""
    log_interval: int = 25
    """Iterations between two rows of metrics."""
    checkpoint_interval: int = 1_000
    """Iterations between two checkpoints; there is always one at the end."""
    keep: int = 2
    """Checkpoints kept, the newest; besides them best.safetensors, that of the best games so far."""
    checkpoint_ring: bool = True
    """Keep the frames of the ring with the checkpoints, compressed; without them --resume makes them anew by replaying the emulators."""

    @property
    def planned_updates(self) -> int:
        """Updates that go with all environment steps: the horizon of every schedule."""
        return self.env_steps * self.updates_per_iteration // self.lanes

    @property
    def total_updates(self) -> int:
        """Updates after which the run ends."""
        return self.planned_updates + self.final_updates

    @property
    def slots(self) -> int:
        """Slots of a lane of the ring (T)."""
        return -(-self.ring_positions // self.lanes)

    @property
    def window(self) -> int:
        """Slots that the targets of one sampled position read: K + n + 1."""
        return self.unroll + self.n_step + 1

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

    def to_json(self) -> dict:
        """All fields as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def _fits(value: object, expected: object) -> bool:
    """Whether a JSON value is of a field's type; a whole number that a float holds is one too, a bool is no number."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return value in inner and isinstance(value, str)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
    if inner:
        return any(_fits(value, choice) for choice in inner)
    if expected is float:
        return type(value) is float or (type(value) is int and abs(value) <= 2**53)
    return type(value) is (str if expected is Path else expected)


def from_json(fields: object, source: Path) -> Config:
    """A `Config` from what `to_json` gave.

    Raises:
        ConfigError: a field that is unknown, missing or of the wrong type; the line names `source`.
    """
    mend = "start anew with another --run-dir"
    types = typing.get_type_hints(Config)
    if isinstance(fields, dict):
        fields = {field.name: field.default for field in dataclasses.fields(Config) if field.name in NEWER} | fields
    if not isinstance(fields, dict) or set(fields) != set(types):
        names = sorted(set(fields) ^ set(types)) if isinstance(fields, dict) else ["not an object"]
        odd = ", ".join(map(short_repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ConfigError(f"{source}: not a config of this version of speedyzero ({odd}); {mend}")
    for name, value in fields.items():
        if not _fits(value, types[name]):
            raise ConfigError(f"{source}: {name} is {reprlib.repr(value)}; {mend}")
    values = {name: float(value) if types[name] in (float, float | None) and value is not None else value for name, value in fields.items()}
    values["temperatures"] = tuple(map(float, fields["temperatures"]))
    if values["run_dir"] is not None:
        values["run_dir"] = Path(values["run_dir"])
    return Config(**values)


PRESETS: dict[str, dict] = {
    "efficientzero": {},
    "speedyzero": {
        "env_steps": 300_000,
        "lanes": 32,
        "start_transitions": 4_000,
        "updates_per_iteration": 4,
        "batch_size": 2048,
        "refresh_roots": 16_384,
        "optimizer": "clipped-lars",
        "final_updates": 5_000,
        "snapshot_interval": 25,
    },
    # For an evening on two cores: small gray frames whose pixels are normalised, few channels on a latent that is large enough to tell
    # where a ball will meet a paddle, a plane for each action, a Gumbel search that acts well on 16 simulations, few steps compared, and a
    # short ring that the searches go round every 400 updates: how often a policy is improved is what limits a run of hours. The larger
    # least range of Q keeps the search from making a policy of the noise of an untrained value.
    "cpu-atari": {
        "env_steps": 100_000,
        "frame_size": 64,
        "gray": True,
        "normalize_frames": True,
        "augment": False,
        "ring_positions": 25_000,
        "search": "gumbel",
        "simulations": 16,
        "value_delta_min": 0.5,
        "refresh_roots": 256,
        "refresh_values": 1024,
        "updates_per_iteration": 4,
        "batch_size": 128,
        "final_updates": 2_000,
        "consistency_steps": 2,
        "lr": 0.6,
        "snapshot_interval": 50,
        "representation": "compact",
        "action_encoding": "one-hot",
        "channels": 32,
        "stem_channels": 32,
        "lstm": 128,
        "support": 30,
        "projection": 256,
        "checkpoint_interval": 500,
    },
    # A run of minutes has no thousand updates to warm up in. The last layers start at zero and the first gradients into them are large:
    # a long warm-up and a tight bound on the gradient learned the rewards of Catch several times faster than EfficientZero's values.
    "cpu": {
        "env_steps": 9_000,
        "lanes": 8,
        "simulations": 12,
        "start_transitions": 500,
        "ring_positions": 20_000,
        "refresh_roots": 128,
        "updates_per_iteration": 1,
        "final_updates": 250,
        "batch_size": 32,
        "unroll": 3,
        "n_step": 3,
        "lr": 1.0,
        "lr_warmup": 0.1,
        "max_grad_norm": 0.3,
        "snapshot_interval": 20,
        "channels": 16,
        "stem_channels": 8,
        "head_channels": 8,
        "lstm": 64,
        "support": 30,
        "projection": 128,
        "checkpoint_interval": 500,
    },
}
PRESETS["smoke"] = PRESETS["cpu"] | {
    "env_steps": 400,
    "start_transitions": 200,
    "ring_positions": 1_000,
    "refresh_roots": 64,
    "simulations": 4,
    "final_updates": 10,
    "batch_size": 16,
    "snapshot_interval": 10,
    "eval_episodes": 2,
    "eval_max_steps": 200,
    "log_interval": 10,
    "checkpoint_interval": 100,
}


def pick_device(device: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ConfigError: `cuda` where PyTorch sees no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or install a CUDA build of torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def pick_preset(preset: str, device: torch.device, atari: bool) -> str:
    """The preset that `auto` stands for on a device and a family of environments; others stand for themselves."""
    if preset != "auto":
        return preset
    if device.type == "cuda":
        return "efficientzero"
    return "cpu-atari" if atari else "cpu"


def preset_config(preset: str) -> Config:
    """The defaults of a preset."""
    return Config(preset=preset, **PRESETS[preset])


def resolve(config: Config, *, image: bool, atari: bool) -> Config:
    """Fill what depends on the environment or on other flags, and check that the flags go together.

    Raises:
        ConfigError: an impossible value or combination; the line names the flags.
    """
    if fault := frame_fault(config.env, atari, config.frame_size, config.gray):
        raise ConfigError(fault)
    if fault := sticky_fault(config.env, atari, config.sticky_actions):
        raise ConfigError(fault)
    if config.normalize_frames and not image:
        raise ConfigError(f"--normalize-frames True: {config.env} shows no pixels; leave it out")
    heavy = config.preset == "cpu-atari"
    fill = {
        "simulations": 50 if config.search == "puct" else 16,
        "frame_size": FRAME_SIZE if atari else None,
        "gray": False if atari else None,
        "value_delta_min": LEAST_RANGE[config.search],
        "frame_stack": 4 if image else 1,
        "clip_reward": atari,
        "augment": image,
        "amp": config.device == "cuda" or (heavy and has_fast_bf16()),
        "threads": usable_cores() if heavy else 1,
        "run_dir": Path("runs") / f"{config.env.replace('/', '_')}_{config.preset}_seed{config.seed}",
        "eval_max_steps": config.max_episode_steps or LONGEST_GAME,
    }
    config = dataclasses.replace(config, **{name: value for name, value in fill.items() if getattr(config, name) is None})
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError on the first impossible value or combination of a resolved config."""

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    depends = "simulations value_delta_min frame_stack clip_reward augment amp threads run_dir eval_max_steps"
    for name in depends.split():
        if getattr(config, name) is None:
            raise ConfigError(f"{flag(name)}: is not set, though it depends on the environment alone")
    positive = (
        "env_steps lanes frame_stack ring_positions start_transitions simulations c_base dirichlet_alpha lstm_horizon "
        "max_considered_actions refresh_roots updates_per_iteration batch_size unroll n_step n_step_age lr snapshot_interval "
        "channels stem_channels head_channels head_hidden lstm support projection eval_episodes log_interval "
        "checkpoint_interval keep threads env_threads max_episode_steps eval_max_steps value_delta_min max_grad_norm "
        "trust_coefficient trust_clip watchdog max_skipped consistency_steps"
    )
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{flag(name)} {value}: must be greater than 0")
    not_negative = (
        "seed final_updates refresh_values c_init c_visit c_scale shift intensity weight_decay priority_alpha prefix_weight value_weight "
        "policy_weight consistency_weight"
    )
    for name in not_negative.split():
        if not 0 <= getattr(config, name) < float("inf"):
            raise ConfigError(f"{flag(name)} {getattr(config, name)}: must not be negative")
    for name in ("discount", "noise_fraction", "momentum", "lr_warmup", "lr_decay", "priority_beta"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{flag(name)} {getattr(config, name)}: must lie between 0 and 1")
    if not all(0 < value < float("inf") for value in config.temperatures):
        raise ConfigError(f"--temperatures {config.temperatures}: must be greater than 0")
    if short_repr(config.env) is not config.env:
        raise ConfigError(f"--env {short_repr(config.env)}: not an EnvPool id")
    # Whether it is an Atari game is not known here: `describe` refuses them for others.
    if fault := frame_fault(config.env, True, config.frame_size, config.gray) or sticky_fault(config.env, True, config.sticky_actions):
        raise ConfigError(fault)
    for field in dataclasses.fields(config):
        value, greatest = getattr(config, field.name), AT_MOST.get(field.name, GREATEST if "float" in field.type else MOST)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and number > greatest:
                raise ConfigError(f"{flag(field.name)} {reprlib.repr(number)}: must be at most {greatest}")
    if config.graph == "on" and config.device != "cuda":
        raise ConfigError(f"--graph on: there are no CUDA graphs on --device {config.device}; leave it out")
    if config.batch_size < 2:
        raise ConfigError("--batch-size 1: BatchNorm needs at least 2")
    if config.projection < 2:
        raise ConfigError("--projection 1: its predictor is half as wide; must be at least 2")
    if config.start_transitions >= config.env_steps:
        raise ConfigError(f"--start-transitions {config.start_transitions}: must be below --env-steps {config.env_steps}")
    if config.ring_positions <= config.start_transitions:
        raise ConfigError(
            f"--ring-positions {config.ring_positions}: must exceed --start-transitions {config.start_transitions}, or the ring "
            "forgets the start before training begins"
        )
    needed = config.lanes * (config.window + config.frame_stack + 1)
    if config.start_transitions < needed:
        raise ConfigError(
            f"--start-transitions {config.start_transitions}: {config.lanes} lanes need {needed} for one window of "
            f"--unroll {config.unroll} and --n-step {config.n_step} in each; raise it or take fewer --lanes"
        )
    if config.refresh_values > config.start_transitions - config.lanes:
        raise ConfigError(
            f"--refresh-values {config.refresh_values}: must be at most --start-transitions less --lanes, "
            f"{config.start_transitions - config.lanes}, or a sweep meets a position twice"
        )
    if config.refresh == "sweep":
        if config.refresh_roots % 8:
            raise ConfigError(f"--refresh-roots {config.refresh_roots}: must be a multiple of 8")
        if config.refresh_roots // 8 > config.start_transitions - config.lanes or 4 * config.refresh_roots > config.ring_positions:
            raise ConfigError(
                f"--refresh-roots {config.refresh_roots}: must be at most a quarter of --ring-positions {config.ring_positions} and an "
                f"eighth of it at most --start-transitions less --lanes, {config.start_transitions - config.lanes}, or a sweep meets a "
                "position twice"
            )
