"""JSON files, such as `eval.json`, on a full disk."""

import json

import pytest

from speedyzero.run.files import write_json


def test_json_that_does_not_fit_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"mean": 1.0})
    (tmp_path / "eval.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        write_json(path, {"mean": 2.0})
    assert raised.value.filename == str(path)
    assert json.loads(path.read_text()) == {"mean": 1.0}
    assert not (tmp_path / "eval.json.tmp").exists()
