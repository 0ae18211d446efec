"""Every argument of every public operation is checked and named, and no operation waits for the value of a tensor."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import zeros

from speedyzero_kernels import gather, lars, nstep, resblock, sample, support
from speedyzero_kernels.backup import expand_and_backup
from speedyzero_kernels.root import root_prior
from speedyzero_kernels.select import select_gumbel, select_puct
from speedyzero_kernels.tree import Selection, allocate, plant

F16, F64, INT, BOOL = torch.float16, torch.float64, torch.int64, torch.bool


class Operation(NamedTuple):
    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    sizes: dict[str, Any]
    """The dimensions that an argument sets for the others; None for any shape."""
    floating: str = ""
    """Arguments of any floating dtype."""
    strided: str = ""
    """Arguments of any strides."""
    bad: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Besides the wrong shapes, dtypes, devices and strides of its tensors: who is named, and what for."""


def numbers(**bad: list) -> tuple[tuple[str, dict[str, Any]], ...]:
    return tuple((name, {name: value}) for name, values in bad.items() for value in values)


def tree_and(**more) -> dict[str, Any]:
    sizes = {"roots": 2, "actions": 3, "simulations": 8, "discount": 0.5, "lstm_horizon": 1}
    tree = allocate(**sizes, edge_discounts=True, device=torch.get_default_device())
    plant(tree, zeros(2, 3, dtype=F64), zeros(2, 3), zeros(2))
    return {"tree": tree, "simulation": 0, **more}


def expand(tree, simulation, parent, action, depth, reset, **outputs) -> None:
    expand_and_backup(tree, simulation, Selection(parent, action, depth, reset), **outputs)


def flat(**more) -> dict[str, Any]:
    return {"params": zeros(34), "grads": zeros(34), "momentum": zeros(34), "lr": zeros(()), "ok": zeros((), dtype=BOOL),
            "copy": zeros(34, dtype=torch.bfloat16), "momentum_factor": 0.9, "weight_decay": 0.0, **more}  # fmt: skip


def boards(**shapes) -> dict[str, Any]:
    return {name: zeros(shape).to(memory_format=torch.channels_last) if len(shape) == 4 else zeros(shape) for name, shape in shapes.items()}


