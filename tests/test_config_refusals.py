"""A config.json that is hostile or no config: refused in one line, with little of it read."""

import dataclasses
from pathlib import Path

import pytest

from speedyzero.config import Config, ConfigError, check, from_json, preset_config, resolve
from speedyzero.evaluate import read_config
from tests.run.bad_files_support import NESTED, odd_id, refused, taking_less_than
from tests.run.bad_files_support import in_time as in_time
from tests.run.bad_files_support import run as run
from tests.run.bad_files_support import runs as runs


@pytest.mark.parametrize("text", ["[" * 100_000, '{"env":' * 100_000, "[" * 900 + "]" * 900, '{"lr": ' + "1" * 5000 + "}", "\ufeff{}"])
def test_json_that_nests_for_ever_or_is_none_is_no_config(run, text):
    run.paths["config"].write_text(text)
    assert "config.json: " in refused(ConfigError, read_config, run.directory)


def test_a_config_of_a_gigabyte_is_not_read_to_its_end(run):
    good = run.paths["config"].read_text()
    run.paths["config"].write_text(good + " " * (2**20 - len(good)))
    assert read_config(run.directory) == run.config
    run.paths["config"].write_text(good + " " * (2**20 - len(good) + 1))
    assert "cannot be read (longer than 1048576 bytes)" in refused(ConfigError, read_config, run.directory)
    with open(run.paths["config"], "wb") as file:
        file.truncate(2**40)
    with taking_less_than(16):
        refused(ConfigError, read_config, run.directory)


@pytest.mark.parametrize(
    "value", ["two\nlines", "\ud800", "\x1b[2J", "x" * 10**5, NESTED, [0] * 10**5, {"a\nb": 1}, 10**400, -(10**400)], ids=odd_id
)
def test_whatever_a_config_holds_the_refusal_is_one_line(value):
    fields = resolve(preset_config("cpu"), image=False, atari=False).to_json()
    names = ("lanes", "lr", "search", "temperatures", "augment", "run_dir") if isinstance(value, list | dict) else ("lanes", "search", "lr")
    for name in names:
        line = refused(ConfigError, lambda name=name: check(from_json(fields | {name: value}, Path("c.json"))))
        assert line.startswith((f"c.json: {name} is ", f"--{name} "))
    if isinstance(value, str):
        refused(ConfigError, from_json, fields | {value: 1}, Path("c.json"))
        refused(ConfigError, check, from_json(fields | {"env": value}, Path("c.json")))
    refused(ConfigError, from_json, fields | {f"{i}{value!s:.30}": value for i in range(100)}, Path("c.json"))


def test_of_many_unknown_settings_the_first_are_named_and_the_rest_counted():
    fields = Config().to_json() | {f"x{i}": 0 for i in range(9)}
    assert "(x0, x1, x2, x3, x4 and 4 more)" in refused(ConfigError, from_json, fields, Path("c.json"))


def test_no_number_of_a_config_is_beyond_what_tensors_hold():
    config = resolve(preset_config("cpu"), image=False, atari=False)
    floats = [field.name for field in dataclasses.fields(Config) if field.type == "float"]
    wholes = [field.name for field in dataclasses.fields(Config) if field.type in ("int", "int | None")]
    assert len(floats) > 20
    assert len(wholes) > 20
    for name in floats:
        for number in (float("nan"), float("inf"), 1.1e30, 1e308):
            assert refused(ConfigError, check, dataclasses.replace(config, **{name: number})).startswith("--" + name.replace("_", "-"))
    for name in wholes:
        flag = "--" + name.replace("_", "-")
        for number in (2**63, 10**30, 10**400):
            assert refused(ConfigError, check, dataclasses.replace(config, **{name: number})).startswith(flag)
    refused(ConfigError, check, dataclasses.replace(config, temperatures=(1e31, 1.0, 1.0)))
    for fine in ({"lr": 1e30}, {"c_visit": 1e30}, {"max_grad_norm": 1e12}, {"log_interval": 10**9}, {"seed": 2**31 - 1}):
        check(dataclasses.replace(config, **fine))


def test_a_whole_number_in_the_place_of_a_fraction_becomes_one_if_it_is_exact():
    fields = Config().to_json()
    config = from_json(fields | {"lr": 2**53, "temperatures": [1, 2, 3]}, Path("c.json"))
    assert [type(number) for number in (config.lr, *config.temperatures)] == [float] * 4
    assert (config.lr, config.temperatures) == (2.0**53, (1.0, 2.0, 3.0))
    assert "lr is 9007199254740993" in refused(ConfigError, from_json, fields | {"lr": 2**53 + 1}, Path("c.json"))
