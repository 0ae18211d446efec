"""Every operation at the shapes of a preset: its tensors, and the ways to compute it that a bench compares.

A maker takes `Sizes` and a seed and gives a `Work`: `ours` is the public function, `reference` the plain PyTorch form of it
(the same function where there is no kernel, hence None on a CPU), `library` what a user of PyTorch would call otherwise.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from speedyzero.config import Config, preset_config
from speedyzero.nets import Network
from speedyzero.sizes import NetworkSpec, network_spec
from speedyzero_kernels import dispatch, gather, lars, norm, nstep, resblock, root, sample, support, tree
from speedyzero_kernels import head as heads
from speedyzero_kernels.backup import expand_and_backup
from speedyzero_kernels.select import select_gumbel, select_puct
from tools.profile.launches import DEPTH, Counting

Contender = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sizes:
    """A preset's config, the sizes of its network, and where its tensors are."""

    config: Config
    network: NetworkSpec
    device: torch.device

    @property
    def roots(self) -> int:
        """Roots of one search: refreshed and live."""
        return self.config.refresh_roots + self.config.lanes

    @property
    def search_dtype(self) -> torch.dtype:
        """Dtype of the snapshot."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@dataclass
class Work:
    """One operation, ready to run.

    state: every tensor that the operation reads or writes; write into them to change its input.
    generators: what it draws random numbers from.
    depth: of a tree's: mean number of nodes that a simulation goes down.
    """

    state: dict[str, Tensor]
    ours: Contender
    reference: Contender | None = None
    library: Contender | None = None
    library_name: str = ""
    generators: list[torch.Generator] = field(default_factory=list)
    depth: float = DEPTH

    def cost(self) -> tuple[float, float]:
        """Least bytes and FLOPs of one run of the kernels, for the floor. Launches none, but draws random numbers."""
        with Counting(depth=self.depth) as counting:
            self.ours()
        kernels = [(launch, times) for launch, times in counting.found.items() if launch.name.endswith("_kernel")]
        return sum(times * launch.least for launch, times in kernels), sum(times * launch.flops for launch, times in kernels)


def sizes(preset: str, device: torch.device | str) -> Sizes:
    """Pong for the Atari presets, Catch for the small ones; 4 stacked RGB frames against one board."""
    atari = preset in ("efficientzero", "speedyzero")
    config = preset_config(preset)
    simulations, stack = config.simulations or 50, 4 if atari else 1
    config = dataclasses.replace(config, simulations=simulations, frame_stack=stack, augment=atari)
    frame, actions = ((3, 96, 96), 6) if atari else ((1, 10, 5), 3)
    return Sizes(config, network_spec(config, frame, actions), torch.device(device))


def normal(at: Sizes, generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator, device=at.device).to(dtype)


def integers(at: Sizes, generator: torch.Generator, below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=generator, device=at.device)


def outputs_of_model(at: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Value prefix [B], logits [B, A], value [B], as the snapshot gives them."""
    logits = normal(at, generator, at.roots, at.network.actions, dtype=at.search_dtype)
    return normal(at, generator, at.roots), logits, normal(at, generator, at.roots)


def grown(at: Sizes, seed: int, simulations: int, layout: str | None = None) -> tree.Tree:
    """Trees after so many simulations of pUCT with a random model."""
    generator, config = at.generator(seed), at.config
    trees = tree.allocate(
        roots=at.roots, actions=at.network.actions, simulations=config.simulations, discount=config.discount,
        lstm_horizon=config.lstm_horizon, device=at.device, layout=layout,
    )  # fmt: skip
    _, logits, value = outputs_of_model(at, generator)
    tree.plant(trees, root.root_prior(logits), logits, value)
    for simulation in range(simulations):
        expand_and_backup(trees, simulation, select_puct(trees, simulation), *outputs_of_model(at, generator))
    return trees


