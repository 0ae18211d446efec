"""Searching observations with a snapshot, and choosing actions from what was found (steps 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from speedyzero.config import Config
from speedyzero.nets import Network
from speedyzero.noise import gumbel
from speedyzero.schedule import temperature
from speedyzero.search import SearchResult, gumbel_action, search
from speedyzero.settings import SearchSettings
from speedyzero_kernels.support import to_scalar


@torch.no_grad()
def search_observations(
    snapshot: Network, observation: Tensor, config: SearchSettings, noise: Tensor | None, keep_tree: bool = False
) -> tuple[SearchResult, Tensor]:
    """Search from observations [B, stack x C, H, W], which are as the snapshot's `input_format` says.

    Returns the result, with the trees if `keep_tree`, and the network's own values [B] of the roots.
    """
    latent = snapshot.represent(observation)
    prediction = snapshot.predict(latent)
    value = to_scalar(prediction.value)
    roots = latent, snapshot.initial_hidden(observation.shape[0]), prediction.policy, value
    return search(*roots, snapshot.model_step, config.search_config(), noise, keep_tree=keep_tree), value


@torch.no_grad()
def values(snapshot: Network, observation: Tensor) -> Tensor:
    """The network's own values [B] float32 of observations, which are as the snapshot's `input_format` says."""
    return to_scalar(snapshot.predict(snapshot.represent(observation)).value)


def choose(config: Config, result: SearchResult, noise: Tensor, updates: Tensor, generator: torch.Generator) -> Tensor:
    """Actions [B] int64 of a searched batch in training.

    pUCT draws from visits^(1 / T); gumbel plays the action that sequential halving ended on, which is random through its noise.
    """
    if config.search == "gumbel":
        return gumbel_action(result, noise)
    scores = torch.log(result.visits.float()) / temperature(config, updates)
    return (scores + gumbel(*scores.shape, generator)).argmax(1)


def choose_best(config: SearchSettings, result: SearchResult) -> Tensor:
    """Actions [B] int64 of a searched batch in evaluation: the most visited, or gumbel's choice without noise."""
    if config.search == "gumbel":
        return gumbel_action(result, None)
    return result.visits.argmax(1)


def random_actions(lanes: int, actions: int, generator: torch.Generator) -> Tensor:
    """Uniform actions [L] int64, for the random start."""
    return torch.randint(actions, (lanes,), generator=generator, device=generator.device)
