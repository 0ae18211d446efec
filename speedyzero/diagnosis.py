"""Rules by which a run looks wrong, for whoever shows one: the report from its rows of metrics, `tools.inspect` from its state.

A rule that does not hold is a reason to look, no proof. docs/DIAGNOSIS.md says what each was seen to mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]

SURE, UNDECIDED = 0.05, 0.98
"""Shares of the greatest entropy between which that of the visits is expected."""
OLD = 1_000
"""Updates after which a stored value holds back all that leads to it (docs/DESIGN.md, Cached targets)."""
NEAR = 0.9
"""Share of the greatest value that --support can express."""
LAST = 0.2
"""Share of the rows of training, the newest, that a rule looks at."""
FEWEST = 20
"""Rows of training before anything is said of its trend."""
APART = 0.5
"""Mean value and mean return of opposite sign count as such from this value on; a tenth of a game of Pong."""


class Concern(NamedTuple):
    """Something to look at. title: a few words. text: the numbers and what they may mean."""

    title: str
    text: str


def undecided(entropy: float, actions: int) -> bool:
    """Whether visits of this entropy (nats) are as good as uniform."""
    return entropy > UNDECIDED * math.log(actions)


def collapsed(entropy: float, actions: int) -> bool:
    """Whether visits of this entropy (nats) are as good as one action alone."""
    return entropy < SURE * math.log(actions)


def greatest_value(support: int) -> float:
    """The greatest scalar that -support..support can express: the inverse of h(x) = sign(x)(sqrt(|x| + 1) - 1) + 0.001 x."""
    epsilon = 0.001
    return ((math.sqrt(1 + 4 * epsilon * (support + 1 + epsilon)) - 1) / (2 * epsilon)) ** 2 - 1


def _newest(rows: Rows, key: str) -> list[float]:
    """The newest values of a metric in training; none if training has only begun."""
    values = [row[key] for row in rows if row["updates"] and row.get(key) is not None]
    return values[-max(1, round(LAST * len(values))) :] if len(values) >= FEWEST else []


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _entropy(config: Mapping[str, Any], rows: Rows, actions: int | None) -> Concern | None:
    values = _newest(rows, "search/visit_entropy")
    if not values or actions is None:
        return None
    entropy, most = _middle(values), math.log(actions)
    if collapsed(entropy, actions):
        return Concern("Entropy collapsed", f"The visits have an entropy of {entropy:.3g} nats of {most:.3g}: nearly all go to one action. "
                       "Right for an agent that is sure; a policy made of noise where the score is low (--value-delta-min).")  # fmt: skip
    if undecided(entropy, actions):
        return Concern("Searches undecided", f"The visits have an entropy of {entropy:.3g} nats of {most:.3g}: as good as uniform. The "
                       "policy targets teach nothing yet.")  # fmt: skip
    return None


def _priorities(config: Mapping[str, Any], rows: Rows, actions: int | None) -> Concern | None:
    values = _newest(rows, "search/priority_age")
    if values and (age := _middle(values)) > OLD:
        return Concern("Stale priorities", f"Priorities are {age:,.0f} updates old on average. A value of that age holds "
                       "back all that leads to it: raise --refresh-roots or --refresh-values.")  # fmt: skip
    return None


def _skipped(config: Mapping[str, Any], rows: Rows, actions: int | None) -> Concern | None:
    skipped, updates = rows[-1].get("train/skipped_updates") or 0, rows[-1]["updates"]
    if skipped:
        return Concern("Updates skipped", f"{skipped:,} of {updates:,} updates were skipped, their loss, gradient or statistics not being "
                       "finite: lower --lr or --max-grad-norm.")  # fmt: skip
    return None


def _support(config: Mapping[str, Any], rows: Rows, actions: int | None) -> Concern | None:
    values, most = _newest(rows, "train/value_abs_max"), greatest_value(config["support"])
    if values and max(values) > NEAR * most:
        return Concern("Values at their limit", f"A value of {max(values):.4g} was predicted; --support {config['support']} can express "
                       f"{most:.4g}. If returns are that large take more support, if not a lower --lr.")  # fmt: skip
    return None


def _returns(config: Mapping[str, Any], rows: Rows, actions: int | None) -> Concern | None:
    values, returns = _newest(rows, "train/value_target"), _newest(rows, "charts/episodic_return")
    if not values or not returns:
        return None
    value, score = _middle(values), _middle(returns)
    bound = 1 / (1 - config["discount"]) if config["discount"] < 1 else math.inf
    if config["clip_reward"] and abs(value) > bound:
        return Concern("Values out of line with returns", f"The mean value target is {value:.3g}; rewards of at most 1 at a discount of "
                       f"{config['discount']:.4g} cannot give more than {bound:.3g}.")  # fmt: skip
    if not config["clip_reward"] and abs(value) > max(abs(one) for one in returns) + APART:
        return Concern("Values out of line with returns", f"The mean value target is {value:.3g}, and no mean of recent games was further "
                       f"from 0 than {max(abs(one) for one in returns):.3g}.")  # fmt: skip
    if value * score < 0 and min(abs(value), abs(score)) > APART:
        return Concern("Values out of line with returns", f"The mean value target is {value:.3g} while games end with {score:.3g} on "
                       "average: the values still have to spread, or bootstrap from each other.")  # fmt: skip
    return None


RULES: tuple[Callable[[Mapping[str, Any], Rows, int | None], Concern | None], ...] = (_skipped, _entropy, _priorities, _support, _returns)


def concerns(config: Mapping[str, Any], rows: Rows, actions: int | None) -> list[Concern]:
    """What to look at in a run.

    config: the fields of its config.json. rows: of its metrics, at least one. actions: A of its environment; None if that is not known,
    and nothing is said of entropies.
    """
    return [found for rule in RULES if (found := rule(config, rows, actions)) is not None]
