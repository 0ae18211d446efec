"""`search` against the plain-Python oracle on random worlds, and against searches worked out by hand."""

import random

import pytest
import torch

from speedyzero.search import SearchConfig, SearchResult, gumbel_action, search
from tests.search_oracle import Oracle


class World:
    """A tabular model whose latent is a state's number. The prefix hangs on the recurrent state, hence on resets."""

    def __init__(self, seed, actions, states=97, logit_scale=1.0, value_scale=1.0, reward_scale=1.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.next_state = torch.randint(states, (states, actions), generator=generator)
        self.logits = draw(states, actions) * logit_scale
        self.value = draw(states) * value_scale
        self.prefix = draw(states) * reward_scale
        self.reward_scale = reward_scale

    def roots(self, count):
        latent = torch.arange(count)
        hidden = torch.stack([torch.full((count,), 0.25), torch.full((count,), 7.0)], dim=1).double()
        return latent, hidden, self.logits[:count], self.value[:count]

    def model_step(self, latent, hidden, action):
        state = self.next_state[latent, action]
        memory = 0.5 * hidden[:, 0] + self.prefix[state]
        steps = hidden[:, 1] + 1.0
        prefix = memory + 0.125 * self.reward_scale * steps
        return state, torch.stack([memory, steps], dim=1), prefix, self.logits[state], self.value[state]

    def step(self, latent, hidden, action):
        state = int(self.next_state[latent, action])
        memory = 0.5 * hidden[0] + float(self.prefix[state])
        steps = hidden[1] + 1.0
        prefix = memory + 0.125 * self.reward_scale * steps
        return state, (memory, steps), prefix, self.logits[state].tolist(), float(self.value[state])


def draw_noise(kind, roots, actions, seed):
    generator = torch.Generator().manual_seed(seed)
    exponential = -torch.rand(roots, actions, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    return exponential / exponential.sum(1, keepdim=True) if kind == "puct" else -exponential.log()


def assert_agrees(world, roots, config, noise=None, legal=None, device="cpu"):
    latent, hidden, logits, value = world.roots(roots)

    def on_device(*tensors):
        return [x if x is None else x.to(device) for x in tensors]

    def model_step(*arguments):
        return on_device(*world.model_step(*(x.cpu() for x in arguments)))

    result = search(*on_device(latent, hidden, logits, value), model_step, config, *on_device(noise, legal))
    result = SearchResult(*(x.cpu() for x in result[:4]))
    played = gumbel_action(result, noise) if config.kind == "gumbel" else result.visits.argmax(1)
    for b in range(roots):
        oracle = Oracle(config, None if noise is None else noise[b].tolist(), None if legal is None else legal[b].tolist())
        outcome = oracle.run(int(latent[b]), tuple(hidden[b].tolist()), logits[b].tolist(), float(value[b]), world.step)
        assert result.visits[b].tolist() == outcome.visits
        assert int(result.depth[b]) == outcome.depth
        assert float(result.value[b]) == pytest.approx(outcome.value, rel=1e-6, abs=1e-7)
        assert result.policy[b].tolist() == pytest.approx(outcome.policy, rel=1e-5, abs=1e-7)
        assert int(played[b]) == outcome.action


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_random_worlds_give_the_oracles_search(kind, seed):
    rng = random.Random(seed)
    actions, roots = rng.randint(1, 18), rng.randint(1, 4)
    config = SearchConfig(
        kind=kind,
        num_simulations=rng.choice([1, 2, 3, 7, 16, 33, 50]),
        discount=rng.choice([0.997**4, 0.9, 0.5, 1.0]),
        lstm_horizon=rng.randint(1, 6),
        noise_fraction=rng.choice([0.25, 0.6]),
        c_base=rng.choice([19652, 20]),
        max_considered_actions=rng.choice([16, 4, 5]),
        value_delta_min=rng.choice([None, 0.01, 1.0]),
        c_scale=rng.choice([0.1, 0.01]),
    )
    scales = dict(
        logit_scale=rng.choice([0.0, 1.0, 3.0]),
        value_scale=rng.choice([0.002, 1.0, 30.0]),
        reward_scale=rng.choice([0.002, 1.0, 5.0]),
    )
    noise = draw_noise(kind, roots, actions, seed) if seed % 2 else None
    assert_agrees(World(seed, actions, **scales), roots, config, noise)


DEEP = {"logit_scale": 8.0, "value_scale": 0.1, "reward_scale": 0.1}
NOTHING = {"logit_scale": 0.0, "value_scale": 0.0, "reward_scale": 0.0}


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
@pytest.mark.parametrize(
    ("actions", "scales", "simulations", "horizon"),
    [
        (6, {"logit_scale": 2.0}, 150, 5),  # long
        *[(3, DEEP, 40, horizon) for horizon in (1, 2, 3, 6)],  # every horizon comes round several times
        (7, NOTHING, 60, 5),  # ties, which go to the lowest action
        (1, {}, 70, 4),  # a chain
    ],
)
def test_worlds_of_an_extreme_shape_give_the_oracles_search(kind, actions, scales, simulations, horizon):
    config = SearchConfig(kind=kind, num_simulations=simulations, lstm_horizon=horizon, discount=0.98)
    assert_agrees(World(1000 + horizon, actions, **scales), 2, config)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_illegal_actions_of_the_root_are_never_visited(kind, seed):
    rng = random.Random(seed)
    actions, roots = rng.randint(2, 12), 4
    legal = torch.rand(roots, actions, generator=torch.Generator().manual_seed(seed)) < 0.4
    legal[torch.arange(roots), torch.tensor([rng.randrange(actions) for _ in range(roots)])] = True
    config = SearchConfig(kind=kind, num_simulations=rng.choice([5, 16, 31]), max_considered_actions=rng.choice([16, 4]))
    noise = draw_noise(kind, roots, actions, seed) if seed % 2 else None
    world = World(seed, actions)
    assert_agrees(world, roots, config, noise, legal)
    result = search(*world.roots(roots), world.model_step, config, noise, legal)
    assert result.visits[~legal].sum() == 0
    assert result.policy[~legal].sum() == 0


def run_scripted(prefixes, values, logits, root_value, config):
    """One search by a model whose i-th call answers the i-th prefix and value: the result, the actions and the states asked for."""
    calls = []

    def model_step(latent, hidden, action):
        i = len(calls)
        calls.append((action.item(), latent.item(), hidden.item()))
        return latent + 1, hidden + 1, torch.tensor([prefixes[i]]), torch.tensor([logits]), torch.tensor([values[i]])

    root = torch.zeros(1, 1), torch.full((1, 1), 100.0), torch.tensor([logits]), torch.tensor([root_value])
    result = search(*root, model_step, config)
    return result, *([call[i] for call in calls] for i in range(3))


def test_three_puct_simulations_worked_by_hand():
    """Two actions of prior 1/2, discount 1/2, plain rewards.

    1. No edge yet, a tie: action 0. Reward 1, value 0: Q(0) = 1 + 0/2 = 1.
    2. The range 1 - 1 counts as 0.01, both normalised Q are 0; action 1 is less visited. Reward 0, value 1: Q(1) = 1/2.
    3. Action 0 scores 1 + 1.25/2 sqrt(3)/2 = 1.54, action 1 0.54: action 0, then the tie in its node: action 0.
       Reward 0, value 3: its return is 3/2 in the child and 1 + 3/4 at the root.
    The root saw 0, 1, 1/2 and 7/4: mean 3.25/4.
    """
    config = SearchConfig(num_simulations=3, discount=0.5, lstm_horizon=1)
    result, actions, _, _ = run_scripted([1.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0], 0.0, config)
    assert actions == [0, 1, 0]
    assert result.visits.tolist() == [[2, 1]]
    assert result.policy.tolist()[0] == pytest.approx([2 / 3, 1 / 3])
    assert float(result.value) == pytest.approx(0.8125)
    assert int(result.depth) == 2


def test_three_gumbel_simulations_worked_by_hand():
    """Two actions, discount 1, plain rewards, no noise, logits (0, 1), c_scale 0.1, c_visit 50, root value 0.

    Visit counts in the running: 0, 0, 1.
    1. Scores 0 and 1 (all Q are the mixed value, hence 0 when rescaled): action 1. Reward 0, value -1: Q(1) = -1.
    2. Action 0, the only one without a visit. Reward 0, value 1: Q(0) = 1.
    3. Both have one visit. Rescaled Q are (50 + 1) 0.1 = 5.1 and 0: 5.1 - 1 beats 0: action 0. Inside its node, with
       nothing visited, the improved policy is softmax(0, 1): action 1. Reward 0, value 3: Q(0) = (1 + 3)/2.
    Then Q = (2, -1), 2 visits at most: policy softmax(0 + 5.2, 1 + 0), value (0 - 1 + 1 + 3)/4.
    """
    config = SearchConfig(kind="gumbel", num_simulations=3, discount=1.0, lstm_horizon=1)
    result, actions, _, _ = run_scripted([0.0] * 3, [-1.0, 1.0, 3.0], [0.0, 1.0], 0.0, config)
    assert actions == [1, 0, 1]
    assert result.visits.tolist() == [[2, 1]]
    assert result.policy.tolist()[0] == pytest.approx(torch.tensor([5.2, 1.0]).softmax(0).tolist())
    assert float(result.value) == pytest.approx(0.75)
    assert gumbel_action(result).tolist() == [0]


def test_value_prefixes_become_rewards_and_recurrent_states_start_again_by_hand():
    """One action, horizon 2: prefixes 1, 3, 5, 6 are rewards 1, 3 - 1, 5 (from zero at depth 2), 6 - 5.

    Undiscounted returns 1, 3, 8, 9 and the root's own 4: mean 25/5. The model adds one to the recurrent state at each step: 100 from the
    caller, 101 stored at depth 1, 0 at depth 2, 1 at depth 3.
    """
    config = SearchConfig(num_simulations=4, discount=1.0, lstm_horizon=2)
    result, _, latents, hiddens = run_scripted([1.0, 3.0, 5.0, 6.0], [0.0] * 4, [0.0], 4.0, config)
    assert float(result.value) == pytest.approx(5.0)
    assert int(result.depth) == 4
    assert (latents, hiddens) == ([0, 1, 2, 3], [100, 101, 0, 1])


def test_infinite_recurrent_states_are_reset_too():
    seen = []

    def model_step(latent, hidden, action):
        seen.append(hidden.clone())
        return latent, torch.full_like(hidden, torch.inf), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1)

    root = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1)
    search(*root, model_step, SearchConfig(num_simulations=3, lstm_horizon=1))
    assert all(torch.equal(hidden, torch.zeros(1, 1)) for hidden in seen)


