"""One iteration: emulators to ring, one search for all, actions out, cached targets in, updates. The whole algorithm is called here.

    collect   ingest, random actions, join                      until there are enough transitions to start
    sweep     search and refresh, nothing else                   until the random start has targets
    train     ingest, search, act, refresh, learn, join          until the last environment step
    learn     search, refresh, learn                             the updates after it

Ingest takes what the join before it received. Searches run on the snapshot, which `loop.Trainer.step` copies from the network every
`--snapshot-interval` updates. `ring.eligible` says what may be drawn, `batch` makes the targets, `learn` the loss, and counts
`state.updates`.

`iteration` works on tensors of fixed shape that were allocated before, and never waits for the device: the same function is called on a
CPU and captured on CUDA, where the emulators' turn is a node of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from speedyzero import act, batch, learn, refresh, ring
from speedyzero.noise import root_noise
from speedyzero.schedule import Phase
from speedyzero.search import SearchResult
from speedyzero.stages import stage
from speedyzero.state import State, search_metrics
from speedyzero_kernels.gather import observations

Draw = tuple[Tensor, Tensor]
"""Of a batch: flat indices [B] of its positions, importance weights [B]."""


def iteration(state: State, phase: Phase, roots: int) -> None:
    """Do all of a phase's work once. `roots` is R, how many positions a sweep refreshes; `sampled` refresh has its own count."""
    config, progress = state.config, state.progress
    plays, searches, learns = phase in ("collect", "train"), phase != "collect", phase in ("train", "learn")
    if plays:
        with progress.enter("1 ingest"):
            _ingest(state)

    if searches:
        with progress.enter("2 search"):
            index, draws = _positions(state, roots)
            if plays:
                index = torch.cat((index, state.ring.newest()))
            result, value, noise = _search(state, index)

    if plays:
        with progress.enter("3 act"):
            if searches:
                live = slice(-config.lanes, None)
                actions = act.choose(config, result.of(live), noise[live], state.updates, state.generator)
            else:
                actions = act.random_actions(config.lanes, state.spec.num_actions, state.generator)
            _send(state, actions)

    if searches:
        with progress.enter("4 refresh"):
            refresh.write(state.ring, index, result, value, state.updates, repeated=config.refresh == "sampled")
            if config.priority_refresh:
                refresh.refresh_priorities(state.ring, index, config)
            if config.refresh_values and phase != "sweep":  # whose searches are all of this snapshot
                _refresh_values(state)
            state.search_averages.add(search_metrics(state.ring, result, state.updates))

    if learns:
        with progress.enter("5 learn"):
            for drawn, weights in draws or _draws(state):
                metrics = learn.update(state.learner, state.ring, drawn, weights, state.updates, config, state.generator, state.ranks)
                state.learn_averages.add(metrics)

    if plays:
        with progress.enter("6 join"):
            state.turn.end()


def _ingest(state: State) -> None:
    for name in ("frames", "reward", "done", "first"):
        getattr(state.inbox, name).copy_(getattr(state.emulators, name), non_blocking=True)
    ring.ingest(state.ring, state.inbox, state.config.clip_reward)


def _send(state: State, actions: Tensor) -> None:
    state.ring.action.view(-1)[state.ring.newest()] = actions
    state.emulators.actions.copy_(actions, non_blocking=True)
    state.turn.begin()


def _positions(state: State, roots: int) -> tuple[Tensor, list[Draw]]:
    """The replayed positions [R] to search; under `sampled` refresh those of the batches that are learned from next, and these."""
    if state.config.refresh == "sweep":
        return refresh.sweep(state.ring, roots, state.config.frame_stack), []
    draws = list(_draws(state))
    return torch.cat([refresh.windows(state.ring, drawn, state.config.window) for drawn, _ in draws]), draws


def _draws(state: State) -> Iterator[Draw]:
    """The batches of an iteration, each drawn when it is asked for: by the priorities that the updates before it left."""
    allowed = ring.eligible(state.ring, state.config)
    for _ in range(state.config.updates_per_iteration):
        with stage("5.1 sample"):
            draw = batch.draw(state.ring, allowed, state.config, state.updates, state.generator)
        yield draw


def _search(state: State, index: Tensor) -> tuple[SearchResult, Tensor, Tensor]:
    """Search the positions `index` [M] on the snapshot: the result, the network values [M], the noise [M, A]."""
    config = state.config
    mine = state.ranks.share(index.shape[0])
    with stage("2.1 observe"):
        frames = observations(state.ring.frames, state.ring.first, index[mine], config.frame_stack, **state.snapshot.input_format)
    with stage("2.2 tree search"):
        noise = root_noise(config, index.shape[0], state.spec.num_actions, state.generator)
        result, value = act.search_observations(state.snapshot, frames, config, noise[mine])
        *fields, value = state.ranks.gather(*result.of_each_root(), value)
        return SearchResult(*fields), value, noise


def _refresh_values(state: State) -> None:
    """Bring the values and priorities of the next positions of a second, faster sweep up to the snapshot, without a search."""
    ring, snapshot, config = state.ring, state.snapshot, state.config
    index = refresh.sweep(ring, config.refresh_values, config.frame_stack, ring.value_cursor)
    mine = state.ranks.share(index.shape[0])
    frames = observations(ring.frames, ring.first, index[mine], config.frame_stack, **snapshot.input_format)
    (value,) = state.ranks.gather(act.values(snapshot, frames))
    refresh.write_values(ring, index, value)
    if config.priority_refresh:
        refresh.refresh_priorities(ring, index, config)
