"""The picture of a moment with what the agent thinks of it beside: the value over time, and the visits of each action.

Sizes are in units of a video of 420 lines.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from speedyzero.agent import Search

LINES = 420
WIDTH, MARGIN = 300, 16
PAGE = 120
"""Steps that the curve of the value has room for. When it is full, its second half moves to the left: one that moved at every step would
make a GIF several times larger."""
LEAST_SPAN = 0.5
"""Of the curve: below it the value is noise, and is drawn as flat as it is."""

GROUND, TRACK, RULE = "#14171c", "#242932", "#3a414d"
TEXT, FAINT = "#e8eaed", "#9aa0a6"
CHOSEN, OTHER, CURVE = "#f5a742", "#66707f", "#7aa2f7"
GOOD, BAD = "#7bd88f", "#ff6b6b"


class Panel:
    """Draws the moments of one video, in order.

    title: the environment. names: of the actions. lines: height of the video at least; the picture is scaled by a whole number.
    """

    def __init__(self, title: str, names: list[str], lines: int):
        self._title, self._names, self._lines = title, names, lines
        self._values: list[tuple[float, float, float, bool]] = []
        """Of each step of the page: the search's value, the network's, the reward that came after it, whether the game ended with it."""
        self._range = (np.inf, -np.inf)
        """Of the page: its least and greatest value, with some room."""
        self._search: Search | None = None
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def frame(self, picture: np.ndarray, search: Search | None, step: int, score: float, reward: float) -> np.ndarray:
        """A frame of the video [h, w, 3] u8, both even.

        picture: [H, W, 3] u8. search: of this moment; None where the game is over, and the last one stays.
        step, score: of the game so far. reward: that came with this moment.
        """
        if self._values and step:
            self._values[-1] = (*self._values[-1][:2], reward, search is None)
        if search is not None:
            self._search = search
            self._remember(search)
        scale = max(1, round(self._lines / picture.shape[0]))
        big = picture.repeat(scale, 0).repeat(scale, 1)
        unit = big.shape[0] / LINES
        width = big.shape[1] + round(WIDTH * unit)
        canvas = Image.new("RGB", (width + width % 2, big.shape[0] + big.shape[0] % 2), GROUND)
        canvas.paste(Image.fromarray(big), (0, 0))
        self._draw(canvas, big.shape[1], unit, step, score, over=search is None)
        return np.asarray(canvas)

    def _remember(self, search: Search) -> None:
        """Put a moment's values on the page."""
        if len(self._values) == PAGE:
            self._values, self._range = self._values[PAGE // 2 :], (np.inf, -np.inf)
        self._values.append((search.value, search.network_value, 0.0, False))
        values = [value for moment in self._values for value in moment[:2]]
        low, high = min(values), max(values)
        if low < self._range[0] or high > self._range[1]:
            spare = max(0.0, LEAST_SPAN - (high - low)) / 2 + 0.15 * max(high - low, LEAST_SPAN)
            self._range = (low - spare, high + spare)

    def _draw(self, canvas: Image.Image, x: int, unit: float, step: int, score: float, over: bool) -> None:
        draw, search = ImageDraw.Draw(canvas), self._search
        left, right = x + MARGIN * unit, x + (WIDTH - MARGIN) * unit
        draw.text((left, 16 * unit), self._title, TEXT, self._font(20 * unit))
        draw.text((left, 44 * unit), f"score {score:g}", FAINT, self._font(14 * unit))
        draw.text((right, 44 * unit), f"{'over after' if over else 'step'} {step}", FAINT, self._font(14 * unit), anchor="ra")
        if search is None:
            return
        draw.text((left, 78 * unit), "value", FAINT, self._font(12 * unit))
        value, large = f"{search.value:+.2f}", self._font(18 * unit)
        draw.text((right, 72 * unit), value, CURVE, large, anchor="ra")
        beside = right - draw.textlength(value, large) - 16 * unit
        draw.text((beside, 78 * unit), f"network {search.network_value:+.2f}", OTHER, self._font(12 * unit), anchor="ra")
        self._draw_curve(canvas, (left, 98 * unit, right, 170 * unit), unit)
        total = int(search.visits.sum())
        draw.text((left, 184 * unit), f"visits of {total} simulations", FAINT, self._font(12 * unit))
        draw.text((right, 184 * unit), "Q", FAINT, self._font(12 * unit), anchor="ra")
        draw.line((right - 94 * unit, 185 * unit, right - 94 * unit, 198 * unit), TEXT, max(1, round(1.4 * unit)))
        draw.text((right - 88 * unit, 184 * unit), "policy", FAINT, self._font(12 * unit))
        top = 206.0
        row = min(26.0, (LINES - MARGIN / 2 - top) / len(self._names))
        size = self._font(min(13.0, 0.85 * row) * unit)
        start, end = left + max(draw.textlength(name, size) for name in self._names) + 8 * unit, right - 46 * unit
        for action, name in enumerate(self._names):
            y = (top + row * (action + 0.5)) * unit
            half, colour = 0.36 * row * unit, CHOSEN if action == search.action else OTHER
            draw.text((left, y), name, TEXT if action == search.action else FAINT, size, anchor="lm")
            draw.rectangle((start, y - half, end, y + half), TRACK)
            if search.visits[action]:
                draw.rectangle((start, y - half, start + (end - start) * search.visits[action] / total, y + half), colour)
                draw.text((right, y), f"{search.q[action]:+.2f}", TEXT if action == search.action else FAINT, size, anchor="rm")
            tick = start + (end - start) * float(search.prior[action])
            draw.line((tick, y - half, tick, y + half), TEXT, max(1, round(1.4 * unit)))

    def _draw_curve(self, canvas: Image.Image, box: tuple[float, float, float, float], unit: float) -> None:
        """The values of the page, and a line where a reward came or a game ended."""
        left, top, right, bottom = box
        fine = 3  # drawn larger and made smaller: smooth lines
        width, height = round(right - left), round(bottom - top)
        chart = Image.new("RGB", (fine * width, fine * height), TRACK)
        draw = ImageDraw.Draw(chart)
        values, (low, high) = np.array(self._values), self._range
        xs = fine * width * (np.arange(len(values)) + 0.5) / PAGE

        def ys(numbers: np.ndarray | float) -> np.ndarray:
            return fine * height * (high - np.asarray(numbers)) / (high - low)

        if low < 0 < high:
            draw.line((0, ys(0.0), fine * width, ys(0.0)), RULE, fine)
        paid = 2 * np.count_nonzero(values[:, 2]) > len(values) > 1  # for each step, as CartPole: no event to mark
        for x, (_, _, reward, ended) in zip(xs, self._values, strict=True):
            if ended or (reward and not paid):
                colour = GOOD if reward > 0 else BAD if reward < 0 else FAINT
                draw.line((x, 0, x, fine * height), colour, round((2 if reward else 1) * fine * unit))
        for column, colour, thick in ((1, OTHER, 1.2), (0, CURVE, 2.0)):
            points, wide = list(zip(xs, ys(values[:, column]), strict=True)), round(thick * fine * unit)
            draw.line(points, colour, wide, joint="curve")
        draw.circle(points[-1], 1.6 * wide / 2, CURVE)
        canvas.paste(chart.resize((width, height), Image.Resampling.BOX), (round(left), round(top)))

    def _font(self, size: float) -> ImageFont.FreeTypeFont:
        """Pillow's own font, loaded once a size."""
        if round(size) not in self._fonts:
            self._fonts[round(size)] = ImageFont.load_default(round(size))
        return self._fonts[round(size)]
