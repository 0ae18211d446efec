import errno
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from speedyzero.run.checkpoint import CheckpointError, DamagedError, latest, load, path_of, prune, save
from tests.run.log_support import file_size_limit

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
META = {"iteration": 12, "config": {"env": "Pong-v5", "lr": 0.2, "name": "é"}, "rng": [1, 2**63], "nothing": None}


def all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = {
        "ring.frames": torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=generator),
        "ring.value": torch.randn(7, generator=generator),
        "ring.policy": torch.randn(3, 3, generator=generator).half(),
        "ring.done": torch.tensor([True, False, True]),
        "counter": torch.tensor(2**40),
        "odd.i32": torch.arange(3, dtype=torch.int32),
        "odd.f64": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64),
        "odd.bf16": torch.randn(5, generator=generator).bfloat16(),
        "scalar.u8": torch.tensor(3, dtype=torch.uint8),
        "scalar.bool": torch.tensor(True),
        "empty.f32": torch.empty(0),
        "empty.f16": torch.empty(0, 4, dtype=torch.float16),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "strided": torch.arange(10.0)[::3],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    flat = torch.arange(6.0)
    return kinds | {"view.a": flat[:2], "view.b": flat[2:].view(2, 2)}


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


def test_a_checkpoint_without_tensors_is_a_checkpoint(tmp_path):
    save(tmp_path / "c.safetensors", {}, {})
    assert load(tmp_path / "c.safetensors") == ({}, {})


def test_the_safetensors_library_reads_our_files(tmp_path):
    save(tmp_path / "c.safetensors", all_kinds(), META)
    assert_same(load_file(tmp_path / "c.safetensors"), all_kinds())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99)
        ),
        max_size=5,
    )
)
def test_any_dictionary_of_tensors_survives(tmp_path, spec):
    tensors = {}
    for name, (dtype, shape, seed) in spec.items():
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 2, shape, generator=generator)
        tensors[name] = values.to(dtype)
    save(tmp_path / "c.safetensors", tensors, {"names": list(tensors)})
    loaded, meta = load(tmp_path / "c.safetensors")
    assert_same(loaded, tensors)
    assert meta == {"names": list(tensors)}


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


def test_a_flipped_bit_in_a_tensor_is_reported_in_one_line_that_says_what_to_do(tmp_path):
    path = tmp_path / "checkpoint_000000012.safetensors"
    frames = torch.arange(200, dtype=torch.uint8)
    save(path, {"ring.frames": frames, "ring.value": torch.zeros(3)}, META)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(frames.tolist())) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path} is damaged (tensor ring.frames: checksum differs); "
        "delete it to resume from the one before, or start a new run with another --run-dir"
    )
    assert issubclass(CheckpointError, ValueError)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04" + b"\0" * 100, b"hello, I am a text file, not a checkpoint", b"\xff" * 64, None])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, contents):
    path = tmp_path / "c.safetensors"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(CheckpointError, match="does not exist; resume from another" if contents is None else "is damaged") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_safetensors_file_of_another_program_is_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "c.safetensors", metadata={"framework": "pt"})
    with pytest.raises(DamagedError, match="it is not a checkpoint of speedyzero"):
        load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(("put", "says"), [(os.mkdir, "Is a directory"), (os.mkfifo, "not a regular file")])
def test_a_directory_and_a_pipe_are_refused_at_once(tmp_path, put, says):
    put(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=rf"cannot be read \({says}\)"):
        load(tmp_path / "c.safetensors")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    """Format 2 was written until 2026-11; its metadata had other names."""
    save_file({"a": torch.ones(2)}, tmp_path / "c.safetensors", {"header_crc32": "0123abcd", "format": "2", "crc32": "{}", "meta": "{}"})
    with pytest.raises(CheckpointError, match="has checkpoint format 2, and this speedyzero reads 3; resume with the") as caught:
        load(tmp_path / "c.safetensors")
    assert not isinstance(caught.value, DamagedError)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save(path, {"a": torch.zeros(3)}, {"n": 1})

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, disk_full)
            with pytest.raises(OSError, match="No space"):
                save(path, {"a": torch.ones(3)}, {"n": 2})
        assert os.listdir(tmp_path) == ["c.safetensors"]
        assert load(path)[1] == {"n": 1}


def test_the_data_is_on_the_disk_before_the_name_is_and_then_the_name_is(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def is_directory(fd):
        return os.path.isdir(f"/proc/self/fd/{fd}")

    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append("fsync dir" if is_directory(fd) else "fsync file"), fsync(fd))
    )
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


def test_loaded_tensors_are_writable_and_the_file_does_not_change(tmp_path):
    path = tmp_path / "c.safetensors"
    save(path, {"a": torch.zeros(3)}, {})
    tensors, _ = load(path)
    tensors["a"] += 1
    path.unlink()
    assert tensors["a"].tolist() == [1, 1, 1]
    save(path, {"a": torch.zeros(3)}, {})
    load(path)[0]["a"].fill_(7)
    assert load(path)[0]["a"].tolist() == [0, 0, 0]


def test_the_latest_checkpoint_is_the_one_of_the_highest_iteration(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    for iteration in (9, 1_000_000_000, 999_999_999, 200):
        path_of(tmp_path, iteration).touch()
    for other in ("checkpoint_best.safetensors", "checkpoint_9999999999.safetensors.tmp", "checkpoint_5.safetensors"):
        (tmp_path / other).touch()
    assert latest(tmp_path) == tmp_path / "checkpoint_1000000000.safetensors"
    assert path_of(tmp_path, 9).name == "checkpoint_000000009.safetensors"


def test_pruning_keeps_the_latest_and_files_that_are_not_checkpoints(tmp_path):
    for iteration in (100, 20, 3, 1_000_000_000):
        path_of(tmp_path, iteration).touch()
    (tmp_path / "checkpoint_best.safetensors").touch()
    for leftover in ("checkpoint_000000007.safetensors.tmp", ".tmp2BFQoy"):  # ours, and that of safetensors
        (tmp_path / leftover).touch()
    prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint_000000100.safetensors",
        "checkpoint_1000000000.safetensors",
        "checkpoint_best.safetensors",
    ]
    prune(tmp_path, 5)
    assert len(os.listdir(tmp_path)) == 3
    with pytest.raises(ValueError, match="keep must be at least 1"):
        prune(tmp_path, 0)
    assert len(os.listdir(tmp_path)) == 3
