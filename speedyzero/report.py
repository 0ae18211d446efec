"""One HTML page about one or several runs, finished or not, that needs nothing beside it: `python -m speedyzero.report RUN...`.

Runs that differ in nothing but their seed share a colour: each seed is a faint line, their IQM a bold one with a bootstrapped interval.
"""

from __future__ import annotations

import base64
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from speedyzero.aggregate import STATISTICS, Estimate, aggregate, band
from speedyzero.chart import Area, Level, Line, Mark, chart
from speedyzero.diagnosis import concerns
from speedyzero.envs import EnvError, describe
from speedyzero.published import ATARI_100K_RESULTS
from speedyzero.run.files import replacing
from speedyzero.run.record import Recorded, RunError, clock, evaluations, human_share, read, thousands
from speedyzero.scores import ATARI_100K

COLOURS = 8
MOST_EMBEDDED = 24 << 20
"""Bytes of a video or a picture that goes into the page; of a larger one the path."""
NOT_LEARNING = {
    "run_dir", "resume", "env_threads", "log_interval", "checkpoint_interval", "keep", "checkpoint_ring", "watchdog", "graph",
    "max_skipped", "track", "wandb_project_name", "wandb_entity", "speedyzero",
}  # fmt: skip
"""Settings that no score depends on."""
RETURN = "charts/episodic_return"


class Panel(NamedTuple):
    """A small chart over the environment steps. key: of a row of metrics. training: leave out the rows before the first update."""

    title: str
    note: str
    key: str
    log: bool = False
    training: bool = False


PANELS = (
    Panel("Value prefix loss", "cross entropy, nats", "losses/value_prefix_loss", log=True),
    Panel("Value loss", "cross entropy, nats", "losses/value_loss", log=True),
    Panel("Policy loss", "cross entropy, nats", "losses/policy_loss"),
    Panel("Consistency loss", "negative cosine", "losses/consistency_loss"),
    Panel("Mean value target", "discounted return", "train/value_target"),
    Panel("Greatest predicted value", "absolute", "train/value_abs_max"),
    Panel("Entropy of the visits", "nats", "search/visit_entropy"),
    Panel("Depth of the search", "edges", "search/depth"),
    Panel("Age of the priorities", "updates", "search/priority_age"),
    Panel("Priorities against those of now", "rank correlation", "train/priority_rank_correlation"),
    Panel("Norm of the gradient", "before clipping", "train/grad_norm", log=True),
    Panel("Speed", "environment steps a second, in training", "time/env_steps_per_s", log=True, training=True),
    Panel("Length of a game", "steps", "charts/episodic_length"),
)
MEDIA = (
    ("*.mp4", "video", "video/mp4"), ("*.webm", "video", "video/webm"), ("*.gif", "image", "image/gif"),
    ("tree*.svg", "tree", "image/svg+xml"),
)  # fmt: skip
"""What is shown of a run directory: pattern, kind, and type. A tree that is a PNG alone is shown, too."""


@dataclass
class Group:
    """Runs of one environment and one set of settings: its seeds."""

    name: str
    colour: int
    runs: list[tuple[str, Recorded]] = field(default_factory=list)
    """With the name of each."""


def differing(runs: Sequence[Recorded], without: set[str] = NOT_LEARNING) -> list[str]:
    """The settings in which some of the runs differ; what only one of them has counts as differing."""
    names = sorted(set().union(*(run.config for run in runs)) - without)
    return [name for name in names if any(run.config.get(name) != runs[0].config.get(name) for run in runs)]


def grouped(runs: Mapping[str, Recorded]) -> list[Group]:
    """The runs of one environment by their settings, named by what tells them apart."""
    names = [name for name in differing(list(runs.values())) if name != "seed"]
    groups: dict[tuple[str, ...], Group] = {}
    for name, run in runs.items():
        key = tuple(_value(run.config.get(setting)) for setting in names)
        told = ", ".join(f"{setting} {value}" for setting, value in list(zip(names, key, strict=True))[:3])
        group = groups.setdefault(key, Group(told or name, len(groups) % COLOURS))
        group.runs.append((name, run))
    for group in groups.values():
        if len(groups) == len(runs):
            group.name = group.runs[0][0]
        elif not names:
            group.name = f"{len(group.runs)} seeds"
    return list(groups.values())


