"""Every setting: the presets are those of the design, what cannot work is refused, and config.json comes back as it was."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch

from speedyzero.config import PRESETS, Config, ConfigError, check, from_json, pick_device, pick_preset, preset_config, resolve
from speedyzero.search import SearchConfig

SOURCE = Path("runs/x/config.json")


def resolved(preset: str = "efficientzero", *, image: bool = True, atari: bool = True, **changes) -> Config:
    return resolve(dataclasses.replace(preset_config(preset), **changes), image=image, atari=atari)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# The published values, each literally.
DESIGN = {
    "env_steps": 100_000, "lanes": 8, "updates_per_iteration": 8, "batch_size": 256, "refresh_roots": 4096,
    "frame_stack": 4, "clip_reward": True, "start_transitions": 2_000, "ring_positions": 100_000,
    "search": "puct", "simulations": 50, "discount": 0.997**4, "c_base": 19652.0, "c_init": 1.25,
    "value_delta_min": 0.01, "noise_fraction": 0.25, "dirichlet_alpha": 0.3, "temperatures": (1.0, 0.5, 0.25),
    "lstm_horizon": 5, "max_considered_actions": 16, "c_visit": 50.0, "c_scale": 0.1,
    "refresh": "sweep", "bootstrap": "network", "snapshot_interval": 100,
    "unroll": 5, "n_step": 5, "n_step_age": 0.3, "final_updates": 20_000,
    "optimizer": "sgd", "lr": 0.2, "lr_warmup": 0.01, "lr_decay": 0.1, "momentum": 0.9, "weight_decay": 1e-4,
    "max_grad_norm": 5.0, "trust_clip": 1.0,
    "prefix_weight": 1.0, "value_weight": 0.25, "policy_weight": 1.0, "consistency_weight": 2.0,
    "priority_alpha": 0.6, "priority_beta": 0.4, "augment": True, "shift": 4, "intensity": 0.05,
    "channels": 64, "stem_channels": 32, "head_channels": 16, "head_hidden": 32, "lstm": 512, "support": 300,
    "projection": 1024, "eval_episodes": 32,
}  # fmt: skip


def test_the_efficientzero_preset_is_that_of_the_design():
    config = resolved()
    assert {name: getattr(config, name) for name in DESIGN} == DESIGN
    assert (config.planned_updates, config.total_updates, config.slots, config.window) == (100_000, 120_000, 12_500, 11)
    assert resolved(ring_positions=100_001).slots == 12_501


def test_the_presets_are_those_of_the_readmes_table():
    table = {
        "efficientzero": (100_000, 8, 120_000, 256, "puct", 50), "speedyzero": (300_000, 32, 42_500, 2048, "puct", 50),
        "cpu-atari": (100_000, 8, 52_000, 128, "gumbel", 16), "cpu": (9_000, 8, 1_375, 32, "puct", 12),
        "smoke": (400, 8, 60, 16, "puct", 4),
    }  # fmt: skip
    names = ("env_steps", "lanes", "total_updates", "batch_size", "search", "simulations")
    assert {preset: tuple(getattr(resolved(preset), name) for name in names) for preset in PRESETS} == table
    assert resolved("speedyzero").optimizer == "clipped-lars"


@pytest.mark.parametrize(("preset", "image"), [(name, image) for name in PRESETS for image in (1, 0) if image or name != "cpu-atari"])
def test_every_preset_resolves(preset, image):
    config = resolved(preset, image=image, atari=image)
    assert config.preset == preset
    unset = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) is None]
    may_be = {"env_threads", "max_episode_steps", "eval_max_steps", "consistency_steps", "wandb_entity"}
    assert set(unset) <= may_be | (set() if image else {"frame_size", "gray"})
    config.search_config()


def test_what_depends_on_the_environment_is_filled_and_what_was_given_is_kept():
    names = ("frame_stack", "augment", "clip_reward", "frame_size", "gray")

    def of(config):
        return [getattr(config, name) for name in names]

    assert of(resolved()) == [4, True, True, 96, False]
    assert of(resolved(image=False, atari=False)) == [1, False, False, None, None]
    assert of(resolved(image=True, atari=False)) == [4, True, False, None, None]
    given = dict(zip(names, [2, False, False, 64, True], strict=True))
    assert of(resolved(**given)) == list(given.values())
    assert resolved(search="gumbel").simulations == 16
    assert resolved(search="gumbel", simulations=7).simulations == 7
    assert resolved(env="ALE/Pong-v5", seed=3).run_dir == Path("runs/ALE_Pong-v5_efficientzero_seed3")
    assert resolved(run_dir=Path("here")).run_dir == Path("here")
    assert (resolved(max_episode_steps=9).eval_max_steps, resolved(eval_max_steps=5).eval_max_steps) == (9, 5)


def test_the_config_of_a_run_from_before_a_setting_is_read_as_what_it_did():
    fields = resolved().to_json()
    for name in ("sticky_actions", "track", "wandb_project_name", "wandb_entity"):
        del fields[name]
    assert from_json(fields, Path("config.json")) == resolved()
    del fields["seed"]
    with pytest.raises(ConfigError, match="not a config of this version"):
        from_json(fields, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frame_size": 96, "image": False, "atari": False, "env": "Catch-v0"}, "--frame-size 96: Catch-v0 is no Atari game"),
        ({"frame_size": 31}, "--frame-size 31: must lie between 32 and 256"),
        ({"frame_size": 10**30}, "--frame-size 1000"),
    ],
)
def test_frames_that_there_are_not_are_refused(changes, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        resolved("cpu", **changes)


def test_the_search_gets_the_settings_of_the_config():
    changes = {
        "discount": 0.9, "c_base": 7.0, "c_init": 2.0, "value_delta_min": 0.5, "noise_fraction": 0.5, "lstm_horizon": 3,
        "max_considered_actions": 4, "c_visit": 7.0, "c_scale": 0.5,
    }  # fmt: skip
    for kind in ("puct", "gumbel"):
        assert resolved("cpu", search=kind, simulations=9, **changes).search_config() == SearchConfig(kind, 9, **changes)
    assert [SearchConfig(kind=kind).least_range for kind in ("puct", "gumbel")] == [0.01, 1e-8]
    assert [resolved(search=kind).value_delta_min for kind in ("puct", "gumbel")] == [0.01, 1e-8]


POSITIVE = [
    "env_steps", "lanes", "frame_stack", "ring_positions", "start_transitions", "simulations", "c_base", "dirichlet_alpha", "lstm_horizon",
    "value_delta_min", "max_considered_actions", "refresh_roots", "updates_per_iteration", "batch_size", "unroll", "n_step", "n_step_age",
    "lr", "snapshot_interval", "channels", "stem_channels", "head_channels", "head_hidden", "lstm", "support", "projection",
    "eval_episodes", "log_interval", "checkpoint_interval", "keep", "threads", "env_threads", "max_episode_steps", "eval_max_steps",
    "max_grad_norm", "trust_coefficient", "trust_clip", "watchdog", "max_skipped", "consistency_steps",
]  # fmt: skip
NOT_NEGATIVE = [
    "seed", "final_updates", "refresh_values", "c_init", "c_visit", "c_scale", "shift", "intensity", "weight_decay", "priority_alpha",
    "prefix_weight", "value_weight", "policy_weight", "consistency_weight",
]  # fmt: skip
SHARES = [
    "discount", "noise_fraction", "momentum", "lr_warmup", "lr_decay", "priority_beta",
]  # fmt: skip
IMPOSSIBLE = [
    *[{name: 0} for name in POSITIVE],
    *[{name: -1} for name in (*NOT_NEGATIVE, *SHARES)],
    *[{name: 1.1} for name in SHARES],
    {"temperatures": (1.0, 0.5, 0.0)}, {"temperatures": (float("nan"), 1.0, 1.0)}, {"temperatures": (1e31, 1.0, 1.0)},
    {"seed": 2**31}, {"batch_size": 1}, {"projection": 1}, {"unroll": 257}, {"graph": "on"}, {"graph": "split"},
    {"start_transitions": 100_000},
    {"ring_positions": 2_000, "refresh_roots": 8},
    # Eight lanes of a window of 5 + 5 + 1 slots, a stack of 4 and the newest one.
    {"start_transitions": 8 * 16 - 1, "refresh_roots": 8}, {"start_transitions": 2_000, "lanes": 126, "refresh_roots": 8},
    {"refresh_roots": 4097}, {"refresh_roots": 25_008, "start_transitions": 50_000}, {"refresh_roots": 2_008, "start_transitions": 250},
    {"refresh_values": 1993},
]  # fmt: skip


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_what_cannot_work_is_refused_in_one_line_that_names_the_flag(changes):
    with pytest.raises(ConfigError, match=f"^{flag(next(iter(changes)))} .*$") as refused:
        resolved(**{"device": "cpu"} | changes)
    assert "\n" not in str(refused.value)


def test_no_number_of_a_config_is_beyond_what_tensors_hold():
    config = resolved("cpu", image=False, atari=False)
    beyond = {"float": (float("nan"), float("inf"), 1.1e30), "int": (2**63, 10**400)}
    for name, kind in typing.get_type_hints(Config).items():
        for number in beyond.get("float" if kind in (float, float | None) else "int" if kind in (int, int | None) else "", ()):
            with pytest.raises(ConfigError, match=f"^{flag(name)} "):
                check(dataclasses.replace(config, **{name: number}))
    for fine in ({"lr": 1e30}, {"max_grad_norm": 1e12}, {"log_interval": 10**9}):
        check(dataclasses.replace(config, **fine))


@pytest.mark.parametrize(
    "changes",
    [
        {"start_transitions": 8 * 16, "refresh_roots": 8},
        {"refresh_roots": 4097, "refresh": "sampled"},
        {"refresh_roots": 25_000, "start_transitions": 50_000},
        {"discount": 1.0, "momentum": 0.0, "final_updates": 0, "lr_warmup": 0.0, "consistency_weight": 0.0},
        {"seed": 2**31 - 1, "batch_size": 2, "c_init": 0.0, "priority_alpha": 0.0},
    ],
)  # fmt: skip
def test_what_lies_just_within_the_bounds_is_accepted(changes):
    resolved(**changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_comes_back_from_json_as_it_was(preset):
    for config in (preset_config(preset), dataclasses.replace(resolved("cpu"), preset=preset, env_threads=3)):
        assert from_json(json.loads(json.dumps(config.to_json())), SOURCE) == config


def test_a_whole_number_in_the_place_of_a_fraction_becomes_one_if_it_is_exact():
    fields = Config().to_json()
    config = from_json(fields | {"lr": 2**53, "temperatures": [1, 2, 3]}, SOURCE)
    assert repr((config.lr, config.temperatures)) == "(9007199254740992.0, (1.0, 2.0, 3.0))"
    with pytest.raises(ConfigError, match="lr is 9007199254740993"):
        from_json(fields | {"lr": 2**53 + 1}, SOURCE)


@pytest.mark.parametrize(
    "damage",
    [
        {"lanes": "8"}, {"lanes": 8.0}, {"lanes": True}, {"lanes": None}, {"lr": "fast"}, {"env": 5}, {"resume": 1},
        {"temperatures": None}, {"temperatures": [1.0, 0.5]}, {"temperatures": ["a", "b", "c"]}, {"run_dir": 5}, {"augment": "yes"},
        {"simulations": "x"}, {"env_threads": []}, {"search": "bogus"}, {"search": 3}, {"unknown_flag": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_field_is_refused_in_one_line_that_names_the_file(damage):
    with pytest.raises(ConfigError, match=f"^{SOURCE}: .*{next(iter(damage))}.*$") as refused:
        from_json(resolved().to_json() | damage, SOURCE)
    assert "\n" not in str(refused.value)


def test_a_missing_field_or_no_object_at_all_is_refused():
    fields = Config().to_json()
    del fields["lanes"]
    for bad, says in [(fields, "lanes"), ([], "not an object"), (None, "not an object")]:
        with pytest.raises(ConfigError, match=says):
            from_json(bad, SOURCE)


def test_auto_takes_the_preset_and_the_device_that_the_machine_has(monkeypatch):
    for atari, on_cpu in ((True, "cpu-atari"), (False, "cpu")):
        assert pick_preset("auto", torch.device("cuda"), atari) == "efficientzero"
        assert pick_preset("auto", torch.device("cpu"), atari) == on_cpu
        assert pick_preset("smoke", torch.device("cuda"), atari) == "smoke"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
