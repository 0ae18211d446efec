"""The presets: sets of defaults for a purpose. `efficientzero` is the defaults of `settings`.

Source of `speedyzero`: SpeedyZero (ICLR 2023), for the sample count, the large batch and Clipped LARS.
"""

PRESETS: dict[str, dict] = {
    "efficientzero": {},
    # The clip: at 1 a batch of 512 learned hardly faster than by SGD, at 16 as well as without one (docs/ABLATION.md).
    "speedyzero": {
        "env_steps": 300_000,
        "lanes": 32,
        "start_transitions": 4_000,
        "updates_per_iteration": 4,
        "batch_size": 2048,
        "refresh_roots": 16_384,
        "optimizer": "clipped-lars",
        "trust_clip": 16.0,
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
