"""Write the agent of a run to one file, with a model card beside it. `python -m speedyzero.export RUN agent.safetensors`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from speedyzero import __version__, agent_file
from speedyzero.agent_file import AgentFile
from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.files import replacing
from speedyzero.run.trained import make_trained_network, read_run, read_scores
from speedyzero.snapshot import fold, make_snapshot

LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def export(run_dir: Path, out: Path, which: str = "newest", license: str = "apache-2.0") -> AgentFile:
    """Write the agent of a run's checkpoint to `out`, and its model card to the same name with `.md`. Returns what the file holds.

    The file holds the folded network in the precision that acts, so that it acts exactly as the run does.

    Raises:
        ConfigError, EnvError, CheckpointError: one line each.
        OSError: the disk refuses.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: the file of an agent ends in .safetensors, as agent.safetensors")
    if not LICENSE.fullmatch(license):
        raise ConfigError(f"--license {license!r}: give a licence's identifier, as apache-2.0 or cc-by-4.0")
    run = read_run(run_dir, which)
    network = make_trained_network(run, torch.device("cpu"))
    snapshot = make_snapshot(network.spec, torch.device("cpu"), run.config.amp)
    fold(network, snapshot)
    counts = run.meta["env_steps"], run.meta["updates"]
    scores = read_scores(run_dir, *counts)
    agent = AgentFile(snapshot.state_dict(), run.config, run.spec, *counts, run.path.name, scores, __version__, license)
    out.parent.mkdir(parents=True, exist_ok=True)
    agent_file.write(out, agent)
    with replacing(out.with_suffix(".md")) as card:
        card.write(model_card(agent, out).encode())
    return agent


def model_card(agent: AgentFile, path: Path) -> str:
    """The card in Markdown: front matter as model hubs read it, the scores and how they were made, how to play, how it was trained."""
    config, spec = agent.config, agent.spec
    channels, height, width = spec.frame_shape
    weights = sum(tensor.numel() for tensor in agent.tensors.values())
    search = "Gumbel" if config.search == "gumbel" else "pUCT"
    return f"""---
{_front_matter(agent)}---

# EfficientZero on {spec.env_id}

An agent trained with speedyzero {agent.version}: {agent.env_steps:,} environment steps,
{agent.updates:,} updates. `{path.name}` was made from `{agent.checkpoint}`: the {weights:,}
numbers of its network, BatchNorm folded, and all settings.

## Scores

{_scores(agent)}

## Use

```python
import envpool, speedyzero

agent = speedyzero.load("{path.name}")
envs = envpool.make_gymnasium(agent.env_id, num_envs=4, **agent.env_settings)
observations, _ = envs.reset()
done = None
for _ in range(1000):
    actions = agent.act(observations, done)
    observations, rewards, terminated, truncated, _ = envs.step(actions)
    done = terminated | truncated
```

`python -m speedyzero.watch {path.name}` plays a game and writes a video of it.

## What it sees and how it acts

It sees {_many(config.frame_stack, "frame")} of {channels} x {height} x {width} and has {spec.num_actions} actions. Each action is the best
of a {search} search of {config.simulations} simulations, without noise. {_precision(config)}

## Training

EfficientZero (Ye et al., NeurIPS 2021), preset `{config.preset}`, seed {config.seed}, on {config.device}:
{_many(config.lanes, "environment")} side by side, batches of {config.batch_size}, learning rate {config.lr:g},
discount {config.discount:.4f}, rewards {"clipped to their sign" if config.clip_reward else "as they are"}. The file's metadata has every
setting.
"""


def _front_matter(agent: AgentFile) -> str:
    spec = agent.spec
    tags = ["reinforcement-learning", "muzero", "efficientzero", *(["atari"] if spec.family == "atari" else []), spec.env_id]
    lines = [f"license: {agent.license}", "library_name: speedyzero", "tags:", *(f"- {tag}" for tag in tags)]
    if agent.scores:
        lines += [
            "model-index:", "- name: EfficientZero", "  results:", "  - task:", "      type: reinforcement-learning",
            "      name: reinforcement-learning", "    dataset:", f"      name: {spec.env_id}", f"      type: {spec.env_id}",
            "    metrics:", "    - type: mean_reward", "      name: mean_reward",
            f"      value: {agent.scores['mean']:.2f} +/- {agent.scores['std']:.2f}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _many(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _precision(config: Config) -> str:
    if not config.amp:
        return "The\nweights are in fp32."
    return (
        "The\nweights are in bf16, which is what acted in training. A CPU without bf16 instructions computes\n"
        "with them in fp32, where a close choice may differ."
    )


def _scores(agent: AgentFile) -> str:
    scores = agent.scores
    if not scores:
        return "This checkpoint was not evaluated."
    rows = [("mean", f"{scores['mean']:.2f}"), ("standard deviation", f"{scores['std']:.2f}"), ("median", f"{scores['median']:.2f}"),
            ("least, greatest", f"{min(scores['scores']):g}, {max(scores['scores']):g}")]  # fmt: skip
    if scores.get("human_normalised") is not None:
        rows.append(("human-normalised mean", f"{scores['human_normalised']:.3f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    how = "Whole games"
    if agent.spec.family == "atari":
        sticky = agent.config.sticky_actions
        how += f" begun with up to 30 no-ops, four frames a step, {f'sticky actions {sticky:g}' if sticky else 'no sticky actions'},"
        how += "\nunclipped rewards"
    if any(scores.get("cut", [])):
        how = f"{sum(scores['cut'])} of the games were cut by a limit; {how[0].lower()}{how[1:]}"
    return f"| {scores['episodes']} games | score |\n|---|---|\n{table}\n\n{how}; seed {scores['seed']}; the best action of each search."


@dataclass
class Arguments:
    """Write the agent of a run to one file, and a model card beside it."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file to write, as agent.safetensors; the card goes to agent.md."""
    checkpoint: str = "newest"
    """Which one: newest, best (of the best games while training), or a file."""
    license: str = "apache-2.0"
    """Licence of the weights, an identifier as model hubs know it."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m speedyzero.export")
    out = arguments.out
    try:
        agent = export(arguments.run_dir, out, arguments.checkpoint, arguments.license)
        print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, from {agent.checkpoint}; {out.with_suffix('.md')}: its model card")
        if not agent.scores:
            print(f"no scores: this checkpoint was not evaluated; python -m speedyzero.evaluate {arguments.run_dir}, then export again")
    except (ConfigError, EnvError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {out}: {error.strerror or error}; make it writable, make room, or give another file")


if __name__ == "__main__":
    main()
