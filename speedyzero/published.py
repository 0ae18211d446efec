"""Results of others on the Atari-100k benchmark, to stand beside a suite's. Each has its source; what could not be cited is None.

Human-normalised scores are shares: 1 is the human of `scores.ATARI_100K`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """What a paper reports over the 26 games."""

    name: str
    source: str
    env_steps: int
    """Environment steps of a run."""
    mean: float | None = None
    median: float | None = None
    iqm: float | None = None
    optimality_gap: float | None = None
    games: Mapping[str, float] = field(default_factory=dict)
    """Mean return by EnvPool id."""
    note: str = ""


EFFICIENTZERO = Published(
    "EfficientZero",
    'Ye et al., "Mastering Atari Games with Limited Data" (NeurIPS 2021), abstract and table 1, https://arxiv.org/abs/2111.00210',
    env_steps=100_000,
    mean=1.943,
    median=1.090,
    games={
        "Alien-v5": 808.5, "Amidar-v5": 148.6, "Assault-v5": 1263.1, "Asterix-v5": 25557.8, "BankHeist-v5": 351.0,
        "BattleZone-v5": 13871.2, "Boxing-v5": 52.7, "Breakout-v5": 414.1, "ChopperCommand-v5": 1117.3, "CrazyClimber-v5": 83940.2,
        "DemonAttack-v5": 13003.9, "Freeway-v5": 21.8, "Frostbite-v5": 296.3, "Gopher-v5": 3260.3, "Hero-v5": 9315.9,
        "Jamesbond-v5": 517.0, "Kangaroo-v5": 724.1, "Krull-v5": 5663.3, "KungFuMaster-v5": 30944.8, "MsPacman-v5": 1281.2,
        "Pong-v5": 20.1, "PrivateEye-v5": 96.7, "Qbert-v5": 13781.9, "RoadRunner-v5": 17751.3, "Seaquest-v5": 1100.2,
        "UpNDown-v5": 17264.2,
    },
    note="IQM and optimality gap need the scores of single seeds, which the table does not have",
)  # fmt: skip
EFFICIENTZERO_V2 = Published(
    "EfficientZero-V2",
    'Wang et al., "EfficientZero V2: Mastering Discrete and Continuous Control with Limited Data" (ICML 2024), '
    "https://arxiv.org/abs/2403.00564",
    env_steps=100_000,
    note="the table of the paper was not at hand",
)
SPEEDYZERO = Published(
    "SpeedyZero",
    'Mei et al., "SpeedyZero: Mastering Atari with Limited Data and Time" (ICLR 2023), https://openreview.net/forum?id=Mg5CLXZgvLJ',
    env_steps=300_000,
    note='its abstract says "human-level performances [...] within 35 minutes using only 300k samples"; the table was not at hand',
)
ATARI_100K_RESULTS = (EFFICIENTZERO, EFFICIENTZERO_V2, SPEEDYZERO)
