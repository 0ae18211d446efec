"""Numbers of a config that tensors cannot hold are refused, whether they come from a flag or from config.json."""

import dataclasses
import typing
from pathlib import Path

import pytest

from speedyzero.config import Config, ConfigError, check, from_json, preset_config, resolve


def refused(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)


def test_no_number_of_a_config_is_beyond_what_tensors_hold():
    config = resolve(preset_config("cpu"), image=False, atari=False)
    types = typing.get_type_hints(Config)
    floats = [name for name, kind in types.items() if kind in (float, float | None)]
    wholes = [name for name, kind in types.items() if kind in (int, int | None)]
    assert len(floats) > 20
    assert len(wholes) > 20
    for name in floats:
        for number in (float("nan"), float("inf"), 1.1e30, 1e308):
            assert refused(check, dataclasses.replace(config, **{name: number})).startswith("--" + name.replace("_", "-"))
    for name in wholes:
        flag = "--" + name.replace("_", "-")
        for number in (2**63, 10**30, 10**400):
            assert refused(check, dataclasses.replace(config, **{name: number})).startswith(flag)
    refused(check, dataclasses.replace(config, temperatures=(1e31, 1.0, 1.0)))
    for fine in ({"lr": 1e30}, {"c_visit": 1e30}, {"max_grad_norm": 1e12}, {"log_interval": 10**9}, {"seed": 2**31 - 1}):
        check(dataclasses.replace(config, **fine))


def test_a_whole_number_in_the_place_of_a_fraction_becomes_one_if_it_is_exact():
    fields = Config().to_json()
    config = from_json(fields | {"lr": 2**53, "temperatures": [1, 2, 3]}, Path("c.json"))
    assert [type(number) for number in (config.lr, *config.temperatures)] == [float] * 4
    assert (config.lr, config.temperatures) == (2.0**53, (1.0, 2.0, 3.0))
    assert "lr is 9007199254740993" in refused(from_json, fields | {"lr": 2**53 + 1}, Path("c.json"))
