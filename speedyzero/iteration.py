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

import torch
from torch import Tensor

from speedyzero import act, batch, learn, refresh, ring
from speedyzero.schedule import Phase
from speedyzero.search import SearchResult
from speedyzero.stages import stage
from speedyzero.state import State, search_metrics
from speedyzero_kernels.gather import observations


def iteration(state: State, phase: Phase, roots: int) -> None:
    """Do all of a phase's work once. `roots` is R, how many positions a sweep refreshes; `sampled` refresh has its own count."""
    steps_emulators = phase in ("collect", "train")
    if steps_emulators:
        with state.progress.enter("1 ingest"):
            _ingest(state)
    if phase == "collect":
        with state.progress.enter("3 act"):
            _send(state, act.random_actions(state.config.lanes, state.spec.num_actions, state.generator))
    else:
        _search_and_learn(state, phase, roots)
    if steps_emulators:
        with state.progress.enter("6 join"):
            state.turn.end()


def _ingest(state: State) -> None:
    for name in ("frames", "reward", "done", "first"):
        getattr(state.inbox, name).copy_(getattr(state.emulators, name), non_blocking=True)
    ring.ingest(state.ring, state.inbox, state.config.clip_reward)


def _send(state: State, actions: Tensor) -> None:
    state.ring.action.view(-1)[state.ring.newest()] = actions
    state.emulators.actions.copy_(actions, non_blocking=True)
    state.turn.begin()


def _search_and_learn(state: State, phase: Phase, roots: int) -> None:
    config, lanes, progress = state.config, state.config.lanes, state.progress
    with progress.enter("2 search"):
        if config.refresh == "sampled":
            allowed = ring.eligible(state.ring, config)
            draws = [_draw(state, allowed) for _ in range(config.updates_per_iteration)]
            index = torch.cat([refresh.windows(state.ring, drawn, config.window) for drawn, _ in draws])
        else:
            index = refresh.sweep(state.ring, roots, config.frame_stack)
        if phase == "train":
            index = torch.cat((index, state.ring.newest()))
        result, value, noise = _search(state, index)

    if phase == "train":
        with progress.enter("3 act"):
            live = result.of(slice(-lanes, None))
            _send(state, act.choose(config, live, noise[-lanes:], state.updates, state.generator))

    with progress.enter("4 refresh"):
        refresh.write(state.ring, index, result, value, state.updates, repeated=config.refresh == "sampled")
        if config.priority_refresh:
            refresh.refresh_priorities(state.ring, index, config)
        if config.refresh_values and phase != "sweep":  # whose searches are all of this snapshot
            _refresh_values(state)
        state.search_averages.add(search_metrics(state.ring, result, state.updates))
    if phase == "sweep":
        return

    with progress.enter("5 learn"):
        if config.refresh == "sweep":
            allowed = ring.eligible(state.ring, config)
        for update in range(config.updates_per_iteration):
            drawn, weights = draws[update] if config.refresh == "sampled" else _draw(state, allowed)
            metrics = learn.update(state.learner, state.ring, drawn, weights, state.updates, config, state.generator, state.ranks)
            state.learn_averages.add(metrics)


def _draw(state: State, allowed: Tensor) -> tuple[Tensor, Tensor]:
    with stage("5.1 sample"):
        return batch.draw(state.ring, allowed, state.config, state.updates, state.generator)


def _search(state: State, index: Tensor) -> tuple[SearchResult, Tensor, Tensor]:
    """Search the positions `index` [M] on the snapshot: the result, the network values [M], the noise [M, A]."""
    config = state.config
    mine = state.ranks.share(index.shape[0])
    with stage("2.1 observe"):
        frames = observations(state.ring.frames, state.ring.first, index[mine], config.frame_stack, **state.snapshot.input_format)
    with stage("2.2 tree search"):
        noise = act.root_noise(config, index.shape[0], state.spec.num_actions, state.generator)
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