LAST = {"memory_format": torch.channels_last}
BIG = ("params", dict.fromkeys(("params", "grads", "momentum"), torch.empty(2**31, device="meta")) | {"copy": None, "lr": 0.1, "ok": None})
OPERATIONS = {
    "observations": Operation(
        gather.observations,
        lambda: {"frames": zeros(2, 3, 1, 4, 4), "first": zeros(2, 3, dtype=BOOL), "index": zeros(4, dtype=INT), "stack": 2,
                 "shift": zeros(4, 2, dtype=INT), "intensity": zeros(4), "mean": zeros(1, 4, 4), "scale": zeros(1, 4, 4)},
        {"first": (0, 1), "index": (0,), "frames": (2, 3, 4)},
        bad=(
            *numbers(stack=[0, 65], pad=[-1], dtype=[F64], memory_format=[torch.preserve_format], mean=[None]), ("mean", {"scale": None}),
            *(("frames", {"frames": torch.empty(2, 3, *size)}) for size in ((0, 4, 4), (1, 2049, 1), (1, 1, 2049))),
            ("stack", {"stack": 64, "frames": torch.empty(2, 3, 9, 1, 1)}), ("index", {"index": zeros(0, dtype=INT)}),
            ("first", {"first": zeros(2, 0, dtype=BOOL)}), ("first", {"first": torch.empty(1, 2**30 + 1, dtype=BOOL, device="meta"),
                                                                      "index": torch.empty(4, dtype=INT, device="meta")}),
        ),
    ),
    "proportional": Operation(
        sample.proportional,
        lambda: {"priorities": zeros(3), "batch": 2, "alpha": zeros(()), "beta": zeros(()), "generator": None},
        {"priorities": (0,)}, floating="priorities alpha beta",
        bad=(*numbers(batch=[0], priorities=[zeros(0), zeros(2**24 + 1, dtype=F16)]),
             ("generator", dict.fromkeys(("alpha", "beta"), 0.5)
              | {"priorities": torch.ones(3, device="meta"), "generator": torch.Generator()})),
    ),
    "targets": Operation(
        nstep.targets,
        lambda: {"reward": zeros(2, 7), "done": zeros(2, 7, dtype=BOOL), "value": zeros(2, 7), "policy": zeros(2, 7, 3),
                 "action": zeros(2, 7, dtype=INT), "index": zeros(4, dtype=INT), "n": torch.ones(4, dtype=INT), "unroll": 2, "n_max": 3,
                 "discount": 0.9, "horizon": 2},
        {"reward": (0, 1), "policy": (2,), "index": (0,)},
        bad=(*numbers(unroll=[-1, 257], n_max=[0, 257], horizon=[0], policy=[zeros(2, 7, 1025)], value=[zeros(2, 7, dtype=F16)],
                      reward=[torch.empty(1, 2**30 + 1, device="meta")]),),
    ),
    "clipped_lars_step": Operation(
        lars.clipped_lars_step,
        lambda: flat(segments=lars.segments([(34,)], torch.get_default_device()), trust_coefficient=0.1, trust_clip=1.0),
        {"params": (0,)},
        bad=(*numbers(segments=[lars.segments([(2, 2)], "cpu"), lars.segments([(34,)], "meta")]), BIG),
    ),
    "segments": Operation(
        lars.segments, lambda: {"shapes": [(2,)], "device": torch.get_default_device()}, {}, bad=numbers(shapes=[[]], plain=[[1], [-1]]),
    ),
    "sgd_step": Operation(lars.sgd_step, flat, {"params": (0,)}, bad=(BIG,)),
    "conv3x3": Operation(
        resblock.conv3x3,
        lambda: boards(x=(2, 4, 3, 3), weight=(5, 4, 3, 3), bias=(5,), action_bias=(3, 5, 3, 3), residual=(2, 5, 3, 3))
        | {"action": zeros(2, dtype=INT)},
        {"x": (0, 1, 2, 3), "weight": (0,), "action_bias": (0,)},
        bad=(
            *(("x", boards(x=shape)) for shape in ((0, 4, 3, 3), (2, 4, 13, 3), (2, 4, 3, 13), (2, 4, 0, 3))),
            ("x", {"x": torch.empty(2**27 // 9 + 1, 8, 4, 4, device="meta", **LAST)}),
            *((name, {name: zeros(shape).to(**LAST).requires_grad_()}) for name, shape in (("x", (2, 4, 3, 3)), ("weight", (5, 4, 3, 3)))),
            *(("weight", boards(weight=shape)) for shape in ((0, 4, 3, 3), (513, 4, 3, 3))),
            ("weight", boards(x=(2, 513, 3, 3), weight=(5, 513, 3, 3))), ("action_bias", boards(action_bias=(0, 5, 3, 3))),
            ("action", {"action": None}), ("action", {"action_bias": None}), ("weight", {"weight": zeros(5, 4, 3, 3, dtype=F16)}),
        ),
    ),
    "resblock": Operation(
        resblock.resblock,
        lambda: boards(x=(2, 4, 3, 3), weight1=(5, 4, 3, 3), bias1=(5,), weight2=(4, 5, 3, 3), bias2=(4,)),
        {"x": (0, 1, 2, 3), "weight1": (0,)},
        bad=(("x", boards(x=(2, 4, 13, 3))),),
    ),
    "root_prior": Operation(
        root_prior,
        lambda: {"logits": zeros(2, 3), "noise": zeros(2, 3), "legal": torch.ones(2, 3, dtype=BOOL)},
        {"logits": (0, 1)}, floating="logits noise", strided="logits noise legal", bad=numbers(logits=[zeros(3, 0), zeros(3, 1025)]),
    ),
    "to_scalar": Operation(
        support.to_scalar, lambda: {"logits": zeros(2, 5)}, {"logits": None}, floating="logits",
        bad=numbers(logits=[zeros(2, 4), zeros(2, 1), zeros(()), zeros(2, 4097)]),
    ),
    "cross_entropy": Operation(
        support.cross_entropy, lambda: {"logits": zeros(2, 3, 5), "target": zeros(2, 3)}, {"logits": None}, floating="logits target",
        bad=numbers(logits=[zeros(2, 3, 4), zeros(2, 3, 4097)]),
    ),
    "transform": Operation(support.transform, lambda: {"x": zeros(3)}, {"x": None}, floating="x", strided="x"),
    "inverse_transform": Operation(support.inverse_transform, lambda: {"y": zeros(3)}, {"y": None}, floating="y", strided="y"),
    "two_hot": Operation(
        support.two_hot, lambda: {"x": zeros(3), "size": 3}, {"x": None}, floating="x", strided="x", bad=numbers(size=[0])
    ),
    "allocate": Operation(
        allocate,
        lambda: {"roots": 1, "actions": 1, "simulations": 1, "discount": 1.0, "lstm_horizon": 1, "device": torch.get_default_device()},
        {},
        bad=numbers(roots=[0], actions=[0, 1025], simulations=[0, 4096], lstm_horizon=[0], discount=[1.5, -0.1], layout=["fast"]),
    ),
    "plant": Operation(
        lambda simulation, **arguments: plant(**arguments),
        lambda: tree_and(prior=zeros(2, 3, dtype=F64), logits=zeros(2, 3), value=zeros(2), legal=torch.ones(2, 3, dtype=BOOL)),
        {}, floating="logits value", strided="prior logits value legal", bad=numbers(prior=[zeros(2, 3)]),
    ),
    "select_puct": Operation(select_puct, tree_and, {}, bad=numbers(simulation=[-1, 8])),
    "select_gumbel": Operation(
        select_gumbel, lambda: tree_and(considered_visit=zeros(2, dtype=INT), gumbel=zeros(2, 3)), {}, floating="gumbel", strided="gumbel",
        bad=numbers(simulation=[-1, 8]),
    ),
    "expand_and_backup": Operation(
        expand,
        lambda: tree_and(**{name: zeros(2, dtype=INT) for name in ("parent", "action", "depth")}, reset=zeros(2, dtype=BOOL),
                         value_prefix=zeros(2), logits=zeros(2, 3), value=zeros(2), discount=zeros(2)),
        {}, floating="value_prefix logits value discount", strided="value_prefix logits value discount",
        bad=(*numbers(simulation=[-1, 8], discount=[None]),
             ("discount", {"tree": allocate(roots=2, actions=3, simulations=8, discount=0.5, lstm_horizon=1)})),
    ),
}  # fmt: skip


def wrong(operation: Operation, good: dict[str, Any]):
    """Each tensor with a dimension more, one entry less, of another dtype, on another device, and with gaps in memory."""
    tensors = {name: x for name, x in good.items() if isinstance(x, torch.Tensor)}
    where = next((name for name in operation.sizes if name in tensors), None)
    for name, x in tensors.items():
        yield name, x.to(torch.int32)
        if name not in operation.floating.split() and x.dtype == torch.float32:
            yield name, x.to(F64)
        free = operation.sizes.get(name, ())
        if free is not None:
            yield name, x[None]
            for dim in set(range(x.ndim)) - set(free):
                yield name, x.narrow(dim, 0, x.shape[dim] - 1).contiguous()
        if name != where:
            yield name, x.to("meta")
        if name not in operation.strided.split() and x.ndim:
            yield name, torch.stack((x, x), -1)[..., 0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_bad_argument_is_named(name):
    operation, good = OPERATIONS[name], OPERATIONS[name].good()
    operation.call(**good)
    for argument, change in [*((argument, {argument: x}) for argument, x in wrong(operation, good)), *operation.bad]:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            pytest.fail(f"{argument}: took {change}, returned {operation.call(**good | change)}")
        assert re.match(rf"(selection\.)?{argument}: ", str(error.value)), (change, error.value)


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_waits_for_a_value_or_makes_a_tensor_on_another_device(name):
    """Tensors on `meta` have no values."""
    with torch.device("meta"):
        arguments = OPERATIONS[name].good()
        out = OPERATIONS[name].call(**arguments)
    made = [out] if isinstance(out, torch.Tensor) else vars(out).values() if hasattr(out, "__dict__") else out or ()
    assert {x.device.type for x in made if isinstance(x, torch.Tensor)} <= {"meta"}
