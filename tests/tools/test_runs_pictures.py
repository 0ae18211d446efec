"""tools/runs/pictures.py: where each frame is in the picture and how it is scaled, and the PNG read back by hand."""

import struct
import zlib

import numpy as np
import torch

from tests.tools.diagnosis_support import pictures


def test_a_picture_has_the_stack_left_to_right_the_future_below_and_the_augmented_at_the_right():
    colours = torch.rand(1, 2, 2, 3, generator=torch.Generator().manual_seed(0))  # [positions, steps, stack, RGB]
    plain = colours.flatten(2)[..., None, None].expand(-1, -1, -1, 40, 40)
    image = pictures.picture(plain, plain * 0.5, stack=2, pixels=True)
    side = 41
    for k in range(2):
        for frame in range(2):
            for half in range(2):
                corner = image[k * side, half * (2 * side + pictures.GAP) + frame * side]
                want = colours[0, k, frame] * (1.0 if half == 0 else 0.5)
                assert (corner - want * 255).abs().max() <= 1
    assert image[0, 2 * side].tolist() == [255, 255, 255]


def test_frames_that_are_small_or_grey_are_shown_larger_and_without_pixels_from_least_to_greatest():
    plain = torch.tensor([[-1.0, 3.0]]).view(1, 1, 1, 1, 2)
    image = pictures.picture(plain, plain, stack=1, pixels=False)
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[0, 39].tolist() == [255, 255, 255]


def test_a_png_is_what_was_written(tmp_path):
    image = torch.randint(256, (3, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures.write_png(tmp_path / "a.png", image)
    data, at, chunks = (tmp_path / "a.png").read_bytes(), 8, {}
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert data[at + 8 + length : at + 12 + length] == struct.pack(">I", zlib.crc32(kind + body))
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"] == struct.pack(">IIBBBBB", 5, 3, 8, 2, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(3, 16)
    assert (lines[:, 0] == 0).all()
    assert (lines[:, 1:].reshape(3, 5, 3) == image.numpy()).all()
