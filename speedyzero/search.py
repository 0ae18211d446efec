"""Step 2 of the iteration: one batched Monte Carlo tree search over all roots, live and replayed.

The trees are `speedyzero_kernels.tree`, the nodes' latents and recurrent states `node_states`; here are the loop over
simulations and what the rest of the trainer reads from a finished search. The model is an argument: nothing here knows a
network. Neither the data nor the time it takes decides what runs, so on CUDA the whole search is captured in a graph.

In the shape descriptions, `B` denotes the roots, `A` the actions, `S` the simulations and `H` the recurrent state.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from speedyzero.node_states import NodeStates
from speedyzero_kernels import backup, checks, root, select, tree
from speedyzero_kernels.tree import Tree


class ModelStep(Protocol):
    """The model that a search asks: a function, a bound method of a module, or any other callable."""

    def __call__(self, latent: Tensor, hidden: Tensor, action: Tensor, /) -> tuple[Tensor, ...]:
        """One step of `B` states: called once a simulation, without gradients; within a capture it may not wait for the device.

        Args:
          latent: `[B, ...]`, states, shaped and strided as the roots'.
          hidden: `[B, H]`, recurrent states. A model without any gives `[B, 0]` at the roots and passes it on.
          action: `[B]` int64.

        Returns:
          The next `latent`, the next `hidden`, and, floating with any strides, `value_prefix [B]`, `logits [B, A]` and `value [B]` of
          the next state. `value_prefix` is the sum of rewards since the last depth that is a multiple of `lstm_horizon`: for
          `lstm_horizon` 1, the reward of this step. With `transition_discounts` a sixth: `discount [B]` in [0, 1] of this step, 0
          where it ends the episode.
        """
        ...


LEAST_RANGE = {"puct": 0.01, "gumbel": 1e-8}
"""The published `value_delta_min`: EfficientZero's and mctx's."""


@dataclass(frozen=True)
class SearchConfig:
    """How to search. The defaults are EfficientZero's for pUCT and mctx's for Gumbel; `config.check` knows the ranges."""

    kind: Literal["puct", "gumbel"] = "puct"
    """puct: MuZero's rule with EfficientZero's mean Q. gumbel: sequential halving, "Policy improvement by planning
    with Gumbel" (ICLR 2022)."""
    num_simulations: int = 50
    """Model evaluations per root."""
    discount: float = 0.997**4
    """Discount of one step of the model (4 frames)."""
    c_base: float = 19652.0
    """puct: visits over which exploration starts to grow."""
    c_init: float = 1.25
    """puct: weight of the prior."""
    value_delta_min: float | None = None
    """Least range of Q by which Q are normalised: the smaller, the more a search trusts small differences. None: 0.01 for
    puct, over a tree; 1e-8 for gumbel, over a node."""
    noise_fraction: float = 0.25
    """puct: share of the Dirichlet noise in the root's prior."""
    lstm_horizon: int = 5
    """Depths after which the value prefix and the recurrent state start from zero; 1 for plain rewards."""
    max_considered_actions: int = 16
    """gumbel: actions of the root in the first phase of sequential halving."""
    c_visit: float = 50.0
    """gumbel: visits added to the largest visit count when Q is rescaled."""
    c_scale: float = 0.1
    """gumbel: weight of Q against the logits."""

    @property
    def least_range(self) -> float:
        """`value_delta_min`, or what None stands for."""
        return LEAST_RANGE[self.kind] if self.value_delta_min is None else self.value_delta_min


class SearchResult(NamedTuple):
    """What a search found at each root.

    Attributes:
      visits: `[B, A]` int32, simulations through each action; every row sums to `S`.
      value: `[B]` float32, mean return of the root, its network value counted as one visit.
      policy: `[B, A]` float32, the policy target. puct: share of the visits. gumbel: softmax(logits + completed Q).
      depth: `[B]` int32, depth of the deepest node.
      tree: the whole trees, if they were asked for.
    """

    visits: Tensor
    value: Tensor
    policy: Tensor
    depth: Tensor
    tree: Tree | None = None

    def of_each_root(self) -> tuple[Tensor, ...]:
        """The fields that hold a row for each root."""
        return self[:4]

    def of(self, roots: slice | Tensor) -> "SearchResult":
        """The result of some of the roots, without trees."""
        return SearchResult(self.visits[roots], self.value[roots], self.policy[roots], self.depth[roots])


