"""The picture of an environment, RGB at its own resolution: Atari's screen, a board of pixels, or a drawn cart with its pole.

EnvPool gives Atari's frames as the agent sees them, small or gray. The screen comes from a second emulator with the same seed that gets the
same actions: the same game (`Scene.recv` checks that reward and end agree).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

from speedyzero.emulators import Emulators
from speedyzero.envs import EnvError, EnvSpec

SCREEN_WIDTH = 160
SCREEN_HEIGHTS = {"carnival": 214, "journeyescape": 230, "pooyan": 220} | dict.fromkeys(
    ("adventure", "airraid", "keystonekapers", "kingkong", "klax", "lasergates", "mrdo", "pacman", "sirlancelot", "spacewar"), 250
)
"""Heights of the screens that are not of 210 lines, as ALE 0.12.1's `getScreenDims` says, by EnvPool's games in lower case."""

CART_SIZE, CART_TRACK = (420, 560), 2.4
"""[H, W] of the picture of a cart, and where its track ends, in units of the observation."""


class Scene:
    """Pictures of the first lane of `emulators`, which plays whole games; it steps with them.

    Raises:
        EnvError: there is no picture of this environment, in one line.
    """

    def __init__(self, emulators: Emulators, max_episode_steps: int | None = None):
        self._played = emulators
        spec = emulators.spec
        self._screen: Emulators | None = None
        self._cart = spec.env_id.startswith("CartPole-")
        channels, height, width = spec.frame_shape
        if spec.family == "atari":
            screen = dataclasses.replace(spec, frame_shape=(3, screen_height(spec), SCREEN_WIDTH))
            lanes, seed, sticky = emulators.lanes, emulators.seed, emulators.sticky_actions
            self._screen = Emulators(
                screen, lanes, seed, training=False, threads=1, max_episode_steps=max_episode_steps, sticky_actions=sticky
            )
        elif not self._cart and (channels not in (1, 3) or min(height, width) < 2):
            raise EnvError(f"{spec.env_id}: there is no picture to watch; there is of Atari, CartPole, and where observations are pictures")

    def reset(self) -> None:
        """Start when the emulators do."""
        if self._screen is not None:
            self._screen.reset()

    def send(self) -> None:
        """Take the emulators' step, too."""
        if self._screen is not None:
            self._screen.actions.copy_(self._played.actions)
            self._screen.send()

    def recv(self) -> None:
        """Wait for it. Raises EnvError if the two games are no longer the same."""
        if self._screen is None:
            return
        self._screen.recv()
        for name in ("reward", "done", "first", "game_over"):
            if not getattr(self._screen, name).equal(getattr(self._played, name)):
                raise EnvError(
                    f"the picture's game is no longer the one that is played ({name} differs): a fault of this version of EnvPool"
                )

    def picture(self) -> np.ndarray:
        """[H, W, 3] u8, the moment that the emulators are at; a copy."""
        if self._screen is not None:
            return self._screen.frames[0].permute(1, 2, 0).numpy().copy()
        frame = self._played.frames[0].numpy()
        if self._cart:
            return cart(float(frame[0, 0, 0]), float(frame[2, 0, 0]))
        pixels = frame if frame.dtype == np.uint8 else (frame.clip(0, 1) * 255).round().astype(np.uint8)
        return np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0).copy()

    def close(self) -> None:
        """Stop the second emulator."""
        if self._screen is not None:
            self._screen.close()


def screen_height(spec: EnvSpec) -> int:
    """Lines of an Atari game's screen."""
    return SCREEN_HEIGHTS.get(spec.env_id.rpartition("-v")[0].lower(), 210)


def cart(position: float, angle: float) -> np.ndarray:
    """A cart with its pole [H, W, 3] u8. position: of the cart, -2.4 to 2.4. angle: of the pole, 0 upright, in radians to the right."""
    height, width = CART_SIZE
    image = Image.new("RGB", (2 * width, 2 * height), "white")  # twice the size, for smooth edges
    draw = ImageDraw.Draw(image)
    x, y, length = width + position / CART_TRACK * 0.8 * width, 1.5 * height, 0.9 * height
    draw.line((0.2 * width, y + 48, 1.8 * width, y + 48), fill="#9aa0a6", width=6)
    draw.rounded_rectangle((x - 98, y - 40, x + 98, y + 40), 16, fill="#2b2f36")
    tip = (x + length * math.sin(angle), y - length * math.cos(angle))
    draw.line((x, y - 14, *tip), fill="#c8884a", width=30)
    draw.circle((x, y - 14), 15, fill="#7aa2f7")
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
