"""The noise that a search starts from: Dirichlet for pUCT, Gumbel for gumbel (step 2). In the shapes `B` is the roots, `A` the actions."""

from __future__ import annotations

import torch
from torch import Tensor

from speedyzero.settings import SearchSettings


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
