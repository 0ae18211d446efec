"""Other libraries' tree searches, for `bench` to time beside ours. They are imported when they are asked for; nothing needs them.

Each is a class: made, it imports its library or raises ImportError; `searcher` prepares one search and returns the function to be timed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .bench import Job, World


class LightZero:
    """The C++ trees of LightZero, called as its `mcts_ctree.py` does: EfficientZero's for pUCT, Gumbel MuZero's.

    Only the two compiled modules are loaded: all of LightZero would import its framework.
    """

    NAME = "LightZero"
    INSTALL = "pip install --no-deps LightZero"
    TIMED = "its trees alone, on the CPU; the lists that they take are made before; its pUCT breaks ties at random"

    def __init__(self):
        spec = importlib.util.find_spec("lzero")
        if spec is None:
            raise ImportError("No module named 'lzero'")
        folder = Path(spec.submodule_search_locations[0]) / "mcts" / "ctree"
        self.efficientzero = _compiled(folder / "ctree_efficientzero", "ez_tree")
        self.gumbel = _compiled(folder / "ctree_gumbel_muzero", "gmz_tree")
        self.title = f"LightZero {version('LightZero')}"

    def searcher(self, job: Job, world: World) -> Callable[[], list]:
        library = self.efficientzero if job.kind == "puct" else self.gumbel
        start, everyone = world.starts(job.roots), np.arange(job.roots)
        legal, nobody, zeros = [list(range(job.actions))] * job.roots, [-1] * job.roots, [0.0] * job.roots
        root = zeros, world.logits[start].tolist()
        values = world.value[start].tolist()

        def search(step: Callable[[int, list, list], tuple[list, list, list]]) -> list:
            roots, ranges = library.Roots(job.roots, legal), library.MinMaxStatsList(job.roots)
            ranges.set_delta(0.01)
            roots.prepare_no_noise(*(root if job.kind == "puct" else (zeros, values, root[1])), nobody)
            for i in range(job.simulations):
                results = library.ResultsWrapper(job.roots)
                if job.kind == "puct":
                    nodes, _, actions, players = library.batch_traverse(roots, 19652, 1.25, job.discount, ranges, results, nobody)
                    rewards, values_, logits = step(i, nodes, actions)
                    resets = [1] * job.roots
                    library.batch_backpropagate(i + 1, job.discount, rewards, values_, logits, ranges, results, resets, players)
                else:
                    nodes, _, actions, players = library.batch_traverse(
                        roots, job.simulations, job.considered, job.discount, results, nobody)  # fmt: skip
                    rewards, values_, logits = step(i, nodes, actions)
                    library.batch_back_propagate(i + 1, job.discount, rewards, values_, logits, ranges, results, players)
            return roots.get_distributions()

        states, answers = [start], []

        def ask(_: int, nodes: list, actions: list) -> tuple[list, list, list]:
            before = np.stack(states)[nodes, everyone]
            states.append(world.following[before, actions])
            answers.append((world.reward[before, actions].tolist(), world.value[states[-1]].tolist(), world.logits[states[-1]].tolist()))
            return answers[-1]

        search(ask)
        return lambda: search(lambda i, *_: answers[i])


def _compiled(folder: Path, name: str) -> ModuleType:
    """An extension module in a folder, without the packages around it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := folder / (name + suffix)).exists():
            full = f"lzero.mcts.ctree.{folder.name}.{name}"
            loader = importlib.machinery.ExtensionFileLoader(full, str(path))
            module = importlib.util.module_from_spec(importlib.util.spec_from_loader(full, loader))
            loader.exec_module(module)
            return module
    raise ImportError(f"no {name} for this Python in {folder}")


class Mctx:
    """mctx: `muzero_policy` and `gumbel_muzero_policy`, compiled by JAX with the world inside."""

    NAME = "mctx"
    INSTALL = "pip install mctx"
    TIMED = "all of its search: the world's look-ups are compiled into it and cannot be taken out"

    def __init__(self):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the device is PyTorch's too
        import jax
        import mctx

        self.jax, self.mctx = jax, mctx
        self.title = f"mctx {version('mctx')}"

    def searcher(self, job: Job, world: World) -> Callable[[], np.ndarray]:
        jax, mctx = self.jax, self.mctx
        following, reward, logits, value = map(jax.numpy.asarray, (world.following, world.reward, world.logits, world.value))

        def step(_params, _key, action, state):
            after = following[state, action]
            gamma = jax.numpy.full(state.shape, job.discount)
            return mctx.RecurrentFnOutput(
                reward=reward[state, action], discount=gamma, prior_logits=logits[after], value=value[after]
            ), after  # fmt: skip

        policy = (
            partial(mctx.muzero_policy, dirichlet_fraction=0.0)
            if job.kind == "puct"
            else partial(mctx.gumbel_muzero_policy, gumbel_scale=0.0, max_num_considered_actions=job.considered)
        )

        @jax.jit
        def search(key, start):
            root = mctx.RootFnOutput(prior_logits=logits[start], value=value[start], embedding=start)
            return policy((), key, root, step, job.simulations).search_tree.children_visits[:, 0]

        key, start = jax.random.PRNGKey(0), jax.numpy.asarray(world.starts(job.roots))
        return lambda: np.asarray(search(key, start))


PEERS = LightZero, Mctx
