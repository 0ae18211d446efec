"""`--config FILE`: settings of another run, or some of them, as defaults of a new one. Between the preset and the flags."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path

from speedyzero.config import SOFTWARE, Config, ConfigError, settings_from_json, short_repr

NOT_TAKEN = {"run_dir", "resume", "device", "threads", "env_threads", "graph"}
"""Settings that a file may hold and that are not taken from it: which run it was, and what belongs to its machine."""


def read_settings(path: Path) -> dict[str, object]:
    """The settings in a config.json, or in any JSON object of settings, that a new run may take: by name, as `Config` takes them.

    Raises:
        ConfigError: one line that names the file: it cannot be read, or a setting is unknown or of the wrong type.
    """
    remedy = "give a run's config.json, or part of one"
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"--config {path}: is not an object of settings; {remedy}")
    names = [field.name for field in dataclasses.fields(Config)]
    for name in fields.keys() - {*names, SOFTWARE}:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else "python -m speedyzero --help lists them, with - for _"
        raise ConfigError(f"--config {path}: {short_repr(name)} is no setting; {hint}")
    taken = {name: value for name, value in fields.items() if name in names and name not in NOT_TAKEN}
    return settings_from_json(taken, f"--config {path}", "put a value there as config.json has it, or leave it out")
