"""Every tile of the fused convolution against cuDNN on a CUDA device: which one `resblock.default_tile` should choose.

    python -m tools.profile.conv_tiles [--json OUT.json]

Each row is a batch of 6x6 boards of 64 channels in bf16: microseconds of one residual block, and the ratio to F.conv2d, add and relu
measured in turns with it.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from speedyzero_kernels.resblock import TILES, default_tile, resblock
from tools.profile.timing import ceilings, compare

BOARD, CHANNELS = 6, 64


@dataclass
class Arguments:
    """Sweep the tiles."""

    batches: tuple[int, ...] = (256, 1024, 4096, 8192, 16384)
    """Boards of a batch."""
    json: Path | None = None
    """Also write the rows to this file."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    if not torch.cuda.is_available():
        sys.exit("error: conv_tiles.py needs a CUDA device")
    device = torch.device("cuda")
    most = ceilings(device)
    torch.manual_seed(0)
    rows = []
    for batch in arguments.batches:
        x = torch.randn(batch, CHANNELS, BOARD, BOARD, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
        weight = (0.05 * torch.randn(CHANNELS, CHANNELS, 3, 3, device=device)).bfloat16().contiguous(memory_format=torch.channels_last)
        bias = torch.randn(CHANNELS, device=device).bfloat16()

        def cudnn(x=x, weight=weight, bias=bias) -> torch.Tensor:
            return F.relu(F.conv2d(F.relu(F.conv2d(x, weight, bias, padding=1)), weight, bias, padding=1) + x)

        pixels = batch * BOARD**2
        floor = most.floor(5 * pixels * CHANNELS * 2, 36 * pixels * CHANNELS**2)
        chosen = default_tile(pixels, CHANNELS, CHANNELS, torch.bfloat16)
        for tile in dict.fromkeys((chosen, *TILES)):
            comparison = compare(lambda x=x, w=weight, b=bias, tile=tile: resblock(x, w, b, w, b, tile=tile), cudnn, device)
            rows.append({
                "batch": batch, "tile": asdict(tile), "default": tile == chosen, "seconds": comparison.ours, "cudnn": comparison.other,
                "ratio": comparison.ratio, "share_of_floor": floor / comparison.ours,
            })  # fmt: skip
            mark = "  default" if tile == chosen else ""
            print(f"{batch:6d} {tile}: {1e6 * comparison.ours:8.1f} us, {comparison.ratio:.2f} of cuDNN, "
                  f"{100 * floor / comparison.ours:.0f} % of the floor{mark}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