def tensors_of(trees: tree.Tree) -> dict[str, Tensor]:
    """The tensors of a tree by name."""
    found = {item.name: getattr(trees, item.name) for item in dataclasses.fields(trees)}
    if trees.links:
        found |= {f"links.{item.name}": getattr(trees.links, item.name) for item in dataclasses.fields(trees.links)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def on_cuda(at: Sizes, reference: Contender) -> Contender | None:
    """The reference where it is not what the public function runs anyway."""
    return reference if at.device.type == "cuda" else None


def root_prior(at: Sizes, seed: int) -> Work:
    generator, actions = at.generator(seed), at.network.actions
    logits = normal(at, generator, at.roots, actions, dtype=at.search_dtype)
    noise = torch.softmax(normal(at, generator, at.roots, actions), 1)
    return Work(
        {"logits": logits, "noise": noise},
        lambda: (root.root_prior(logits, noise),),
        on_cuda(at, lambda: (root.root_prior_reference(logits, noise),)),
    )


def plant(at: Sizes, seed: int) -> Work:
    _, logits, value = outputs_of_model(at, at.generator(seed))
    prior = root.root_prior(logits)
    mine, theirs = grown(at, seed, 0), grown(at, seed, 0, "reference")

    def on(trees: tree.Tree) -> Contender:
        def run() -> tuple[Tensor, ...]:
            tree.plant(trees, prior, logits, value)
            return (trees.visits,)

        return run

    return Work(
        {"root_prior": prior, "root_logits": logits, "root_value": value, **tensors_of(mine)}, on(mine), on_cuda(at, on(theirs))
    )


def _select(at: Sizes, seed: int, select: Callable[[tree.Tree], tree.Selection], **more: Tensor) -> Work:
    half = at.config.simulations // 2
    mine, theirs = grown(at, seed, half), grown(at, seed, half, "reference")
    return Work(
        tensors_of(mine) | more, lambda: tuple(select(mine)), on_cuda(at, lambda: tuple(select(theirs))),
        depth=select(mine).depth.double().mean().item(),
    )  # fmt: skip


def puct(at: Sizes, seed: int) -> Work:
    half = at.config.simulations // 2
    return _select(at, seed, lambda trees: select_puct(trees, half))


def gumbel(at: Sizes, seed: int) -> Work:
    half, actions = at.config.simulations // 2, at.network.actions
    considered = root.considered_visits(min(at.config.max_considered_actions, actions), at.config.simulations)[half]
    noise = normal(at, at.generator(seed + 1), at.roots, actions)
    return _select(at, seed, lambda trees: select_gumbel(trees, half, considered, noise), noise=noise)


def backup(at: Sizes, seed: int) -> Work:
    half = at.config.simulations // 2
    outputs = outputs_of_model(at, at.generator(seed + 1))
    mine, theirs = grown(at, seed, half), grown(at, seed, half, "reference")
    leaf = select_puct(mine, half)
    leaf_there = select_puct(theirs, half)

    def on(trees: tree.Tree, selection: tree.Selection) -> Contender:
        def run() -> tuple[Tensor, ...]:
            expand_and_backup(trees, half, selection, *outputs)
            return (trees.q_low, trees.q_high)

        return run

    given = dict(zip(("value_prefix", "new_logits", "new_value"), outputs, strict=True))
    given |= {f"leaf.{name}": value for name, value in leaf._asdict().items()}
    return Work(
        {**given, **tensors_of(mine)}, on(mine, leaf), on_cuda(at, on(theirs, leaf_there)), depth=leaf.depth.double().mean().item()
    )


def to_scalar(at: Sizes, seed: int) -> Work:
    logits = normal(at, at.generator(seed), at.roots, at.network.bins, dtype=at.search_dtype)
    return Work(
        {"logits": logits}, lambda: (support.to_scalar(logits),), on_cuda(at, lambda: (support.to_scalar_reference(logits),))
    )


def cross_entropy(at: Sizes, seed: int) -> Work:
    generator, rows = at.generator(seed), at.config.batch_size * (at.config.unroll + 1)
    logits = normal(at, generator, rows, at.network.bins).requires_grad_()
    target = 10 * normal(at, generator, rows)
    upstream = normal(at, generator, rows)

    def on(loss: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        def run() -> tuple[Tensor, ...]:
            value = loss(logits, target)
            return value.detach(), *torch.autograd.grad(value, logits, upstream)

        return run

    def soft(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, support.two_hot(target, at.network.support), reduction="none")

    return Work(
        {"logits": logits, "target": target, "upstream": upstream},
        on(support.cross_entropy),
        on_cuda(at, on(lambda x, y: support.cross_entropy_reference(x, y))),
        on(soft), "two_hot, F.cross_entropy with soft targets",
    )  # fmt: skip


def proportional(at: Sizes, seed: int) -> Work:
    config = at.config
    priorities = normal(at, at.generator(seed), config.lanes * config.slots).abs()
    alpha, beta = config.priority_alpha, torch.tensor(config.priority_beta, device=at.device)
    generator = at.generator(seed)

    def multinomial() -> tuple[Tensor, ...]:
        mass = priorities.pow(alpha)
        index = torch.multinomial(mass, config.batch_size, replacement=True, generator=generator)
        weights = mass[index].pow(-beta)
        return index, weights / weights.max()

    arguments = (priorities, config.batch_size, alpha, beta, generator)
    return Work(
        {"priorities": priorities, "beta": beta},
        lambda: sample.proportional(*arguments),
        on_cuda(at, lambda: sample.proportional_reference(*arguments)),
        multinomial, "torch.multinomial with importance weights",
        generators=[generator],
    )  # fmt: skip


def observations(at: Sizes, seed: int) -> Work:
    config, generator = at.config, at.generator(seed)
    batch, steps, lanes, slots = config.batch_size, config.unroll + 1, config.lanes, config.slots
    count = batch * steps
    shape = (lanes, slots, at.network.in_channels // config.frame_stack, at.network.height, at.network.width)
    if config.augment:
        frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=at.device)
        extra = {"shift": integers(at, generator, 2 * config.shift + 1, count, 2), "intensity": 1 + 0.05 * normal(at, generator, count)}
    else:
        frames, extra = normal(at, generator, *shape), {}
    first = torch.rand((lanes, slots), generator=generator, device=at.device) < 0.01
    lane, slot = integers(at, generator, lanes, batch, 1), integers(at, generator, slots, batch, 1)
    index = (lane * slots + (slot + torch.arange(steps, device=at.device)) % slots).flatten()
    arguments = {
        "frames": frames, "first": first, "index": index, "stack": config.frame_stack, "pad": config.shift, **extra,
        "dtype": at.search_dtype, "memory_format": dispatch.board_format(frames),
    }  # fmt: skip
    return Work(
        {name: value for name, value in arguments.items() if isinstance(value, Tensor)},
        lambda: (gather.observations(**arguments),),
        on_cuda(at, lambda: (gather.observations_reference(**arguments),)),
    )


def targets(at: Sizes, seed: int) -> Work:
    config, generator, actions = at.config, at.generator(seed), at.network.actions
    lanes, slots, batch = config.lanes, config.slots, config.batch_size
    ring = {
        "reward": normal(at, generator, lanes, slots),
        "done": torch.rand((lanes, slots), generator=generator, device=at.device) < 0.01,
        "value": normal(at, generator, lanes, slots),
        "policy": torch.softmax(normal(at, generator, lanes, slots, actions), 2).half(),
        "action": integers(at, generator, actions, lanes, slots),
        "index": integers(at, generator, lanes * slots, batch),
        "n": 1 + integers(at, generator, config.n_step, batch),
    }
    settings = {"unroll": config.unroll, "n_max": config.n_step, "discount": config.discount, "horizon": config.lstm_horizon}

    def on(function: Callable[..., nstep.Targets]) -> Contender:
        return lambda: tuple(getattr(function(**ring, **settings), item.name) for item in dataclasses.fields(nstep.Targets))

    return Work(ring, on(nstep.targets), on_cuda(at, on(nstep.targets_reference)))


def _optimizer(at: Sizes, seed: int, layered: bool) -> Work:
    config, generator = at.config, at.generator(seed)
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in Network(at.network).parameters()]
    numel = [shape.numel() for shape in shapes]
    flat = {name: normal(at, generator, sum(numel)) for name in ("weights", "grads", "momentum")}
    lr = torch.tensor(1e-3, device=at.device)
    # The library's parameters and gradients are tensors of their own, as a user would have them.
    layers = [x.clone().view(shape).requires_grad_() for x, shape in zip(flat["weights"].split(numel), shapes, strict=True)]
    for layer, grad in zip(layers, flat["grads"].split(numel), strict=True):
        layer.grad = grad.clone().view_as(layer)
    sgd = torch.optim.SGD(layers, lr=1e-3, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)

    def library() -> tuple[Tensor, ...]:
        norm = torch.nn.utils.clip_grad_norm_(layers, config.max_grad_norm)
        sgd.step()
        return (norm,)

    if layered:
        segments = lars.segments(shapes, at.device)
        arguments = (
            *flat.values(), segments, lr, config.momentum, config.weight_decay, config.trust_coefficient, config.trust_clip,
            config.max_grad_norm,
        )  # fmt: skip
        ours, plain = lars.clipped_lars_step, lars.clipped_lars_step_reference
    else:
        arguments = *flat.values(), lr, config.momentum, config.weight_decay, config.max_grad_norm
        ours, plain = lars.sgd_step, lars.sgd_step_reference
    reference = on_cuda(at, lambda: plain(*arguments))
    return Work(
        {**flat, "lr": lr}, lambda: ours(*arguments), reference, library, "clip_grad_norm_, torch.optim.SGD(fused=True)"
    )


def _convolutions(at: Sizes, seed: int, blocks: int) -> Work:
    """One convolution of the dynamics with its action maps, or a residual block of two."""
    generator, dtype = at.generator(seed), at.search_dtype
    channels, board, actions = at.network.channels, at.network.board, at.network.actions

    def maps(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * normal(at, generator, *shape)).to(dtype).contiguous(memory_format=torch.channels_last)

    x = maps(at.roots, channels, *board)
    weights = [maps(channels, channels, 3, 3, scale=0.05) for _ in range(blocks)]
    biases = [normal(at, generator, channels, dtype=dtype) for _ in range(blocks)]
    action_bias, action = maps(actions, channels, *board), integers(at, generator, actions, at.roots)
    state = {"x": x, **{f"weight{i}": w for i, w in enumerate(weights)}, **{f"bias{i}": b for i, b in enumerate(biases)}}

    if blocks == 1:
        state |= {"action_bias": action_bias, "action": action}

        def ours() -> tuple[Tensor, ...]:
            return (resblock.conv3x3(x, weights[0], None, action_bias, action, x),)

        def library() -> tuple[Tensor, ...]:
            return (F.relu(F.conv2d(x, weights[0], padding=1) + action_bias[action] + x),)
    else:

        def ours() -> tuple[Tensor, ...]:
            return (resblock.resblock(x, weights[0], biases[0], weights[1], biases[1]),)

        def library() -> tuple[Tensor, ...]:
            hidden = F.relu(F.conv2d(x, weights[0], biases[0], padding=1))
            return (F.relu(F.conv2d(hidden, weights[1], biases[1], padding=1) + x),)

    # The reference is the library's convolution: on a CPU there is nothing to compare.
    return Work(state, ours, None, on_cuda(at, library), "F.conv2d (cuDNN), add, relu")


def head(at: Sizes, seed: int) -> Work:
    """The policy's: a 1x1 convolution, a hidden layer, the last one."""
    generator, dtype, net = at.generator(seed), at.search_dtype, at.network
    channels, hidden, pixels = net.head_channels, net.head_hidden, net.board[0] * net.board[1]

    def weight(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return (normal(at, generator, *shape) * (prod(shape[1:]) ** -0.5 if len(shape) > 1 else 1.0)).to(dtype)

    x = normal(at, generator, at.roots, net.channels, *net.board, dtype=dtype).contiguous(memory_format=torch.channels_last)
    before = weight(channels, net.channels, 1, 1), weight(channels)
    layers = (
        weight(hidden, channels * pixels), weight(hidden), weight(net.actions, hidden, dtype=torch.float32),
        weight(net.actions, dtype=torch.float32),
    )  # fmt: skip
    names = ("hidden_weight", "hidden_bias", "last_weight", "last_bias")

    def run(form: Callable[..., Tensor]) -> Contender:
        # In the dtype of what it computes with, which decides how well two forms agree.
        return lambda: (form(x, *layers, before, False).to(dtype),)

    state = {"x": x, "weight": before[0], "bias": before[1], **dict(zip(names, layers, strict=True))}
    return Work(state, run(heads.head), None, on_cuda(at, run(heads.head_reference)), "F.conv2d, relu, F.linear, relu, F.linear")


def _norm(at: Sizes, seed: int, boards: int, residual: bool, gradient: bool) -> Work:
    """The BatchNorm behind the first convolutions of the representation, with ReLU: the largest of an update."""
    generator, net = at.generator(seed), at.network
    channels = net.stem_channels if net.pyramid else net.channels
    side = [(size + 1) // 2 if net.pyramid else size for size in (net.height, net.width)]

    def maps() -> Tensor:
        x = normal(at, generator, boards, channels, *side, dtype=at.search_dtype).contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(gradient)

    state = {"x": maps(), "weight": 1 + 0.1 * normal(at, generator, channels), "bias": normal(at, generator, channels)}
    for name in ("weight", "bias"):
        state[name].requires_grad_(gradient)
    state |= {"running_mean": torch.zeros(channels, device=at.device), "running_var": torch.ones(channels, device=at.device)}
    if residual:
        state["residual"] = maps()
    wanted = [x for x in state.values() if x.requires_grad]
    arguments = dict(state)
    if gradient:
        state["upstream"] = maps().detach()

    def on(form: Callable[..., Tensor]) -> Contender:
        def run() -> tuple[Tensor, ...]:
            if not gradient:
                with torch.no_grad():
                    return (form(**arguments),)
            out = form(**arguments)
            return out.detach(), *torch.autograd.grad(out, wanted, state["upstream"])

        return run

    return Work(state, on(norm.batch_norm), None, on_cuda(at, on(norm.batch_norm_reference)), "F.batch_norm, add, relu")


def batch_norm(at: Sizes, seed: int) -> Work:
    return _norm(at, seed, at.config.batch_size, residual=True, gradient=True)


def batch_norm_forward(at: Sizes, seed: int) -> Work:
    """Of the observations that follow, as the consistency loss sees them."""
    return _norm(at, seed, at.config.batch_size * at.config.unroll, residual=False, gradient=False)


MAKERS: dict[str, Callable[[Sizes, int], Work]] = {
    "root_prior": root_prior,
    "plant": plant,
    "select_puct": puct,
    "select_gumbel": gumbel,
    "expand_and_backup": backup,
    "to_scalar": to_scalar,
    "cross_entropy": cross_entropy,
    "proportional": proportional,
    "observations": observations,
    "targets": targets,
    "clipped_lars_step": partial(_optimizer, layered=True),
    "sgd_step": partial(_optimizer, layered=False),
    "conv3x3": partial(_convolutions, blocks=1),
    "resblock": partial(_convolutions, blocks=2),
    "head": head,
    "batch_norm": batch_norm,
    "batch_norm_forward": batch_norm_forward,
}
