"""A drawing of a search tree, as SVG and PNG: the root at the left, a box for each node, lines as thick as they were visited often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from speedyzero.agent import Search
from speedyzero.config import ConfigError
from speedyzero.run.files import replacing
from speedyzero.search_tree import SearchTree

COLUMN, ROW = 2.2, 0.44
"""Inches from a node to its children, and from a leaf to the next."""
BOX = (1.5, 0.34)
PICTURE, LEAST_WIDTH = 2.6, 8.0
"""Width of the game's picture, and of the drawing at least, in inches."""
LINE, CHOSEN, TEXT, FAINT = "#b9bfc8", "#e08a1e", "#1f2329", "#8b929c"
WORSE, SAME, BETTER = (246, 207, 160), (243, 244, 246), (164, 199, 243)
"""Fills of nodes: Q far below the value of the root, equal to it, far above."""
LEGEND = (
    "5x: visits; Q: reward + discounted value, blue above the root's value; p: the network's policy; r: reward; orange: the line it plays"
)


def layout(tree: SearchTree) -> np.ndarray:
    """The row of each node [M] float64: one for each leaf, in the order of the actions; a parent is in the middle of its children."""
    rows, leaves = np.zeros(len(tree)), 0
    children = [tree.children(node) for node in range(len(tree))]
    pending = [(0, False)]
    while pending:  # not by recursion: a tree may be as deep as it has simulations
        node, placed = pending.pop()
        if placed:
            rows[node] = (rows[children[node][0]] + rows[children[node][-1]]) / 2
        elif children[node]:
            pending.append((node, True))
            pending.extend((child, False) for child in reversed(children[node]))
        else:
            rows[node], leaves = leaves, leaves + 1
    return rows


def draw_tree(stem: Path, search: Search, picture: np.ndarray, names: list[str], title: str) -> list[Path]:
    """Write `stem`.svg and `stem`.png of the search of one moment; returns their paths.

    picture: [H, W, 3] u8. names: of the actions.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: they cannot be written.
    """
    figure = _figure(search, picture, names, title)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
    for path in paths:
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _figure(search: Search, picture: np.ndarray, names: list[str], title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a tree needs matplotlib: pip install 'speedyzero[watch]'") from None
    tree: SearchTree = search.tree
    rows = layout(tree)
    unvisited = [action for action in range(len(names)) if not search.visits[action]]
    deepest, lowest = int(tree.depth.max()), int(rows.max())
    shape = picture.shape[1] / picture.shape[0]
    image = (PICTURE, PICTURE / shape) if shape > 0.5 else (PICTURE * 0.6, PICTURE * 0.6 / shape)
    wide = max(image[0] + 0.6 + deepest * COLUMN + BOX[0] * 1.4, LEAST_WIDTH)
    high = max((lowest + 1) * ROW, image[1]) + 1.45
    figure = Figure(figsize=(wide, high), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, wide), ylim=(high, 0))
    axes.axis("off")
    middle = 0.8 + (high - 1.45) / 2
    axes.imshow(picture, extent=(0.3, 0.3 + image[0], middle + image[1] / 2, middle - image[1] / 2), interpolation="nearest", aspect="auto")
    axes.set(xlim=(0, wide), ylim=(high, 0))
    axes.text(0.3, 0.38, title, fontsize=13, color=TEXT, va="center")
    rest = ", ".join(names[action] for action in unvisited)
    for line, note in enumerate((LEGEND, f"not visited: {rest}" if rest else "")):
        axes.text(0.3, high - 0.38 + 0.2 * line, note, fontsize=8, color=FAINT, va="center")
    left = 0.3 + image[0] + 0.3 + BOX[0] / 2
    xs, ys = left + tree.depth * COLUMN, middle + (rows - lowest / 2) * ROW
    best = set(tree.favourite(search.action))
    _lines(axes, tree, xs, ys, best)
    _boxes(axes, tree, xs, ys, best, names)
    return figure


def _lines(axes: Any, tree: SearchTree, xs: np.ndarray, ys: np.ndarray, best: set[int]) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    for node in range(1, len(tree)):
        parent = tree.parent[node]
        start, end = xs[parent] + BOX[0] / 2, xs[node] - BOX[0] / 2
        half = (start + end) / 2
        curve = Curve([(start, ys[parent]), (half, ys[parent]), (half, ys[node]), (end, ys[node])], [Curve.MOVETO] + 3 * [Curve.CURVE4])
        thick = 0.8 + 5.0 * tree.visits[node] / tree.visits[0]
        axes.add_patch(PathPatch(curve, fill=False, linewidth=thick, edgecolor=CHOSEN if node in best else LINE, zorder=2 + (node in best)))


def _boxes(axes: Any, tree: SearchTree, xs: np.ndarray, ys: np.ndarray, best: set[int], names: list[str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    q = tree.reward + tree.discount * tree.value
    spread = max(np.abs(q[1:] - tree.value[0]).max(), 1e-6)
    for node in range(len(tree)):
        x, y = xs[node] - BOX[0] / 2, ys[node] - BOX[1] / 2
        fill = _fill((q[node] - tree.value[0]) / spread) if node else _fill(0.0)
        edge = CHOSEN if node in best else LINE
        axes.add_patch(FancyBboxPatch((x, y), *BOX, boxstyle="round,pad=0,rounding_size=0.07", facecolor=fill, edgecolor=edge, zorder=4))
        if node:
            name, numbers = names[tree.action[node]], f"{tree.visits[node]}x   Q {q[node]:+.2f}   p {tree.prior[node]:.0%}"
            name += f"   r {tree.reward[node]:+.1f}" if abs(tree.reward[node]) >= 0.05 else ""
        else:
            name, numbers = f"value {tree.value[0]:+.2f}", f"network {tree.network_value[0]:+.2f}"
        axes.text(xs[node], y + 0.11, name, fontsize=7.5, color=TEXT, ha="center", va="center", zorder=5)
        axes.text(xs[node], y + 0.24, numbers, fontsize=6.5, color=TEXT, ha="center", va="center", zorder=5)


def _fill(better: float) -> tuple[float, float, float]:
    """A colour for -1 (worse than the root's value) to 1 (better)."""
    end = BETTER if better > 0 else WORSE
    return tuple((middle + abs(better) * (far - middle)) / 255 for middle, far in zip(SAME, end, strict=True))
