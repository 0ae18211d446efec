"""The tree and root operations alone: forced trees against plain walks, and numbers worked out by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels.backup import expand_and_backup
from speedyzero_kernels.root import root_prior
from speedyzero_kernels.select import completed_q, mean_q, select_gumbel, select_puct
from speedyzero_kernels.tree import Selection, allocate, plant


@pytest.fixture
def device(tree_device):
    return tree_device


def planted(device, roots=1, actions=3, simulations=8, discount=0.5, lstm_horizon=1, logits=None, value=0.0, **more):
    sizes = {"roots": roots, "actions": actions, "simulations": simulations, "discount": discount, "lstm_horizon": lstm_horizon}
    tree = allocate(**sizes, **more, device=device)
    logits = torch.zeros(roots, actions, device=device) if logits is None else torch.tensor(logits, device=device)
    plant(tree, root_prior(logits), logits, torch.full((roots,), value, device=device))
    return tree


def grow(tree, simulation, parent, action, prefix=0.0, value=0.0, logits=None, discount=None):
    """Expand chosen edges: `parent`, `action`, `prefix`, `value` and `discount` are one number or a list over the roots."""
    roots, _, actions = tree.child.shape

    def column(x, dtype=torch.int64):
        return torch.tensor(x if isinstance(x, list) else [x] * roots, dtype=dtype, device=tree.device)

    parent = column(parent)
    depth = tree.depth[torch.arange(roots, device=tree.device), parent].long() + 1
    selection = Selection(parent, column(action), depth, depth % tree.lstm_horizon == 0)
    logits = torch.tensor([[0.0] * actions if logits is None else logits] * roots, device=tree.device)
    prefix, value = column(prefix, torch.float64), column(value, torch.float64)
    discount = None if discount is None else column(discount, torch.bfloat16)
    expand_and_backup(tree, simulation, selection, prefix, logits, value, discount)


def forced_tree_of_hand(device):
    """Q: node 1, by action 0 of the root, 3.25; node 2, by action 2, -1; node 3, by action 1 of node 1, 5. Four visits."""
    tree = planted(device, value=2.0)
    grow(tree, 0, parent=0, action=0, prefix=1.0, value=4.0)
    grow(tree, 1, parent=0, action=2, prefix=-1.0, value=0.0)
    grow(tree, 2, parent=1, action=1, prefix=2.0, value=6.0)
    return tree


def test_a_larger_c_base_explores_less(device):
    """c_base 1 adds log(4 + 2) = 1.79 to c_init at the root: the prior wins over Q."""
    tree = forced_tree_of_hand(device)
    tree.prior[:, 0] = torch.tensor([0.1, 0.15, 0.75])
    assert select_puct(tree, 3, c_base=1e6, c_init=0.1).action.item() == 0
    assert select_puct(tree, 3, c_base=1.0, c_init=0.1).parent.item() == 2


def test_a_narrow_range_of_q_counts_as_value_delta_min(device):
    """Q 0.004 and 0 are 0.4 apart at most by default; taken at face value they are 1 apart and outweigh the prior."""
    tree = planted(device, actions=2)
    grow(tree, 0, parent=0, action=0, prefix=0.004)
    grow(tree, 1, parent=0, action=1, prefix=0.0)
    tree.prior[:, 0] = torch.tensor([0.25, 0.75])
    assert select_puct(tree, 2).parent.item() == 2
    assert select_puct(tree, 2, value_delta_min=1e-4).parent.item() == 1


def test_normalised_q_of_unvisited_children_is_clipped(device):
    """A mean leaves the range by rounding only, so the range is moved by force: clipped, the unvisited child is at 0, not far below."""
    tree = planted(device, actions=2)
    grow(tree, 0, parent=0, action=0, prefix=8.0)
    tree.q_low.fill_(100.0)
    tree.q_high.fill_(101.0)
    tree.prior[:, 0] = torch.tensor([1.0, 0.0])
    leaf = select_puct(tree, 1)
    assert (leaf.parent.item(), leaf.action.item()) == (0, 1)


def test_an_illegal_action_is_not_taken_whatever_the_prior_says(device):
    """Both roots want action 0 most and action 2 least. The second root allows action 2 alone."""
    tree, logits = planted(device, roots=2), torch.tensor([[9.0, 5.0, 0.0]] * 2, device=device)
    legal = torch.tensor([[False, True, True], [False, False, True]], device=device)
    plant(tree, root_prior(logits), logits, torch.zeros(2, device=device), legal)
    for leaf in (select_puct(tree, 0), select_gumbel(tree, 0, 0), select_gumbel(tree, 0, considered_visit=7)):
        assert leaf.action.tolist() == [1, 2]  # the lowest legal one where none has that visit count
    assert tree.logits[:, 0].tolist() == [[-math.inf, 5.0, 0.0], [-math.inf, -math.inf, 0.0]]


def test_completed_q_weighs_visited_actions_alike_when_their_policy_underflows(device):
    """Q(a0) = 4, Q(a1) = 0, raw value 0: mean 2, mixed (0 + 2 x 2)/3, a third of the range; scale 51 x 0.1."""
    tree = planted(device, logits=[[-1e4, -1e4, 0.0]])
    grow(tree, 0, parent=0, action=0, prefix=4.0)
    grow(tree, 1, parent=0, action=1, prefix=0.0)
    assert completed_q(tree, 1, 50.0, 0.1)[0, 0].tolist() == pytest.approx([5.1, 0.0, 1.7])


@pytest.mark.parametrize("parent", [0, 1])
def test_gumbel_search_trusts_a_range_of_q_under_value_delta_min_less(device, parent):
    """Q 1e-6 and 0 outweigh logits 1 apart, by 5; of a range of 0.5 they are nothing. So at the root and below it."""
    tree = planted(device, actions=2, discount=0.0, logits=[[0.0, 1.0]])
    if parent:
        grow(tree, 0, parent=0, action=0, logits=[0.0, 1.0])
    grow(tree, parent, parent=parent, action=0, prefix=1e-6, logits=[0.0, 0.0])
    grow(tree, parent + 1, parent=parent, action=1, prefix=0.0, logits=[0.0, 0.0])
    if parent:
        tree.illegal[:, 1] = True
    for floor, action in (({}, 0), ({"value_delta_min": 0.5}, 1)):
        leaf = select_gumbel(tree, parent + 2, 3 if parent else 1, **floor)
        assert leaf.parent.item() == tree.child[0, parent, action].item()


@st.composite
def forced_trees(draw):
    """Random shapes: per simulation and root, any edge without a node."""
    roots, actions, simulations = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 14))
    free = [[(0, a) for a in range(actions)] for _ in range(roots)]
    script = []
    for i in range(simulations):
        step = [edges.pop(draw(st.integers(0, len(edges) - 1))) for edges in free]
        for edges in free:
            edges.extend((i + 1, a) for a in range(actions))
        script.append(step)
    return roots, actions, script, draw(st.integers(1, 4)), draw(st.sampled_from([1.0, 0.9, 0.5, 0.0]))


@pytest.mark.parametrize("per_edge", [False, True])
@settings(max_examples=20)
@given(forced_trees(), st.integers(0, 2**31))
def test_links_statistics_and_means_agree_with_plain_walks(device, per_edge, case, seed):
    roots, actions, script, lstm_horizon, discount = case
    simulations = len(script)
    generator = torch.Generator().manual_seed(seed)
    prefix, value = torch.randn(2, simulations, roots, generator=generator, dtype=torch.float64)
    tree = planted(device, roots, actions, simulations, discount, lstm_horizon, value=0.5, edge_discounts=per_edge)
    choices = torch.tensor([0.0, 0.25, 0.375, 0.875] if per_edge else [discount], dtype=torch.float64)
    gamma = choices[torch.randint(len(choices), (simulations, roots), generator=generator)]
    for i, step in enumerate(script):
        parents, taken = (list(column) for column in zip(*step, strict=True))
        grow(tree, i, parents, taken, prefix[i].tolist(), value[i].tolist(), discount=gamma[i].tolist() if per_edge else None)

    assert tree.child_visits[:, 0].sum(1).tolist() == [simulations] * roots
    assert tree.visits[:, 0].tolist() == [simulations + 1] * roots
    for b in range(roots):
        parent = [0] + [step[b][0] for step in script]
        action = [0] + [step[b][1] for step in script]
        depth, reward = [0], [0.0]
        decay = [0.0, *gamma[:, b].tolist()]
        visits, value_sum = [1] + [0] * simulations, [0.5] + [0.0] * simulations
        for i in range(1, simulations + 1):
            assert tree.parent[b, i] == parent[i]
            assert tree.action_from_parent[b, i] == action[i]
            assert tree.child[b, parent[i], action[i]] == i
            depth.append(depth[parent[i]] + 1)
            fresh = depth[parent[i]] % lstm_horizon == 0
            before = 0.0 if fresh else prefix[parent[i] - 1, b].item()
            reward.append(prefix[i - 1, b].item() - before)
            node, returns = i, value[i - 1, b].item()
            while True:
                visits[node] += 1
                value_sum[node] += returns
                if node == 0:
                    break
                returns = reward[node] + decay[node] * returns
                node = parent[node]
        q = [reward[i] + decay[i] * value_sum[i] / visits[i] for i in range(simulations + 1)]
        means = []
        for i in range(simulations + 1):
            below = [q[j] for j in range(1, simulations + 1) if parent[j] == i]
            if i == 0:
                means.append(sum(below) / len(below))
            else:
                means.append((means[parent[i]] + sum(below)) / (len(below) + 1))
        assert tree.depth[b].tolist() == depth
        assert tree.visits[b].tolist() == visits
        assert (tree.child[b] >= 0).sum() == simulations
        assert tree.reward[b].tolist() == pytest.approx(reward)
        assert tree.value_sum[b].tolist() == pytest.approx(value_sum)
        assert [tree.child_q[b, parent[i], action[i]].item() for i in range(1, simulations + 1)] == pytest.approx(q[1:])
        assert [tree.child_visits[b, parent[i], action[i]].item() for i in range(1, simulations + 1)] == visits[1:]
        assert tree.child_q[b][tree.child[b] < 0].abs().sum() == 0
        assert tree.q_low[b].item() == pytest.approx(min(q[1:]))
        assert tree.q_high[b].item() == pytest.approx(max(q[1:]))
        assert mean_q(tree, simulations + 1)[b].tolist() == pytest.approx(means)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
def test_a_chain_is_walked_to_its_end(device, length):
    """A certain policy keeps the walk on the chain. Q is 1 at the root's edge and 0 below: the mean halves at each node with a child."""
    tree = planted(device, actions=2, simulations=length, discount=0.0, logits=[[-60.0, 60.0]])
    for i in range(length):
        leaf = select_puct(tree, i, c_init=1e3)
        assert (leaf.parent.item(), leaf.action.item(), leaf.depth.item()) == (i, 1, i + 1)
        grow(tree, i, parent=i, action=1, prefix=1.0 if i == 0 else 0.0, logits=[-60.0, 60.0])
    assert mean_q(tree, length + 1)[0].tolist() == [2.0 ** -min(i, length - 1) for i in range(length + 1)]


