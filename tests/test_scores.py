import statistics

import envpool
import pytest

from speedyzero.scores import ATARI_100K, human_normalised


def test_the_random_agent_scores_zero_and_the_human_one_on_every_game():
    for env_id, reference in ATARI_100K.items():
        assert human_normalised(env_id, reference.random) == 0
        assert human_normalised(env_id, reference.human) == 1


def test_a_game_outside_the_benchmark_has_no_normalised_score():
    assert human_normalised("Tennis-v5", 1.0) is None
    assert human_normalised("Pong-v5", -3.05) == pytest.approx(0.5)  # half way from -20.7 to 14.6


def test_there_are_26_games_and_each_is_an_envpool_id():
    assert len(ATARI_100K) == 26
    assert set(ATARI_100K) <= set(envpool.list_all_envs())


def test_efficientzeros_published_returns_give_its_published_mean_and_median():
    """Table 1 of "Mastering Atari Games with Limited Data" (NeurIPS 2021): mean 194.3%, median 109.0%."""
    returns = {
        "Alien": 808.5, "Amidar": 148.6, "Assault": 1263.1, "Asterix": 25557.8, "BankHeist": 351.0, "BattleZone": 13871.2, "Boxing": 52.7,
        "Breakout": 414.1, "ChopperCommand": 1117.3, "CrazyClimber": 83940.2, "DemonAttack": 13003.9, "Freeway": 21.8, "Frostbite": 296.3,
        "Gopher": 3260.3, "Hero": 9315.9, "Jamesbond": 517.0, "Kangaroo": 724.1, "Krull": 5663.3, "KungFuMaster": 30944.8,
        "MsPacman": 1281.2, "Pong": 20.1, "PrivateEye": 96.7, "Qbert": 13781.9, "RoadRunner": 17751.3, "Seaquest": 1100.2,
        "UpNDown": 17264.2,
    }  # fmt: skip
    normalised = [human_normalised(f"{game}-v5", score) for game, score in returns.items()]
    assert statistics.mean(normalised) == pytest.approx(1.943, abs=0.001)
    assert statistics.median(normalised) == pytest.approx(1.090, abs=0.001)