def _value(value: Any) -> str:
    """A setting for a person."""
    if value is None:
        return "-"
    if isinstance(value, dict):  # the software
        value = list(value.values())
    return " ".join(map(_value, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """A score or a count: 12,345 or 3.14."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"


def axis(value: float) -> str:
    """A label of an axis, with a true minus sign."""
    return thousands(float(f"{value:.6g}")).replace("-", "\u2212")


def points(run: Recorded, x: str, y: str, scale: float = 1.0, training: bool = False) -> tuple[list[float], list[float]]:
    """Two columns of the rows that have both, x divided by `scale` and ascending, the last row of each x; training: see `Panel`."""
    rows = (row for row in run.rows if row["updates"] or not training)
    found: dict[float, float] = {row[x] / scale: row[y] for row in rows if row.get(x) is not None and row.get(y) is not None}
    xs = sorted(found)
    return xs, [found[x] for x in xs]


def drawn(groups: Sequence[Group], x: str, y: str, scale: float = 1.0, training: bool = False) -> tuple[list[Line], list[Area]]:
    """The curves of all runs, and of groups of several seeds their IQM and its interval."""
    lines, areas = [], []
    for group in groups:
        curves = [points(run, x, y, scale, training) for _, run in group.runs]
        middle = band([curve for curve in curves if curve[0]])
        for (name, _), curve in zip(group.runs, curves, strict=True):
            lines.append(Line(*curve, f"s{group.colour} faint" if middle else f"s{group.colour}", "" if middle else name))
        if middle:
            areas.append(Area(middle.x.tolist(), middle.low.tolist(), middle.high.tolist(), f"s{group.colour}"))
            lines.append(Line(middle.x.tolist(), middle.middle.tolist(), f"s{group.colour}", f"{group.name}, IQM"))
    return lines, areas


def legend(groups: Sequence[Group], marks: bool) -> Markup:
    """The colours of the groups, and what lines and diamonds are."""
    parts = [f'<span><span class="dot s{group.colour}"></span>{escape(group.name)}</span>' for group in groups]
    if any(len(group.runs) > 1 for group in groups):
        parts.append("<span>faint: one seed; bold: IQM; shaded: its 95 % interval</span>")
    if marks:
        parts.append('<span><span class="dot diamond"></span>evaluation</span>')
    return Markup(f'<div class="legend">{"".join(parts)}</div>') if len(parts) > 1 or marks else Markup("")


def return_figures(groups: Sequence[Group], env: str) -> list[dict[str, Any]]:
    """The return over environment steps and over wall-clock."""
    runs = [run for group in groups for _, run in group.runs]
    longest = max(run.rows[-1]["wall_s"] for run in runs)
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    scale, unit = next((scale, unit) for scale, unit in units if longest >= 2 * scale or scale == 1)
    reference = ATARI_100K.get(env)
    levels = [Level(reference.human, "human"), Level(reference.random, "random")] if reference else []
    figures = []
    axes = (("over environment steps", "env_steps", 1.0, "environment steps"), ("over wall-clock", "wall_s", scale, unit))
    for title, x, per, name in axes:
        lines, areas = drawn(groups, x, RETURN, per)
        marks = [
            Mark(at / per, one["mean"], f"s{group.colour}", f"{name_of}: {one['mean']:.2f} over {one['episodes']} games")
            for group in groups for name_of, run in group.runs for one in evaluations(run.folder)
            if (at := one["env_steps"] if x == "env_steps" else _second(run, one)) is not None
        ]  # fmt: skip
        svg = chart(
            lines, areas=areas, marks=marks, levels=levels, width=520, height=310, label=f"return {title}", x_name=name,
            x_format=axis, y_format=axis,
        )  # fmt: skip
        figures.append({"title": title.capitalize(), "svg": Markup(svg)})
    return figures


def _second(run: Recorded, evaluation: Mapping[str, Any]) -> float | None:
    """When a run had made the updates of an evaluation; None if no row says."""
    return next((row["wall_s"] for row in run.rows if row["updates"] >= evaluation["updates"]), run.last.get("wall_s"))


def panel_figures(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The small charts of what any run has."""
    figures = []
    for panel in PANELS:
        lines, areas = drawn(groups, "env_steps", panel.key, training=panel.training)
        if any(line.x for line in lines):
            svg = chart(lines, areas=areas, label=panel.title, x_name="environment steps", x_format=axis, y_format=axis, log=panel.log)
            figures.append({"title": panel.title, "note": panel.note, "svg": Markup(svg)})
    return figures


def score_row(name: str, run: Recorded, colour: int) -> list[dict[str, Any]]:
    """A row for each evaluation of a run, or one without."""
    played = evaluations(run.folder)
    returns = points(run, "env_steps", RETURN)[1]
    total = run.config["env_steps"]
    common = {
        "name": name, "colour": colour, "seed": run.config["seed"], "wall": clock(run.last["wall_s"]),
        "steps": f"{run.last['env_steps']:,}" + ("" if run.summary else f" of {total:,}"),
        "training": number(returns[-1]) if returns else "-",
    }  # fmt: skip
    if not played:
        return [{**common, "evaluation": "none yet", "median": "-", "games": "-", "human": "-", "checkpoint": "-"}]
    rows = []
    for order, one in enumerate(reversed(played)):
        share, cut, episodes = human_share(run.env, one), sum(one.get("cut", [])), one["episodes"]
        remarks = [f"{cut} cut"] if cut else []
        if (distinct := one.get("distinct_games", episodes)) < episodes:
            remarks.append(f"{distinct} distinct")
        if one.get("sticky_actions"):
            remarks.append(f"sticky {one['sticky_actions']:g}")
        rows.append({
            **(common if order == 0 else dict.fromkeys(common, "")),
            "evaluation": f"{number(one['mean'])} ± {number(one['std'])}", "median": number(one["median"]),
            "games": f"{episodes}" + (f" ({', '.join(remarks)})" if remarks else ""),
            "human": "-" if share is None else f"{share:.3f}",
            "checkpoint": Path(one.get("checkpoint", "-")).stem.removeprefix("checkpoint_").lstrip("0"),
        })  # fmt: skip
    return rows


def tiles(groups: Sequence[Group], env: str) -> list[dict[str, str]]:
    """The few numbers that a reader looks for first."""
    runs = [run for group in groups for _, run in group.runs]
    if len(groups) == 1:
        finals = [run.evaluation for run in runs if run.evaluation]
        shares = [share for one in finals if (share := human_share(env, one)) is not None]
        found = []
        if finals:
            score = number(sum(one["mean"] for one in finals) / len(finals))
            games = f"{finals[0]['episodes']} games" if len(finals) == 1 else f"mean of {len(finals)} seeds"
            found.append({"name": "Score", "value": score, "note": games})
        elif returns := [values[-1] for run in runs if (values := points(run, "env_steps", RETURN)[1])]:
            found.append({"name": "Return so far", "value": number(sum(returns) / len(returns)), "note": "last games of training"})
        if shares:
            found.append({"name": "Human-normalised", "value": f"{sum(shares) / len(shares):.3f}", "note": "0 random, 1 human"})
    else:
        found = [{"name": "Runs", "value": str(len(runs)), "note": f"{len(groups)} settings"}]
        best = max((run for run in runs if run.evaluation), key=lambda run: run.evaluation["mean"], default=None)
        if best is not None:
            name = next(name for group in groups for name, run in group.runs if run is best)
            found.append({"name": "Best score", "value": number(best.evaluation["mean"]), "note": name})
    steps, total = max(run.last["env_steps"] for run in runs), max(run.config["env_steps"] for run in runs)
    done = all(run.summary for run in runs)
    found.append({"name": "Environment steps", "value": thousands(round(steps, -2) if steps >= 1000 else steps),
                  "note": "complete" if done else f"of {thousands(total)}, unfinished"})  # fmt: skip
    updates, spent = max(run.last["updates"] for run in runs), sum(run.last["wall_s"] for run in runs)
    found.append({"name": "Updates", "value": thousands(round(updates, -2) if updates >= 1000 else updates),
                  "note": f"of {runs[0].config['batch_size']} positions"})  # fmt: skip
    found.append({"name": "Wall-clock", "value": clock(spent / len(runs)),
                  "note": f"on {runs[0].config['device']}" if len(runs) == 1 else "a run, on average"})  # fmt: skip
    return found


PHASES = ("random start", "first sweep", "training", "updates after the last step")


def phase_seconds(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds that each of PHASES took, from the counts of the rows; the time between two rows goes to what the later one did."""
    spent = [0.0] * len(PHASES)
    before: Mapping[str, Any] = {"env_steps": 0, "updates": 0, "wall_s": 0.0}
    for row in rows:
        steps, updates = row["env_steps"] > before["env_steps"], row["updates"] > before["updates"]
        phase = 2 if steps and updates else 3 if updates else 0 if steps else 1
        spent[phase] += max(0.0, row["wall_s"] - before["wall_s"])
        before = row
    return spent


def time_bars(groups: Sequence[Group]) -> dict[str, Any]:
    """Where each run's time went, by phase."""
    rows = []
    for name, run in (pair for group in groups for pair in group.runs):
        spent = phase_seconds(run.rows)
        total = sum(spent) or 1.0
        parts = [{"colour": index, "share": round(100 * seconds / total, 2)} for index, seconds in enumerate(spent) if seconds]
        text = ", ".join(f"{phase} {clock(seconds)}" for phase, seconds in zip(PHASES, spent, strict=True) if seconds)
        pause = max(row.get("time/checkpoint_pause_s") or 0.0 for row in run.rows)
        text += f"; longest pause for a checkpoint {pause * 1000:,.0f} ms"
        rows.append({"name": name, "total": clock(total), "text": text, "parts": parts})
    return {"names": PHASES, "rows": rows}


def media(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Videos and trees that lie in the run directories, embedded."""
    found = []
    for name, run in (pair for group in groups for pair in group.runs):
        chosen = [(path, kind, mime) for pattern, kind, mime in MEDIA for path in sorted(run.folder.glob(pattern))]
        with_svg = {path.stem for path, *_ in chosen}
        chosen += [(path, "tree", "image/png") for path in sorted(run.folder.glob("tree*.png")) if path.stem not in with_svg]
        for path, kind, mime in chosen:
            title = f"{name}: {path.name}"
            if path.stat().st_size > MOST_EMBEDDED:
                found.append({"title": title, "kind": "path", "data": f"{path} is too large for a page ({path.stat().st_size >> 20} MiB)"})
            else:
                data = base64.b64encode(path.read_bytes()).decode()
                found.append({"title": title, "kind": kind, "data": Markup(f"data:{mime};base64,{data}")})
    return found


def worries(groups: Sequence[Group], env: str) -> list[dict[str, str]]:
    """The concerns about each run; a run of an environment that is not installed has those that need no number of actions."""
    found = []
    runs = [pair for group in groups for pair in group.runs]
    for name, run in runs:
        try:
            actions = describe(env, frame_size=run.config.get("frame_size"), gray=run.config.get("gray")).num_actions
        except EnvError:
            actions = None
        said = name if len(runs) > 1 else ""
        found += [{"title": one.title, "text": one.text, "run": said} for one in concerns(run.config, run.rows, actions)]
    return found


def game_section(env: str, runs: Mapping[str, Recorded]) -> dict[str, Any]:
    """All that the page says of the runs of one environment."""
    groups = grouped(runs)
    marks = any(evaluations(run.folder) for run in runs.values())
    return {
        "env": env,
        "id": "".join(letter if letter.isalnum() else "-" for letter in env),
        "tiles": tiles(groups, env),
        "concerns": worries(groups, env),
        "legend": legend(groups, marks),
        "colours": legend(groups, False),
        "returns": return_figures(groups, env),
        "scores": [row for group in groups for name, run in group.runs for row in score_row(name, run, group.colour)],
        "media": media(groups),
        "panels": panel_figures(groups),
        "time": time_bars(groups),
    }


def shares_by_game(runs: Sequence[Recorded]) -> dict[str, list[float]]:
    """The human-normalised scores of the runs' evaluations, by game; a run without one is left out."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.evaluation and (share := human_share(run.env, run.evaluation)) is not None:
            found.setdefault(run.env, []).append(share)
    return found


def estimate_text(estimate: Estimate) -> str:
    """A statistic and its interval: 1.234 (1.1 to 1.4)."""
    return f"{estimate.value:.3f}" + ("" if estimate.low is None else f" ({estimate.low:.2f} to {estimate.high:.2f})")


def aggregate_rows(shares: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """These runs, and over the same games or all 26 those that others published."""
    mine = aggregate([shares[env] for env in sorted(shares)])
    seeds = sorted({len(scores) for scores in shares.values()})
    rows = [{
        "name": "these runs", "games": len(shares), "seeds": " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))),
        "cells": [estimate_text(mine[name]) for name in STATISTICS], "note": "",
    }]  # fmt: skip
    for other in ATARI_100K_RESULTS:
        values = (other.mean, other.median, other.iqm, other.optimality_gap)
        rows.append({
            "name": other.name, "games": len(ATARI_100K), "seeds": "",
            "cells": ["" if value is None else f"{value:.3f}" for value in values],
            "note": f"{other.env_steps // 1000}k steps; {other.source}" + (f"; {other.note}" if other.note else ""),
        })  # fmt: skip
    return rows


def page(folders: Sequence[Path]) -> str:
    """The page about the runs in `folders`. Raises RunError."""
    names = labels(folders)
    runs = {name: read(folder) for name, folder in zip(names, folders, strict=True)}
    every = list(runs.values())
    by_env: dict[str, dict[str, Recorded]] = {}
    for name, run in runs.items():
        by_env.setdefault(run.env, {})[name] = run
    games = [game_section(env, some) for env, some in sorted(by_env.items())]
    shares = shares_by_game(every)
    unlike = differing(every, {"run_dir", "resume"})
    config = every[0].config
    if len(every) == 1:
        title, search = config["env"], f"{config['search']} search with {config['simulations']} simulations"
        subtitle = f"preset {config['preset']}, seed {config['seed']}, {config['device']}, {search} · {names[0]}"
    else:
        title = next(iter(by_env)) if len(by_env) == 1 else f"{len(by_env)} environments"
        subtitle = f"{len(every)} runs: {', '.join(itertools.islice(names, 6))}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    environment = Environment(loader=PackageLoader("speedyzero"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(
        title=title, subtitle=subtitle, games=games, names=names, statistics=list(STATISTICS),
        aggregates=aggregate_rows(shares) if len(shares) > 1 else None,
        differing=[{"name": name, "cells": [_value(run.config.get(name)) for run in every]} for name in unlike],
        shared=[(name, _value(config[name])) for name in sorted(config) if name not in {*unlike, "run_dir", "resume"}],
        footer=f"speedyzero {version()} · written {datetime.now():%Y-%m-%d %H:%M} · how games are played and scored: docs/PROTOCOL.md",
    )  # fmt: skip


def version() -> str:
    """Of the package; "from a checkout" where it is not installed."""
    try:
        return metadata.version("speedyzero")
    except metadata.PackageNotFoundError:
        return "from a checkout"


def labels(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, or their paths where two have one name. Raises RunError: no folder, or one twice."""
    if not folders:
        raise RunError("RUN: give at least one folder of a run")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(folders):
        raise RunError("RUN: a folder was given twice")
    names = [folder.name for folder in resolved]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


@dataclass
class Arguments:
    """Write one HTML page about one or several runs, finished or not."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Folders of runs. Those that differ in nothing but the seed are drawn as one."""
    out: Path | None = None
    """The page; default: report.html in the run's folder, or of several in the current one."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m speedyzero.report")
    out = arguments.out or (arguments.runs[0] / "report.html" if len(arguments.runs) == 1 else Path("report.html"))
    try:
        text = page(arguments.runs)
        with replacing(out) as file:
            file.write(text.encode())
    except RunError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out {out}: {error.strerror or error} ({error.filename}); make it writable, make room, or give another file")
    print(f"{out}: {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
