"""Searching observations with a snapshot, the noise a search starts from, and choosing actions from it (steps 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from speedyzero.config import Config
from speedyzero.nets import Network
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


def root_noise(config: SearchSettings, roots: int, actions: int, generator: torch.Generator) -> Tensor:
    """The exploration noise of a search [B, A] float32: Dirichlet for pUCT, Gumbel for gumbel."""
    if config.search == "gumbel":
        return gumbel(roots, actions, generator)
    return dirichlet(config.dirichlet_alpha, roots, actions, generator)


def dirichlet(alpha: float, roots: int, actions: int, generator: torch.Generator) -> Tensor:
    """Draws [B, A] float32 of the symmetric Dirichlet distribution, however small its concentration; a row adds up to 1.

    They are Gamma(alpha) draws over their sum. Those of a small alpha underflow, a whole row of them at once, so they are drawn as
    logarithms: Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha), U uniform (Marsaglia and Tsang, ACM TOMS 26(3), 2000, section 6).
    """
    device, boosted = generator.device, alpha < 1
    # fp64: in fp32 the uniform draws have 2^24 values, and 1 / alpha overflows sooner.
    shape = torch.full((roots, actions), alpha + 1 if boosted else alpha, dtype=torch.float64, device=device)
    log_gamma = torch._standard_gamma(shape, generator=generator).log()
    if boosted:
        log_uniform = torch.rand(roots, actions, dtype=torch.float64, generator=generator, device=device).clamp_min(1e-300).log()
        # A factor common to a row leaves its shares alone. With the greatest at 0, none but the others can overflow: to a share of 0.
        log_gamma += (log_uniform - log_uniform.amax(1, keepdim=True)) / alpha
    return torch.softmax(log_gamma, 1).float()


def gumbel(roots: int, actions: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel draws [B, A] float32, always finite."""
    uniform = torch.rand(roots, actions, generator=generator, device=generator.device)
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 2**-24)))


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
