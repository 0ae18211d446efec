import dataclasses
import json
from pathlib import Path

import pytest
import torch

from speedyzero.config import (
    PRESETS,
    Config,
    ConfigError,
    from_json,
    pick_device,
    pick_preset,
    preset_config,
    resolve,
)
from speedyzero.search import SearchConfig

SOURCE = Path("runs/x/config.json")


def resolved(preset: str = "efficientzero", *, image: bool = True, atari: bool = True, **changes) -> Config:
    return resolve(dataclasses.replace(preset_config(preset), **changes), image=image, atari=atari)


# DESIGN section 4, each value literally.
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


def test_the_least_range_of_q_is_the_published_one_of_each_search():
    assert (resolved(search="puct").value_delta_min, resolved(search="gumbel").value_delta_min) == (0.01, 1e-8)
    assert resolved(search="gumbel", value_delta_min=0.5).search_config().least_range == 0.5
    assert [SearchConfig(kind=kind).least_range for kind in ("puct", "gumbel")] == [0.01, 1e-8]


@pytest.mark.parametrize("name", DESIGN)
def test_the_efficientzero_preset_is_that_of_the_design(name):
    assert getattr(resolved(), name) == DESIGN[name]


def test_efficientzero_makes_100k_updates_alongside_and_20k_after():
    config = resolved()
    assert config.planned_updates == 100_000
    assert config.total_updates == 120_000
    assert config.slots == 12_500
    assert config.window == 11


def test_speedyzero_takes_300k_samples_in_large_batches_with_clipped_lars():
    config = resolved("speedyzero")
    got = (config.env_steps, config.lanes, config.updates_per_iteration, config.batch_size, config.refresh_roots)
    assert got == (300_000, 32, 4, 2048, 16_384)
    assert config.optimizer == "clipped-lars"
    # As many samples a step as efficientzero.
    assert config.batch_size * config.planned_updates / config.env_steps == 256 * 100_000 / 100_000


@pytest.mark.parametrize(("preset", "image"), [(name, image) for name in PRESETS for image in (1, 0) if image or name != "cpu-atari"])
def test_every_preset_resolves(preset, image):
    config = resolved(preset, image=image, atari=image)
    assert config.preset == preset
    unset = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) is None]
    may_be = {"env_threads", "max_episode_steps", "eval_max_steps", "consistency_steps"}
    assert set(unset) <= may_be | (set() if image else {"frame_size", "gray"})
    config.search_config()


def test_what_depends_on_the_environment_is_filled_and_what_was_given_is_kept():
    pixels, numbers = resolved(), resolved(image=False, atari=False)
    assert (pixels.frame_stack, pixels.augment, pixels.clip_reward) == (4, True, True)
    assert (numbers.frame_stack, numbers.augment, numbers.clip_reward) == (1, False, False)
    assert resolved(image=True, atari=False).clip_reward is False
    assert (pixels.frame_size, pixels.gray) == (96, False)
    assert (numbers.frame_size, numbers.gray) == (None, None)
    small = resolved(frame_size=64, gray=True)
    assert (small.frame_size, small.gray) == (64, True)
    assert resolved(search="gumbel").simulations == 16
    assert resolved(env="ALE/Pong-v5", seed=3).run_dir == Path("runs/ALE_Pong-v5_efficientzero_seed3")
    given = resolved(
        frame_stack=2, augment=False, clip_reward=False, simulations=7, run_dir=Path("here"), eval_max_steps=5
    )
    assert (given.frame_stack, given.augment, given.clip_reward) == (2, False, False)
    assert (given.simulations, given.run_dir, given.eval_max_steps) == (7, Path("here"), 5)
    assert resolved(max_episode_steps=9).eval_max_steps == 9


def test_the_config_of_a_run_from_before_sticky_actions_is_read_as_one_without():
    fields = resolved().to_json()
    del fields["sticky_actions"]
    assert from_json(fields, Path("config.json")) == resolved()
    del fields["seed"]
    with pytest.raises(ConfigError, match="not a config of this version"):
        from_json(fields, Path("config.json"))


@pytest.mark.parametrize(("given", "flag"), [({"frame_size": 96}, "--frame-size 96"), ({"gray": False}, "--gray False")])
def test_an_environment_that_is_no_atari_game_takes_no_settings_of_its_frames(given, flag):
    with pytest.raises(ConfigError, match=f"^{flag}: Catch-v0 is no Atari game, its frames are as they are; leave it out$"):
        resolved("cpu", image=False, atari=False, env="Catch-v0", **given)


@pytest.mark.parametrize("size", [31, 257, 0, -64, 10**30])
def test_a_frame_that_is_too_small_or_too_large_is_refused(size):
    with pytest.raises(ConfigError, match=r"^--frame-size .*: must lie between 32 and 256"):
        resolved(frame_size=size)


def test_the_search_gets_the_settings_of_the_config():
    search = resolved(
        "cpu", discount=0.9, c_init=2.0, lstm_horizon=3, noise_fraction=0.5, simulations=9
    ).search_config()
    assert (search.kind, search.num_simulations, search.discount, search.c_init) == ("puct", 9, 0.9, 2.0)
    assert (search.lstm_horizon, search.noise_fraction, search.c_base) == (3, 0.5, 19652.0)
    search = resolved("cpu", search="gumbel", c_visit=7.0, c_scale=0.5, max_considered_actions=4).search_config()
    assert (search.kind, search.c_visit, search.c_scale, search.max_considered_actions) == ("gumbel", 7.0, 0.5, 4)


