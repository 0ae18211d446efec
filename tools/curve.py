"""The learning curve of a run, finished or not, or of several laid over each other.

    python -m tools.curve RUN_DIR                                      # writes docs/runs/NAME.csv and NAME.png
    python -m tools.curve runs/sweep runs/sampled --labels sweep sampled --out docs/runs/refresh

Prints the table for BENCHMARKS.md. The CSV has a row for every logged row, the picture a panel for each question: does it score, does each
loss fall, do the values stay in range, does the search grow sure, how old are the priorities, how fast does it go. The picture needs
matplotlib (pip install 'speedyzero[plot]'); nothing needs PyTorch.
"""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from speedyzero.run.files import replacing
from speedyzero.run.record import Recorded, RunError, clock, human_share, read, thousands
from speedyzero.scores import ATARI_100K

SIZE, DPI, MOST_RUNS = (14.0, 8.6), 110, 10
"""Of the picture: inches, pixels an inch, and as many colours as can be told apart."""


class Panel(NamedTuple):
    """One of the small panels, all over the updates.

    place: row and column of a grid of 3 x 4, whose first two rows and columns are the return's. curves: keys of a row, each with its line
    style and its name, which is "" where it is the only one. log: whether the scale is logarithmic, for what falls steeply at first.
    """

    title: str
    unit: str
    place: tuple[int, int]
    curves: tuple[tuple[str, str, str], ...]
    log: bool = False


PANELS = (
    Panel("value prefix loss", "cross entropy, nats", (0, 2), (("losses/value_prefix_loss", "-", ""),), log=True),
    Panel("value loss", "cross entropy, nats", (0, 3), (("losses/value_loss", "-", ""),), log=True),
    Panel("policy loss", "cross entropy, nats", (1, 2), (("losses/policy_loss", "-", ""),)),
    Panel("consistency loss", "negative cosine", (1, 3), (("losses/consistency_loss", "-", ""),)),
    Panel(
        "values", "discounted return", (2, 0),
        (("train/value_abs_max", "-", "greatest predicted, absolute"), ("train/value_target", ":", "mean target")),
    ),
    Panel("entropy of the visits", "nats", (2, 1), (("search/visit_entropy", "-", ""),)),
    Panel("age of the priorities", "updates", (2, 2), (("search/priority_age", "-", ""),)),
)  # fmt: skip

COLUMNS = (
    "iteration", "env_steps", "updates", "wall_s", "charts/episodic_return", "charts/episodes",
    "losses/loss", "losses/value_prefix_loss", "losses/value_loss", "losses/policy_loss", "losses/consistency_loss",
    "train/value_abs_max", "train/value_target", "search/visit_entropy", "search/priority_age",
    "train/grad_norm", "train/learning_rate", "train/skipped_updates",
)  # fmt: skip
"""Of the CSV, after the name of the run."""
HEAD = ("environment", "preset", "seed", "device", "environment steps", "updates", "wall-clock", "mean score", "human-normalised")


