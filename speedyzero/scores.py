"""What a random agent and a human score on the 26 games of the Atari 100k benchmark, for human-normalised returns.

The scores are undiscounted returns of whole games begun with up to 30 no-ops, unclipped rewards. They are the table of
Wang et al., "Dueling Network Architectures for Deep Reinforcement Learning" (ICML 2016, no-op starts), whose human
column goes back to the professional tester of Mnih et al., "Human-level control through deep reinforcement learning"
(Nature 2015), and the one used by EfficientZero (Ye et al., NeurIPS 2021); the choice of 26 games is that of Kaiser et
al., "Model-Based Reinforcement Learning for Atari" (SimPLe, ICLR 2020).
"""

from typing import NamedTuple


class Reference(NamedTuple):
    """Mean returns of whole games: of uniformly random actions, and of a professional human tester."""

    random: float
    human: float


ATARI_100K = {
    "Alien-v5": Reference(227.8, 7127.7),
    "Amidar-v5": Reference(5.8, 1719.5),
    "Assault-v5": Reference(222.4, 742.0),
    "Asterix-v5": Reference(210.0, 8503.3),
    "BankHeist-v5": Reference(14.2, 753.1),
    "BattleZone-v5": Reference(2360.0, 37187.5),
    "Boxing-v5": Reference(0.1, 12.1),
    "Breakout-v5": Reference(1.7, 30.5),
    "ChopperCommand-v5": Reference(811.0, 7387.8),
    "CrazyClimber-v5": Reference(10780.5, 35829.4),
    "DemonAttack-v5": Reference(152.1, 1971.0),
    "Freeway-v5": Reference(0.0, 29.6),
    "Frostbite-v5": Reference(65.2, 4334.7),
    "Gopher-v5": Reference(257.6, 2412.5),
    "Hero-v5": Reference(1027.0, 30826.4),
    "Jamesbond-v5": Reference(29.0, 302.8),
    "Kangaroo-v5": Reference(52.0, 3035.0),
    "Krull-v5": Reference(1598.0, 2665.5),
    "KungFuMaster-v5": Reference(258.5, 22736.3),
    "MsPacman-v5": Reference(307.3, 6951.6),
    "Pong-v5": Reference(-20.7, 14.6),
    "PrivateEye-v5": Reference(24.9, 69571.3),
    "Qbert-v5": Reference(163.9, 13455.0),
    "RoadRunner-v5": Reference(11.5, 7845.0),
    "Seaquest-v5": Reference(68.4, 42054.7),
    "UpNDown-v5": Reference(533.4, 11693.2),
}
"""Scores by EnvPool id."""


def human_normalised(env_id: str, score: float) -> float | None:
    """`score` on a scale where 0 is the random agent and 1 the human; None for a game that is not one of the 26."""
    reference = ATARI_100K.get(env_id)
    if reference is None:
        return None
    return (score - reference.random) / (reference.human - reference.random)