POSITIVE = [
    "env_steps",
    "lanes",
    "frame_stack",
    "ring_positions",
    "start_transitions",
    "simulations",
    "c_base",
    "dirichlet_alpha",
    "lstm_horizon",
    "value_delta_min",
    "max_considered_actions",
    "refresh_roots",
    "updates_per_iteration",
    "batch_size",
    "unroll",
    "n_step",
    "n_step_age",
    "lr",
    "snapshot_interval",
    "channels",
    "stem_channels",
    "head_channels",
    "head_hidden",
    "lstm",
    "support",
    "projection",
    "eval_episodes",
    "log_interval",
    "checkpoint_interval",
    "threads",
    "env_threads",
    "max_episode_steps",
    "eval_max_steps",
    "max_grad_norm",
    "trust_coefficient",
    "trust_clip",
]
IMPOSSIBLE = [
    *[({name: 0}, name) for name in POSITIVE],
    *[({name: -1}, name) for name in POSITIVE],
    *[
        ({name: -1}, name)
        for name in [
            "seed",
            "final_updates",
            "shift",
            "intensity",
            "weight_decay",
            "priority_alpha",
            "prefix_weight",
            "value_weight",
            "policy_weight",
            "consistency_weight",
            "discount",
            "noise_fraction",
            "momentum",
            "lr_warmup",
            "lr_decay",
            "priority_beta",
            "c_init",
            "c_visit",
            "c_scale",
        ]
    ],
    *[
        ({name: float("nan")}, name)
        for name in ("lr", "discount", "weight_decay", "max_grad_norm", "intensity", "n_step_age")
    ],
    *[({name: float("inf")}, name) for name in ("lr", "weight_decay", "trust_clip")],
    *[
        ({name: 1.1}, name)
        for name in ["discount", "noise_fraction", "momentum", "lr_warmup", "lr_decay", "priority_beta"]
    ],
    ({"temperatures": (1.0, 0.5, 0.0)}, "temperatures"),
    ({"temperatures": (float("nan"), 1.0, 1.0)}, "temperatures"),
    ({"seed": 2**31}, "seed"),
    ({"batch_size": 1}, "batch_size"),
    ({"start_transitions": 100_000}, "start_transitions"),
    ({"ring_positions": 2_000, "refresh_roots": 8}, "ring_positions"),
    # Eight lanes of a window of 5 + 5 + 1 slots, a stack of 4 and the newest one.
    ({"start_transitions": 8 * 16 - 1, "refresh_roots": 8}, "start_transitions"),
    ({"start_transitions": 2_000, "lanes": 126, "refresh_roots": 8}, "start_transitions"),
    ({"refresh_roots": 4097}, "refresh_roots"),
    ({"refresh_roots": 25_008, "start_transitions": 50_000}, "refresh_roots"),
    ({"refresh_roots": 2_008, "start_transitions": 250}, "refresh_roots"),
]


@pytest.mark.parametrize(("changes", "name"), IMPOSSIBLE, ids=[f"{n}-{list(c.values())[-1]}" for c, n in IMPOSSIBLE])
def test_what_cannot_work_is_refused_in_one_line_that_names_the_flag(changes, name):
    with pytest.raises(ConfigError) as refused:
        resolved(**changes)
    message = str(refused.value)
    assert message.startswith("--" + name.replace("_", "-") + " ")
    assert "\n" not in message


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
        text = json.dumps(config.to_json())
        assert from_json(json.loads(text), SOURCE) == config


def test_a_whole_number_stands_for_a_float_in_json():
    assert from_json(Config().to_json() | {"lr": 1}, SOURCE).lr == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"lanes": "8"}, {"lanes": 8.0}, {"lanes": True}, {"lanes": None}, {"lr": "fast"}, {"env": 5}, {"resume": 1},
        {"search": 3}, {"temperatures": None}, {"temperatures": 1.0}, {"temperatures": [1.0, 0.5]},
        {"temperatures": ["a", "b", "c"]}, {"run_dir": 5}, {"frame_stack": 2.5}, {"augment": "yes"},
        {"simulations": "x"}, {"env_threads": []},
        {"search": "bogus"}, {"refresh": "bogus"}, {"optimizer": "adam"}, {"bootstrap": "no"}, {"preset": "no"},
        {"device": "tpu"}, {"unknown_flag": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_field_is_refused_in_one_line_that_names_the_file(damage):
    with pytest.raises(ConfigError) as refused:
        from_json(resolved().to_json() | damage, SOURCE)
    message = str(refused.value)
    assert message.startswith(str(SOURCE))
    assert next(iter(damage)) in message
    assert "\n" not in message


def test_a_missing_field_or_no_object_at_all_is_refused():
    fields = Config().to_json()
    del fields["lanes"]
    with pytest.raises(ConfigError, match="lanes"):
        from_json(fields, SOURCE)
    for other in ([], 3, None, "x"):
        with pytest.raises(ConfigError, match="not an object"):
            from_json(other, SOURCE)


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


def test_no_default_is_unknown_to_the_presets():
    names = {field.name for field in dataclasses.fields(Config)}
    assert all(set(preset) <= names for preset in PRESETS.values())