def to_csv(runs: Sequence[Recorded], labels: Sequence[str]) -> str:
    """All rows of all runs, the name of the run first; a cell is empty where a row has no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", *COLUMNS))
    for run, label in zip(runs, labels, strict=True):
        writer.writerows((label, *(row.get(key) for key in COLUMNS)) for row in run.rows)
    return text.getvalue()


def table(runs: Sequence[Recorded], labels: Sequence[str]) -> str:
    """A table for BENCHMARKS.md, a line a run; of several, the name of the run first."""
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, runs)]
    if len(runs) > 1:
        lines = [(first, *cells) for first, cells in zip(("run", "---", *labels), lines, strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(run: Recorded) -> tuple[str, ...]:
    env_steps, updates, human, played = run.last["env_steps"], run.last["updates"], "-", run.evaluation
    if played:
        score = f"{played['mean']:.2f} over {played['episodes']} episodes"
        if (played["env_steps"], played["updates"]) != (env_steps, updates):
            score += f", played after {played['env_steps']:,} steps and {played['updates']:,} updates"
        share = human_share(run.env, played)
        human = "-" if share is None else f"{share:.3f}"
    else:
        returns = [row["charts/episodic_return"] for row in run.rows if row.get("charts/episodic_return") is not None]
        score = "none yet" + (f" (the last games of training {returns[-1]:.2f})" if returns else "")
    return (
        run.env, run.config["preset"], str(run.config["seed"]), run.config["device"], f"{env_steps:,}", f"{updates:,}",
        clock(run.last["wall_s"]) + ("" if run.summary else ", unfinished"), score, human,
    )  # fmt: skip


def points(run: Recorded, x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of the rows that have both; over the updates, of those since the first update: before it there is but one place."""
    pairs = [(row.get(x), row.get(y)) for row in run.rows]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None and (x != "updates" or a > 0)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def figure_of(runs: Sequence[Recorded], labels: Sequence[str]) -> Any:
    """The picture, a matplotlib Figure. `runs` are of one environment; each has a colour. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(SIZE, dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(3, 4)
    figure.suptitle(title_of(runs), fontsize=13)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    draw_return(figure.add_subplot(grid[:2, :2]), runs, labels)
    for panel in PANELS:
        axes = figure.add_subplot(grid[panel.place])
        for number, run in enumerate(runs):
            for key, style, name in panel.curves:
                axes.plot(*points(run, "updates", key), style, color=f"C{number}", linewidth=1.1, label=name if number == 0 else "")
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(thousands)
            axes.yaxis.set_minor_locator(NullLocator())
        finish(axes, panel.title, "updates", panel.unit)
        if len(panel.curves) > 1:
            explain_styles(axes, runs)
    draw_progress(figure.add_subplot(grid[2, 3]), runs)
    return figure


def title_of(runs: Sequence[Recorded]) -> str:
    """Of a single run all that names it, of several what they share."""
    if len(runs) > 1:
        return f"{runs[0].env}, {len(runs)} runs"
    run, config = runs[0], runs[0].config
    how_far = "" if run.summary else f", unfinished at {run.last['env_steps']:,} of {config['env_steps']:,} environment steps"
    return f"{run.env}, preset {config['preset']}, seed {config['seed']}, {config['device']}{how_far}"


def draw_return(axes: Any, runs: Sequence[Recorded], labels: Sequence[str]) -> None:
    """The return against the environment steps, the evaluation as a point, random and human play as lines."""
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        colour, played = f"C{number}", run.evaluation
        score = f"evaluation: {played['mean']:.2f} over {played['episodes']} episodes" if played else ""
        name = "last games of training" if len(runs) == 1 else ", ".join(filter(None, (label, score)))
        axes.plot(*points(run, "env_steps", "charts/episodic_return"), color=colour, linewidth=1.5, label=name)
        if played:
            axes.plot(
                [played["env_steps"]], [played["mean"]], "D", color=colour, markersize=9, markeredgecolor="black", clip_on=False, zorder=3,
                label=score if len(runs) == 1 else "",
            )  # fmt: skip
    if reference := ATARI_100K.get(runs[0].env):
        axes.axhline(reference.human, color="0.35", linestyle="--", linewidth=1, label=f"human: {reference.human:g}")
        axes.axhline(reference.random, color="0.35", linestyle=":", linewidth=1, label=f"random: {reference.random:g}")
    finish(axes, "return of whole games", "environment steps", "score, not clipped")
    # Below the panel, where it covers no curve.
    axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def draw_progress(axes: Any, runs: Sequence[Recorded]) -> None:
    """Environment steps and updates against the clock."""
    longest = max(run.rows[-1]["wall_s"] for run in runs)
    scale, unit = next((scale, unit) for scale, unit in ((3600, "h"), (60, "min"), (1, "s")) if longest >= 2 * scale or scale == 1)
    for number, run in enumerate(runs):
        for key, style, name in (("env_steps", "-", "environment steps"), ("updates", ":", "updates")):
            seconds, counts = points(run, "wall_s", key)
            label = name if number == 0 else ""
            axes.plot([second / scale for second in seconds], counts, style, color=f"C{number}", linewidth=1.3, label=label)
    finish(axes, "progress", f"wall-clock, {unit}", "count")
    explain_styles(axes, runs)
    axes.yaxis.set_major_formatter(thousands)


def finish(axes: Any, title: str, x: str, y: str) -> None:
    """Names and scales of a panel."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if not x.startswith("wall-clock"):
        axes.xaxis.set_major_formatter(thousands)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color="0.5")


def explain_styles(axes: Any, runs: Sequence[Recorded]) -> None:
    """A legend of the line styles; of several runs in no run's colour."""
    for handle in axes.legend(fontsize=8, framealpha=0.9).get_lines():
        handle.set_color("0.3" if len(runs) > 1 else handle.get_color())


@dataclass
class Arguments:
    """Draw the learning curve of one or several runs, and print their table for BENCHMARKS.md."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """Where OUT.csv and OUT.png go; default: docs/runs/ and the names of the runs."""
    labels: tuple[str, ...] = ()
    """A name for each run; default: its folder's, or its path where two folders have one name."""
    picture: bool = True
    """Draw OUT.png, which needs matplotlib."""


def write(arguments: Arguments) -> tuple[list[Recorded], Sequence[str], list[Path]]:
    """Write the CSV and the picture; returns the runs, their labels and the files. Writes nothing if an argument is wrong.

    Raises:
        RunError: one line.
        OSError: the files cannot be written.
    """
    folders = arguments.runs
    if not 0 < len(folders) <= MOST_RUNS:
        raise RunError(f"RUN_DIR: {len(folders)} runs; give at least one, and no more than the {MOST_RUNS} that can be told apart")
    names = [folder.resolve().name for folder in folders]
    labels = arguments.labels or (names if len(set(names)) == len(names) else [str(folder) for folder in folders])
    if len(labels) != len(folders):
        raise RunError(f"--labels: {len(labels)} for {len(folders)} runs; give one for each")
    runs = [read(folder) for folder in folders]
    if odd := next((run for run in runs if run.env != runs[0].env), None):
        raise RunError(f"{odd.folder}: is of {odd.env}, and {runs[0].folder} of {runs[0].env}; give runs of one environment")
    out = arguments.out or Path("docs/runs") / "_".join(names)
    files = {out.with_name(out.name + ".csv"): to_csv(runs, labels).encode()}
    if arguments.picture:
        try:
            picture = io.BytesIO()
            figure_of(runs, labels).savefig(picture, format="png")
            files[out.with_name(out.name + ".png")] = picture.getvalue()
        except ImportError:
            raise RunError("matplotlib is missing: pip install 'speedyzero[plot]', or give --no-picture") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        with replacing(path) as file:
            file.write(content)
    return runs, labels, list(files)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="curve")
    try:
        runs, labels, written = write(arguments)
    except RunError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out {arguments.out}: {error.strerror or error} ({error.filename}); give another")
    for run in runs:
        if run.left_out:
            print(f"{run.folder / 'metrics.jsonl'}: left out {run.left_out} unreadable or repeated lines", file=sys.stderr)
    print(f"wrote {' and '.join(map(str, written))}")
    print(table(runs, labels))


if __name__ == "__main__":
    main()