@pytest.mark.parametrize("shift", [-2000.0, 0.0, 2000.0])
def test_the_prior_of_a_node_depends_on_the_differences_of_its_logits_alone(device, shift):
    tree = planted(device)
    grow(tree, 0, parent=0, action=0, logits=[shift, shift + math.log(2), shift])
    assert tree.prior[0, 1].tolist() == pytest.approx([0.25, 0.5, 0.25], rel=1e-4)


def test_discounts_that_underflow_still_count_visits(device):
    tree = planted(device, actions=1, simulations=40, discount=1e-20)
    for i in range(40):
        grow(tree, i, parent=i, action=0)
    assert tree.visits[0].tolist() == [41, *range(40, 0, -1)]


def test_planting_again_clears_the_tree(device):
    """All of it for the reference; for the kernels the fields of the nodes, and the edges of the root."""
    once, again = planted(device, value=2.0), forced_tree_of_hand(device)
    zeros = torch.zeros(1, 3, device=device)
    plant(again, root_prior(zeros), zeros, torch.full((1,), 2.0, device=device))
    for name, tensor in vars(once).items():
        if isinstance(tensor, torch.Tensor):
            there = slice(0, 1) if once.links is None and tensor.ndim == 3 else slice(None)
            assert torch.equal(tensor[:, there], getattr(again, name)[:, there]), name


@pytest.mark.parametrize(("parent", "action"), [(1, 0), (-1, 0), (0, 3), (0, -1), (2**40, 0)])
def test_a_native_walk_writes_nothing_beside_its_tree(parent, action):
    tree = planted("cpu", roots=2)
    before = {name: x.clone() for name, x in vars(tree).items() if isinstance(x, torch.Tensor)}
    first, last = torch.tensor([0, parent]), torch.tensor([0, action])
    selection = Selection(first, last, torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^selection: expected edges of nodes 0 to 0, actions 0 to 2"):
        expand_and_backup(tree, 0, selection, torch.zeros(2), torch.zeros(2, 3), torch.zeros(2))
    assert all(torch.equal(x[:, :1], getattr(tree, name)[:, :1]) for name, x in before.items())


def test_a_copy_of_a_tree_grows_by_itself():
    tree = planted("cpu", actions=2)
    grow(tree, 0, parent=0, action=0)
    other = copy.deepcopy(tree)
    grow(other, 1, parent=0, action=1)
    assert (tree.visits[0, 0].item(), other.visits[0, 0].item()) == (2, 3)
