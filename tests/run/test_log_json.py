"""JSON files, such as `eval.json`."""

import json
import math
from pathlib import Path

import pytest

from speedyzero.run.files import write_json


def test_json_files_are_sorted_indented_and_finite(tmp_path):
    write_json(tmp_path / "eval.json", {"b": [1.0, math.nan], "a": {"run": Path("x"), "c": (math.inf, None, True)}})
    assert (tmp_path / "eval.json").read_text() == (
        "{\n"
        '  "a": {\n    "c": [\n      null,\n      null,\n      true\n    ],\n    "run": "x"\n  },\n'
        '  "b": [\n    1.0,\n    null\n  ]\n'
        "}\n"
    )


def test_json_that_does_not_fit_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"mean": 1.0})
    (tmp_path / "eval.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        write_json(path, {"mean": 2.0})
    assert raised.value.filename == str(path)
    assert json.loads(path.read_text()) == {"mean": 1.0}
    assert not (tmp_path / "eval.json.tmp").exists()
