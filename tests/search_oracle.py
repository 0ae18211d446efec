"""A tree search in plain Python, one root at a time: objects, a walk down and a walk up, floats. The judge of `search`.

Written from the papers and docs/DESIGN.md alone, sharing nothing with the package; slow, and meant to be read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

Step = Callable[[int, tuple[float, ...], int], tuple[int, tuple[float, ...], float, list[float], float]]


@dataclass
class Node:
    latent: int
    hidden: tuple[float, ...]
    prefix: float
    logits: list[float]
    value: float
    depth: int
    reward: float = 0.0
    visits: int = 0
    value_sum: float = 0.0
    children: dict[int, "Node"] = field(default_factory=dict)


class Outcome(NamedTuple):
    visits: list[int]
    value: float
    policy: list[float]
    depth: int
    action: int  # what Gumbel search plays; the most visited action of pUCT


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def first_argmax(scores: list[float]) -> int:
    return scores.index(max(scores))


def all_nodes(root: Node) -> list[Node]:
    return [root, *(node for child in root.children.values() for node in all_nodes(child))]


class Oracle:
    """One search; fields are those of SearchConfig."""

    def __init__(self, config, noise: list[float] | None, legal: list[bool] | None = None):
        self.config, self.noise, self.legal = config, noise, legal

    def q(self, child: Node) -> float:
        return child.reward + self.config.discount * child.value_sum / child.visits

    def run(self, latent: int, hidden: tuple[float, ...], logits: list[float], value: float, step: Step) -> Outcome:
        config = self.config
        self.actions = range(len(logits))
        self.legal = self.legal or [True] * len(logits)
        logits = [x if ok else -math.inf for x, ok in zip(logits, self.legal, strict=True)]
        if self.noise is not None and config.kind == "puct":
            allowed = [x if ok else 0.0 for x, ok in zip(self.noise, self.legal, strict=True)]
            self.noise = [x / sum(allowed) for x in allowed]
        self.root = Node(latent, hidden, 0.0, logits, value, depth=0, visits=1, value_sum=value)
        for _ in range(config.num_simulations):
            path, action = self.walk()
            parent = path[-1]
            child = self.expand(parent, action, step)
            returns = child.value
            for node in reversed([*path, child]):
                node.visits += 1
                node.value_sum += returns
                returns = node.reward + config.discount * returns
        visits = [self.root.children[a].visits if a in self.root.children else 0 for a in self.actions]
        if config.kind == "puct":
            policy, action = [n / sum(visits) for n in visits], first_argmax(visits)
        else:
            completed = [x + q for x, q in zip(logits, self.completed(self.root), strict=True)]
            policy = softmax(completed)
            gumbel = self.noise or [0.0] * len(logits)
            finalists = [a for a in self.actions if visits[a] == max(visits)]
            action = max(finalists, key=lambda a: gumbel[a] + completed[a])
        depth = max(node.depth for node in all_nodes(self.root))
        return Outcome(visits, self.root.value_sum / self.root.visits, policy, depth, action)

    def expand(self, parent: Node, action: int, step: Step) -> Node:
        latent, hidden, prefix, logits, value = step(parent.latent, parent.hidden, action)
        child = Node(latent, hidden, prefix, logits, value, parent.depth + 1)
        starts_afresh = parent.depth % self.config.lstm_horizon == 0
        child.reward = prefix if starts_afresh else prefix - parent.prefix
        if child.depth % self.config.lstm_horizon == 0:
            child.hidden = tuple(0.0 for _ in hidden)
        parent.children[action] = child
        return child

    def walk(self) -> tuple[list[Node], int]:
        node, path, mean = self.root, [], None
        while True:
            path.append(node)
            if self.config.kind == "puct":
                mean = self.mean(node, mean)
                scores = [self.puct(node, a, mean) for a in self.actions]
            elif node is self.root:
                scores = self.halving_scores()
            else:
                scores = self.lag(node)
            if node is self.root:
                scores = [x if ok else -math.inf for x, ok in zip(scores, self.legal, strict=True)]
            action = first_argmax(scores)
            if action not in node.children:
                return path, action
            node = node.children[action]

    # pUCT

    def mean(self, node: Node, mean_above: float | None) -> float:
        qs = [self.q(child) for child in node.children.values()]
        if mean_above is None:
            return sum(qs) / len(qs) if qs else 0.0
        return (mean_above + sum(qs)) / (len(qs) + 1)

    def puct(self, node: Node, action: int, mean: float) -> float:
        config = self.config
        prior = softmax(node.logits)[action]
        if node is self.root and self.noise is not None:
            prior = (1 - config.noise_fraction) * prior + config.noise_fraction * self.noise[action]
        child = node.children.get(action)
        big_n, small_n = node.visits, child.visits if child else 0
        grow = math.log((big_n + config.c_base + 1) / config.c_base) + config.c_init
        exploration = prior * grow * math.sqrt(big_n) / (1 + small_n)
        edges = [self.q(other) for other in all_nodes(self.root) if other is not self.root]
        if not edges:
            return exploration
        q = self.q(child) if child else mean
        normalised = (q - min(edges)) / max(max(edges) - min(edges), config.value_delta_min or 0.01)
        return min(max(normalised, 0.0), 1.0) + exploration

    # Gumbel

    def completed(self, node: Node) -> list[float]:
        config = self.config
        prior = softmax(node.logits)
        total = sum(child.visits for child in node.children.values())
        mixed = node.value
        if node.children:
            mass = sum(prior[a] for a in node.children)
            mean = sum(prior[a] * self.q(child) for a, child in node.children.items()) / mass
            mixed = (node.value + total * mean) / (total + 1)
        qs = [self.q(node.children[a]) if a in node.children else mixed for a in self.actions]
        span = max(max(qs) - min(qs), config.value_delta_min or 1e-8)
        most = max((child.visits for child in node.children.values()), default=0)
        return [(config.c_visit + most) * config.c_scale * (q - min(qs)) / span for q in qs]

    def lag(self, node: Node) -> list[float]:
        improved = softmax([x + q for x, q in zip(node.logits, self.completed(node), strict=True)])
        counts = [node.children[a].visits if a in node.children else 0 for a in self.actions]
        return [improved[a] - counts[a] / (1 + sum(counts)) for a in self.actions]

    def halving_scores(self) -> list[float]:
        node = self.root
        counts = [node.children[a].visits if a in node.children else 0 for a in self.actions]
        wanted = self.considered_visit(sum(counts))
        completed = self.completed(node)
        gumbel = self.noise or [0.0] * len(counts)
        scores = []
        for a in self.actions:
            score = max(-1e9, gumbel[a] + node.logits[a] - max(node.logits) + completed[a])
            scores.append(score if counts[a] == wanted else -math.inf)
        return scores

    def considered_visit(self, simulation: int) -> int:
        """Play sequential halving through, one visit at a time, up to this simulation."""
        budget = self.config.num_simulations
        start = min(self.config.max_considered_actions, sum(self.legal))
        if start == 1:
            return simulation
        phases = math.ceil(math.log2(start))
        running, given, spent = start, 0, 0
        while True:
            for _ in range(max(1, int(budget / (phases * running)))):
                if spent <= simulation < spent + running:
                    return given
                spent += running
                given += 1
            running = max(2, running // 2)