def test_the_gumbel_action_is_the_best_of_the_most_visited():
    result = SearchResult(
        visits=torch.tensor([[3, 3, 1], [2, 2, 2], [1, 4, 4]], dtype=torch.int32),
        value=torch.zeros(3),
        policy=torch.tensor([[0.2, 0.3, 0.5], [0.3, 0.4, 0.3], [1.0, 0.0, 0.0]]),
        depth=torch.ones(3, dtype=torch.int32),
    )
    assert gumbel_action(result).tolist() == [1, 1, 1]
    noise = torch.tensor([[1.0, 0.0, 9.0], [0.0, 0.0, 2.0], [9.0, 0.0, 0.5]])
    assert gumbel_action(result, noise).tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match=r"^noise: "):
        gumbel_action(result, noise[:, :2])


def test_states_keep_their_dtype_and_their_order_in_memory_from_node_to_node():
    """A model that reads channels-last latents is given channels-last latents, whatever the batch; the results are the same."""
    for batch in (1, 3):
        seen = []

        def model_step(latent, hidden, action, seen=seen, batch=batch):
            seen.append((latent.is_contiguous(memory_format=torch.channels_last), latent.dtype, hidden.dtype, action.dtype))
            following = (latent + 1).contiguous(memory_format=torch.channels_last)
            return following, hidden, torch.zeros(batch), torch.zeros(batch, 2), latent.flatten(1).sum(1)

        latent = torch.arange(batch * 24.0, dtype=torch.bfloat16).view(batch, 4, 2, 3)
        rest = torch.zeros(batch, 1).half(), torch.zeros(batch, 2), torch.zeros(batch), model_step, SearchConfig(num_simulations=5)
        last = search(latent.contiguous(memory_format=torch.channels_last), *rest)
        assert set(seen) == {(True, torch.bfloat16, torch.float16, torch.int64)}
        assert all(torch.equal(a, b) for a, b in zip(search(latent, *rest)[:4], last[:4], strict=True))


