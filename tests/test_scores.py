import statistics

import envpool
import pytest

from speedyzero.published import EFFICIENTZERO
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
    normalised = [human_normalised(game, score) for game, score in EFFICIENTZERO.games.items()]
    assert set(EFFICIENTZERO.games) == set(ATARI_100K)
    assert statistics.mean(normalised) == pytest.approx(EFFICIENTZERO.mean, abs=0.001)
    assert statistics.median(normalised) == pytest.approx(EFFICIENTZERO.median, abs=0.001)
