"""The sizes of a network, from a config and the frames it will see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from speedyzero.config import Config

# Boards with a longer side than this are halved by the representation; smaller ones keep their size.
LARGEST_FLAT_BOARD = 16


@dataclass(frozen=True)
class NetworkSpec:
    """The sizes of a network."""

    in_channels: int
    """Channels of a stacked observation."""
    height: int
    width: int
    actions: int
    channels: int
    stem_channels: int
    head_channels: int
    head_hidden: int
    lstm: int
    support: int
    projection: int
    representation: Literal["efficientzero", "compact"] = "efficientzero"
    """How frames with a longer side than LARGEST_FLAT_BOARD become a latent; smaller ones keep their size."""
    action_encoding: Literal["scalar", "one-hot"] = "scalar"
    normalised: tuple[int, int, int] | None = None
    """[C, H, W] of one frame, if its pixels are to be normalised."""

    @property
    def pyramid(self) -> bool:
        """Whether the representation makes the board smaller."""
        return max(self.height, self.width) > LARGEST_FLAT_BOARD

    @property
    def board(self) -> tuple[int, int]:
        """Height and width of the latent."""
        height, width = self.height, self.width
        halvings = 4 if self.representation == "efficientzero" else 3
        for _ in range(halvings if self.pyramid else 0):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    @property
    def bins(self) -> int:
        """Bins of a categorical scalar."""
        return 2 * self.support + 1


def network_spec(config: Config, frame_shape: tuple[int, int, int], num_actions: int) -> NetworkSpec:
    """The sizes that a resolved config gives for frames [C, H, W]."""
    channels, height, width = frame_shape
    return NetworkSpec(
        channels * config.frame_stack, height, width, num_actions, config.channels, config.stem_channels, config.head_channels,
        config.head_hidden, config.lstm, config.support, config.projection, config.representation, config.action_encoding,
        frame_shape if config.normalize_frames else None,
    )
