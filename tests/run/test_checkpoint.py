import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from speedyzero.run.checkpoint import CheckpointError, DamagedError, latest, load, path_of, prune, save
from tests.run.log_support import file_size_limit

META = {"iteration": 12, "config": {"env": "Pong-v5", "lr": 0.2, "name": "é"}, "rng": [1, 2**63], "nothing": None}


def all_kinds() -> dict[str, torch.Tensor]:
    generator, flat = torch.Generator().manual_seed(0), torch.arange(6.0)
    return {
        "ring.frames": torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=generator),
        "ring.policy": torch.randn(3, 3, generator=generator).half(),
        "ring.done": torch.tensor([True, False, True]),
        "counter": torch.tensor(2**40),
        "odd.i32": torch.arange(3, dtype=torch.int32),
        "odd.f64": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64),
        "odd.bf16": torch.randn(5, generator=generator).bfloat16(),
        "scalar.bool": torch.tensor(True),
        "empty.f16": torch.empty(0, 4, dtype=torch.float16),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "strided": torch.arange(10.0)[::3],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "view.a": flat[:2], "view.b": flat[2:].view(2, 2), "é x": torch.zeros(1),
    }  # fmt: skip


def bytes_of(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def assert_same(loaded: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        got = loaded[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert bytes_of(got) == bytes_of(tensor), name


def test_what_is_loaded_is_what_was_saved_for_every_dtype_shape_and_stride(tmp_path):
    save(tmp_path / "c.safetensors", all_kinds(), META)
    tensors, meta = load(tmp_path / "c.safetensors")
    assert_same(tensors, all_kinds())
    assert list(tensors) == list(all_kinds())
    assert meta == META
    assert_same(load_file(tmp_path / "c.safetensors"), all_kinds())  # the library reads it too
    tensors["ring.frames"] += 1  # writable, and of this process alone
    assert_same(load(tmp_path / "c.safetensors")[0], all_kinds())


def small(path) -> bytes:
    save(path, {"a": torch.arange(4, dtype=torch.uint8), "b": torch.tensor(1.5), "e": torch.empty(0)}, {"n": 1})
    return path.read_bytes()


def test_no_flipped_bit_of_a_small_file_is_loaded_as_something_else(tmp_path):
    path = tmp_path / "c.safetensors"
    good = small(path)
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(CheckpointError):
                load(path)


def test_every_shortened_file_and_every_lengthened_one_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    good = small(path)
    for bad in [good[:n] for n in range(len(good))] + [good + b"\0", good + good]:
        path.write_bytes(bad)
        with pytest.raises(DamagedError, match="is damaged"):
            load(path)


def test_swapped_tensors_and_exchanged_metadata_are_found(tmp_path):
    """Each part is valid, but not in its place."""
    path, other = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    save(path, {"a": torch.zeros(2), "b": torch.ones(2)}, {"n": 1})
    save(other, {"a": torch.ones(2), "b": torch.zeros(2)}, {"n": 2})
    swapped = bytearray(path.read_bytes())
    swapped[-16:] = other.read_bytes()[-16:]
    with safe_open(path, "pt") as one, safe_open(other, "pt") as two:
        texts, theirs = one.metadata(), two.metadata()
    for bad in ({"meta": theirs["meta"]}, {"sums": theirs["sums"]}, {"crc32": theirs["crc32"]}):
        save_file({"a": torch.zeros(2), "b": torch.ones(2)}, path, texts | bad)
        with pytest.raises(DamagedError, match="checksum of its metadata differs"):
            load(path)
    path.write_bytes(swapped)
    with pytest.raises(DamagedError, match="tensor a: checksum differs"):
        load(path)
    good, differs = {"a": torch.zeros(2), "b": torch.ones(2)}, "tensor a: checksum differs"
    others = [(torch.zeros(2, dtype=torch.int32), differs), (torch.zeros(1, 2), differs), (None, "are not those of its checksums")]
    for other, says in others:  # the same bytes as another dtype or shape, and one tensor too many
        save_file(good | ({"c": torch.zeros(1)} if other is None else {"a": other}), path, texts)
        with pytest.raises(DamagedError, match=says):
            load(path)


def test_a_damaged_checkpoint_is_reported_in_one_line_that_says_what_to_do(tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(small(path)[:-1] + b"x")
    with pytest.raises(DamagedError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path} is damaged (tensor a: checksum differs); delete it to resume from the one before, or start a new run with another "
        "--run-dir"
    )
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist; resume from another"):
        load(path)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04" + b"\0" * 100, b"hello, I am a text file, not a checkpoint", b"\xff" * 64])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, contents):
    path = tmp_path / "c.safetensors"
    path.write_bytes(contents)
    with pytest.raises(DamagedError, match=f"^{path} is damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    save_file({"w": torch.ones(2)}, path, metadata={"framework": "pt"})  # of another program
    with pytest.raises(DamagedError, match="it is not a checkpoint of speedyzero"):
        load(path)


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "c.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        load(tmp_path / "c.safetensors")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    """Format 2 was written until 2026-11; its metadata had other names."""
    save_file({"a": torch.ones(2)}, tmp_path / "c.safetensors", {"header_crc32": "0123abcd", "format": "2", "crc32": "{}", "meta": "{}"})
    with pytest.raises(CheckpointError, match="has checkpoint format 2, and this speedyzero reads 3; resume with the") as caught:
        load(tmp_path / "c.safetensors")
    assert not isinstance(caught.value, DamagedError)


def test_the_data_is_on_the_disk_before_the_name_is_and_then_the_name_is(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def syncing(number):
        calls.append("fsync dir" if os.path.isdir(f"/proc/self/fd/{number}") else "fsync file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    save(tmp_path / "c.safetensors", {"a": torch.zeros(3)}, {})
    assert calls == ["fsync file", "replace", "fsync dir"]


def test_a_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "c.safetensors", {"c": torch.zeros(2)}, {"net": object()})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_an_error_of_the_system_with_its_number_and_leaves_nothing(tmp_path):
    with file_size_limit(3000), pytest.raises(OSError, match="File too large") as caught:
        save(tmp_path / "c.safetensors", {"a": torch.zeros(2000)}, {})
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "c.safetensors"))
    assert os.listdir(tmp_path) == []


def test_others_may_read_a_checkpoint_as_any_new_file(tmp_path):
    (tmp_path / "new").touch()
    save(tmp_path / "c.safetensors", {}, {})
    assert (tmp_path / "c.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_the_latest_checkpoint_is_the_one_of_the_highest_iteration_and_pruning_keeps_it(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    for iteration in (9, 1_000_000_000, 999_999_999, 200):
        path_of(tmp_path, iteration).touch()
    others = {"checkpoint_best.safetensors", "checkpoint_5.safetensors"}
    for other in (*others, "checkpoint_9999999999.safetensors.tmp", ".tmp2BFQoy"):  # the last two a kill left, ours and safetensors'
        (tmp_path / other).touch()
    assert latest(tmp_path) == tmp_path / "checkpoint_1000000000.safetensors"
    for keep in (2, 5):
        prune(tmp_path, keep)
        assert set(os.listdir(tmp_path)) == others | {"checkpoint_999999999.safetensors", "checkpoint_1000000000.safetensors"}
    with pytest.raises(ValueError, match="keep must be at least 1"):
        prune(tmp_path, 0)