@torch.no_grad()
def search(
    latent: Tensor, hidden: Tensor, logits: Tensor, value: Tensor, model_step: ModelStep, config: SearchConfig,
    noise: Tensor | None = None, legal: Tensor | None = None, *, transition_discounts: bool = False, keep_tree: bool = False,
) -> SearchResult:  # fmt: skip
    """Search from `B` roots at once.

    EfficientZero, "Mastering Atari Games with Limited Data" (NeurIPS 2021), section 4.2 and appendix A, with the
    choices of docs/DESIGN.md.

    Args:
      latent: `[B, ...]`, any dtype, the model's state at the roots.
      hidden: `[B, H]` floating, the recurrent state at the roots, used as given. Nodes whose depth is a multiple of
        `lstm_horizon` hold zeros.
      logits: `[B, A]` floating, policy of the roots.
      value: `[B]` floating, network value of the roots.
      model_step: the model; called `S` times with batches of `B`.
      config: see SearchConfig.
      noise: `[B, A]` floating, a Dirichlet draw (puct) or a Gumbel draw (gumbel); None searches without noise.
      legal: `[B, A]` bool, the actions that each root allows, at least one; None allows all. Below the roots the model's
        policy decides.
      transition_discounts: whether `model_step` says the discount of each step; the config's is then without effect.
      keep_tree: whether to return the trees as `SearchResult.tree`. They take some (72 + 40 A) (S + 1) bytes a root.

    Raises:
      ValueError: an argument or an output of model_step has a wrong shape, dtype or device; the message names it.
    """
    checks.tensor("logits", logits, ("B", "A"), checks.FLOATING, any_strides=True)
    batch, actions = logits.shape
    _check_shape("latent", latent, (batch, *latent.shape[1:]))
    checks.tensor("hidden", hidden, (batch, "H"), checks.FLOATING, logits.device, any_strides=True)
    if noise is not None:
        checks.tensor("noise", noise, (batch, actions), checks.FLOATING, logits.device, any_strides=True)
    simulations, puct = config.num_simulations, config.kind == "puct"
    trees = tree.allocate(
        roots=batch, actions=actions, simulations=simulations, discount=config.discount, lstm_horizon=config.lstm_horizon,
        edge_discounts=transition_discounts, device=logits.device,
    )  # fmt: skip
    tree.plant(trees, root.root_prior(logits, noise if puct else None, config.noise_fraction, legal), logits, value, legal)

    latents, hiddens = NodeStates(simulations, latent), NodeStates(simulations, hidden)
    latents.write(0, latent)
    hiddens.write(0, hidden)
    roots = torch.arange(batch, device=logits.device)
    considered = min(config.max_considered_actions, actions)
    table = root.considered_visits(considered, simulations)
    for simulation in range(simulations):
        if puct:
            leaf = select.select_puct(trees, simulation, c_base=config.c_base, c_init=config.c_init, value_delta_min=config.least_range)
        else:
            due = table[simulation] if legal is None else root.considered_visit_of(legal, considered, simulations, simulation)
            leaf = select.select_gumbel(
                trees, simulation, due, noise, c_visit=config.c_visit, c_scale=config.c_scale, value_delta_min=config.least_range
            )
        rows = torch.add(roots, leaf.parent, alpha=batch)
        next_latent, next_hidden, *outputs = model_step(latents.read(rows), hiddens.read(rows), leaf.action)
        if len(outputs) != (4 if transition_discounts else 3):
            wanted = "6, with the discount" if transition_discounts else "5"
            raise ValueError(f"model_step: expected {wanted} outputs, got {len(outputs) + 2}")
        _check_shape("model_step's latent", next_latent, latent.shape)
        _check_shape("model_step's hidden", next_hidden, hidden.shape)
        backup.expand_and_backup(trees, simulation, leaf, *outputs)
        if simulation + 1 < simulations:
            latents.write(simulation + 1, next_latent)
            hiddens.write(simulation + 1, next_hidden, zero=leaf.reset)

    visits = trees.child_visits[:, 0]
    if puct:
        policy = visits / simulations
    else:
        q = select.completed_q(trees, 1, config.c_visit, config.c_scale, config.least_range)[:, 0]
        policy = torch.softmax(trees.logits[:, 0] + q, dim=1)
    return SearchResult(
        visits=visits.to(torch.int32).contiguous(),
        value=(trees.value_sum[:, 0] / trees.visits[:, 0]).float(),
        policy=policy.float().contiguous(),
        depth=trees.depth.amax(dim=1).to(torch.int32),
        tree=trees if keep_tree else None,
    )


def gumbel_action(result: SearchResult, noise: Tensor | None = None) -> Tensor:
    """Actions `[B]` int64 that Gumbel search plays: the best by gumbel + logits + completed Q of those visited most; ties to the lowest.

    "Policy improvement by planning with Gumbel" (ICLR 2022), Algorithm 2. `log(policy)` is logits + completed Q but for a constant of
    the row. `noise` `[B, A]` is the Gumbel draw given to that search; None if it had none.
    """
    score = result.policy.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    if noise is not None:
        _check_shape("noise", noise, result.policy.shape)
        score = score + noise
    most = result.visits.amax(dim=1, keepdim=True)
    return score.masked_fill(result.visits != most, -torch.inf).argmax(dim=1)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(tensor.shape)}")