def test_results_have_their_dtypes_and_the_arguments_stay_as_they_were_without_a_gradient():
    world = World(1, 4)
    latent, hidden, logits, value = world.roots(5)
    arguments = latent, hidden, logits.float().requires_grad_(), value.bfloat16()
    before = [x.detach().clone() for x in arguments]

    def half_step(*arguments):
        latent, hidden, *outputs = world.model_step(*arguments)
        return latent, hidden, *(x.to(torch.bfloat16) for x in outputs)

    result = search(*arguments, half_step, SearchConfig(num_simulations=12))
    assert [x.dtype for x in result[:4]] == [torch.int32, torch.float32, torch.float32, torch.int32]
    assert result.visits.sum(1).tolist() == [12] * 5
    assert not result.policy.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("latent", torch.zeros(3, 1)), ("hidden", torch.zeros(3, 1)), ("logits", torch.zeros(2)), ("value", torch.zeros(2, device="meta")),
        ("noise", torch.zeros(2, 5)), ("legal", torch.ones(2, 4)),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(name, bad):
    good = {"latent": torch.zeros(2, 1), "hidden": torch.zeros(2, 1), "logits": torch.zeros(2, 4), "value": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        search(model_step=None, config=SearchConfig(), **good | {name: bad})


@pytest.mark.parametrize("output", range(5))
def test_a_bad_output_of_the_model_is_named(output):
    def model_step(latent, hidden, action):
        outputs = [latent, hidden, torch.zeros(2), torch.zeros(2, 4), torch.zeros(2)]
        outputs[output] = torch.zeros(1, 7)
        return outputs

    with pytest.raises(ValueError, match=("latent", "hidden", "value_prefix", "logits", "value")[output]):
        search(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 4), torch.zeros(2), model_step, SearchConfig())


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_a_transition_that_ends_the_episode_counts_nothing_beyond_it(kind):
    """Action 0 earns 1 and ends the episode before a value of 100; action 1 earns nothing and leads on to a value of 2."""

    def model_step(latent, hidden, action):
        ends = action == 0
        return latent, hidden, ends.float(), torch.zeros(3, 2), torch.where(ends, 100.0, 2.0), (~ends).float()

    roots = torch.zeros(3, 1), torch.zeros(3, 0), torch.zeros(3, 2), torch.zeros(3)
    config = SearchConfig(kind=kind, num_simulations=8, discount=0.5, lstm_horizon=1)
    result = search(*roots, model_step, config, transition_discounts=True, keep_tree=True)
    assert result.tree.child_q[:, 0].tolist()[0][0] == 1.0
    assert (result.policy[:, 1] > result.policy[:, 0]).all()
    assert torch.equal(result.tree.child_visits[:, 0].int(), result.visits)
    with pytest.raises(ValueError, match=r"^model_step: expected 5 outputs, got 6"):
        search(*roots, model_step, config)


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_discounts_that_are_all_the_configs_change_nothing_and_a_tree_is_returned_on_request_alone(kind):
    world, config = World(1, 4), SearchConfig(kind=kind, num_simulations=9, discount=0.875)

    def model_step(*arguments):
        return *world.model_step(*arguments), torch.full((3,), 0.875)

    plain = search(*world.roots(3), world.model_step, config)
    each = search(*world.roots(3), model_step, config, transition_discounts=True)
    assert all(torch.equal(x, y) for x, y in zip(plain[:4], each[:4], strict=True))
    assert plain.tree is each.tree is None
    last = each.of(slice(-1, None))
    assert all(torch.equal(x, y[-1:]) for x, y in zip(last[:4], each[:4], strict=True))
