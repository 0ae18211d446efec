"""`search` against the plain-Python oracle on random worlds, and against searches worked out by hand."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero.search import SearchConfig, SearchResult, gumbel_action, search
from tests.capture import CaptureSafety
from tests.search_oracle import Oracle

HIDDEN = 2


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
    actions = rng.randint(2, 18)
    roots = rng.randint(1, 4)
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


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
@pytest.mark.parametrize(("actions", "horizon"), [(2, 3), (6, 5), (18, 4)])
def test_long_searches_give_the_oracles_search(kind, actions, horizon):
    config = SearchConfig(kind=kind, num_simulations=120 if kind == "puct" else 200, lstm_horizon=horizon)
    world = World(1000 + actions, actions, logit_scale=2.0)
    assert_agrees(world, 2, config, draw_noise(kind, 2, actions, actions))


@pytest.mark.parametrize("horizon", range(1, 7))
def test_deep_narrow_trees_give_the_oracles_search(horizon):
    """Sharp policies dig deep, so that every horizon comes round several times."""
    config = SearchConfig(num_simulations=40, lstm_horizon=horizon, discount=0.98)
    assert_agrees(World(horizon, 3, logit_scale=8.0, value_scale=0.1, reward_scale=0.1), 2, config)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    actions=st.integers(1, 6),
    simulations=st.integers(1, 20),
    horizon=st.integers(1, 4),
    kind=st.sampled_from(["puct", "gumbel"]),
    noisy=st.booleans(),
)
def test_small_searches_give_the_oracles_search(seed, actions, simulations, horizon, kind, noisy):
    config = SearchConfig(kind=kind, num_simulations=simulations, lstm_horizon=horizon)
    noise = draw_noise(kind, 2, actions, seed) if noisy else None
    assert_agrees(World(seed, actions, states=31), 2, config, noise)


@pytest.mark.parametrize("seed", range(12))
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


def test_all_actions_legal_is_no_mask():
    world, legal = World(1, 5), torch.ones(3, 5, dtype=torch.bool)
    for kind in ("puct", "gumbel"):
        config = SearchConfig(kind=kind, num_simulations=20, max_considered_actions=4)
        for got, want in zip(search(*world.roots(3), world.model_step, config, None, legal)[:4],
                             search(*world.roots(3), world.model_step, config)[:4], strict=True):  # fmt: skip
            assert torch.equal(got, want)


def test_states_keep_their_order_in_memory_from_node_to_node():
    """A model that reads channels-last latents is given channels-last latents, whatever the batch."""
    for batch in (1, 3):
        seen = []

        def model_step(latent, hidden, action, seen=seen, batch=batch):
            seen.append(latent.is_contiguous(memory_format=torch.channels_last))
            following = (latent + 1).contiguous(memory_format=torch.channels_last)
            return following, hidden, torch.zeros(batch), torch.zeros(batch, 2), latent.flatten(1).sum(1)

        latent = torch.arange(batch * 24.0).view(batch, 4, 2, 3)
        config = SearchConfig(num_simulations=5)
        rest = torch.zeros(batch, 1), torch.zeros(batch, 2), torch.zeros(batch), model_step, config
        last = search(latent.contiguous(memory_format=torch.channels_last), *rest)
        assert all(seen)
        first = search(latent, *rest)
        assert all(torch.equal(x, y) for x, y in zip(first[:4], last[:4], strict=True))


def test_a_root_is_searched_alike_alone_and_in_a_batch():
    world = World(3, 5)
    config = SearchConfig(num_simulations=30)
    latent, hidden, logits, value = world.roots(6)
    batch = search(latent, hidden, logits, value, world.model_step, config)
    for b in range(6):
        one = slice(b, b + 1)
        alone = search(latent[one], hidden[one], logits[one], value[one], world.model_step, config)
        for name in ("visits", "value", "policy", "depth"):
            assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[b])


def scripted(prefixes, values, logits):
    """A model whose i-th call answers the i-th prefix and value; it records the states and actions it was asked for."""
    calls = []

    def model_step(latent, hidden, action):
        i = len(calls)
        calls.append((latent.tolist(), hidden.tolist(), action.tolist()))
        new_hidden = hidden + 1.0
        return latent + 1, new_hidden, torch.tensor([prefixes[i]]), torch.tensor([logits]), torch.tensor([values[i]])

    return model_step, calls


def run_scripted(prefixes, values, logits, root_value, config, noise=None):
    model_step, calls = scripted(prefixes, values, logits)
    result = search(
        torch.zeros(1, 1), torch.full((1, 1), 100.0), torch.tensor([logits]), torch.tensor([root_value]), model_step,
        config, noise,
    )  # fmt: skip
    return result, [call[2][0] for call in calls], calls


def test_three_puct_simulations_worked_by_hand():
    """Two actions of prior 1/2, discount 1/2, plain rewards.

    1. No edge yet, a tie: action 0. Reward 1, value 0: Q(0) = 1 + 0/2 = 1.
    2. The range 1 - 1 counts as 0.01, both normalised Q are 0; action 1 is less visited. Reward 0, value 1: Q(1) = 1/2.
    3. Action 0 scores 1 + 1.25/2 sqrt(3)/2 = 1.54, action 1 0.54: action 0, then the tie in its node: action 0.
       Reward 0, value 3: its return is 3/2 in the child and 1 + 3/4 at the root.
    The root saw 0, 1, 1/2 and 7/4: mean 3.25/4.
    """
    config = SearchConfig(num_simulations=3, discount=0.5, lstm_horizon=1)
    result, actions, _ = run_scripted([1.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0], 0.0, config)
    assert actions == [0, 1, 0]
    assert result.visits.tolist() == [[2, 1]]
    assert result.policy.tolist()[0] == pytest.approx([2 / 3, 1 / 3])
    assert float(result.value) == pytest.approx(0.8125)
    assert int(result.depth) == 2


def test_value_prefixes_become_rewards_by_hand():
    """One action, horizon 2: prefixes 1, 3, 5, 6 are rewards 1, 3 - 1, 5 (fresh at depth 2), 6 - 5.

    Undiscounted returns 1, 3, 8, 9 and the root's own 4: mean 25/5.
    """
    config = SearchConfig(num_simulations=4, discount=1.0, lstm_horizon=2)
    result, _, _ = run_scripted([1.0, 3.0, 5.0, 6.0], [0.0] * 4, [0.0], 4.0, config)
    assert float(result.value) == pytest.approx(5.0)
    assert int(result.depth) == 4
    assert result.policy.tolist() == [[1.0]]


def test_recurrent_state_is_zero_at_multiples_of_the_horizon_and_the_roots_is_used_as_given():
    """The model adds one at each step: 100 from the caller, 101 stored at depth 1, 0 at depth 2, 1 at depth 3, ..."""
    config = SearchConfig(num_simulations=6, lstm_horizon=2)
    _, _, calls = run_scripted([0.0] * 6, [0.0] * 6, [0.0], 0.0, config)
    assert [call[1][0][0] for call in calls] == [100.0, 101.0, 0.0, 1.0, 0.0, 1.0]
    assert [call[0][0][0] for call in calls] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_infinite_recurrent_states_are_reset_too():
    seen = []

    def model_step(latent, hidden, action):
        seen.append(hidden.clone())
        return latent, torch.full_like(hidden, torch.inf), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1)

    config = SearchConfig(num_simulations=3, lstm_horizon=1)
    search(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), model_step, config)
    assert all(torch.equal(hidden, torch.zeros(1, 1)) for hidden in seen)


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
    result, actions, _ = run_scripted([0.0] * 3, [-1.0, 1.0, 3.0], [0.0, 1.0], 0.0, config)
    assert actions == [1, 0, 1]
    assert result.visits.tolist() == [[2, 1]]
    assert result.policy.tolist()[0] == pytest.approx(torch.tensor([5.2, 1.0]).softmax(0).tolist())
    assert float(result.value) == pytest.approx(0.75)
    assert gumbel_action(result).tolist() == [0]


def test_gumbel_noise_decides_between_equals():
    config = SearchConfig(kind="gumbel", num_simulations=2, max_considered_actions=2)
    noise = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    result, actions, _ = run_scripted([0.0] * 2, [0.0] * 2, [0.0] * 4, 0.0, config, noise)
    assert actions == [1, 3]
    assert gumbel_action(result, noise).tolist() == [1]


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


@pytest.mark.parametrize("actions", [1, 2, 3, 5, 8, 11, 18])
@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_ties_go_to_the_lowest_action(kind, actions):
    simulations = min(actions, 16)
    config = SearchConfig(kind=kind, num_simulations=simulations)
    result, played, _ = run_scripted([0.0] * 18, [0.0] * 18, [0.7] * actions, 0.0, config)
    assert played[:simulations] == list(range(simulations))
    assert result.visits.tolist() == [[1] * simulations + [0] * (actions - simulations)]


def test_uniform_worlds_are_searched_in_the_order_of_actions_at_every_depth():
    world = World(0, 7, logit_scale=0.0, value_scale=0.0, reward_scale=0.0)
    assert_agrees(world, 3, SearchConfig(num_simulations=60))


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_one_simulation_visits_one_action(kind):
    config = SearchConfig(kind=kind, num_simulations=1, discount=0.5)
    result, actions, _ = run_scripted([2.0], [4.0], [0.0, 1.0, 0.5], 1.0, config)
    assert actions == [1]
    assert result.visits.tolist() == [[0, 1, 0]]
    assert float(result.value) == pytest.approx((1.0 + 2.0 + 0.5 * 4.0) / 2)
    assert result.depth.tolist() == [1]


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_one_action_gives_a_chain(kind):
    world = World(5, 1)
    assert_agrees(world, 2, SearchConfig(kind=kind, num_simulations=70, lstm_horizon=4, discount=0.95))


def test_noise_moves_only_the_root():
    """All noise on action 2 and a fraction of 1: the root's first visits go there, its node's own go to action 0."""
    noise = torch.tensor([[0.0, 0.0, 1.0]])
    config = SearchConfig(num_simulations=2, noise_fraction=1.0)
    result, actions, _ = run_scripted([0.0] * 2, [0.0] * 2, [0.0] * 3, 0.0, config, noise)
    assert actions == [2, 0]
    assert result.visits.tolist() == [[0, 0, 2]]


def test_results_have_their_dtypes_and_rows_sum_to_the_simulations():
    world = World(1, 4)
    latent, hidden, logits, value = world.roots(5)

    def half_step(*arguments):
        latent, hidden, *outputs = world.model_step(*arguments)
        return latent, hidden, *(x.to(torch.bfloat16) for x in outputs)

    config = SearchConfig(num_simulations=12)
    result = search(latent, hidden, logits.float(), value.bfloat16(), half_step, config)
    assert result.visits.dtype == torch.int32
    assert result.depth.dtype == torch.int32
    assert result.value.dtype == torch.float32
    assert result.policy.dtype == torch.float32
    assert result.visits.sum(1).tolist() == [12] * 5
    assert result.policy.sum(1).tolist() == pytest.approx([1.0] * 5)


def test_latents_keep_their_shape_and_dtype():
    shapes = []

    def model_step(latent, hidden, action):
        shapes.append((latent.shape, latent.dtype, hidden.dtype, action.dtype))
        return latent + 1, hidden, torch.zeros(2), torch.zeros(2, 3), torch.zeros(2)

    latent = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)
    hidden = torch.zeros(2, 5, dtype=torch.float16)
    search(latent, hidden, torch.zeros(2, 3), torch.zeros(2), model_step, SearchConfig(num_simulations=3))
    assert set(shapes) == {(latent.shape, torch.bfloat16, torch.float16, torch.int64)}


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("latent", torch.zeros(3, 1)),
        ("latent", torch.zeros(())),
        ("hidden", torch.zeros(2)),
        ("hidden", torch.zeros(3, 1)),
        ("hidden", torch.zeros(2, 1, dtype=torch.int64)),
        ("logits", torch.zeros(2)),
        ("logits", torch.zeros(2, 4, dtype=torch.int64)),
        ("value", torch.zeros(2, 1)),
        ("value", torch.zeros(2, dtype=torch.int32)),
        ("noise", torch.zeros(2, 5)),
        ("noise", torch.zeros(2, 4, dtype=torch.int64)),
        ("value", torch.zeros(2, device="meta")),
        ("legal", torch.ones(2, 5, dtype=torch.bool)),
        ("legal", torch.ones(2, 4)),
    ],
)
def test_a_bad_argument_is_named(name, bad):
    arguments = {
        "latent": torch.zeros(2, 1),
        "hidden": torch.zeros(2, 1),
        "logits": torch.zeros(2, 4),
        "value": torch.zeros(2),
        "noise": None,
        name: bad,
    }
    with pytest.raises(ValueError, match=rf"^{name}: "):
        search(model_step=None, config=SearchConfig(), **arguments)


@pytest.mark.parametrize(
    ("name", "output"), [("latent", 0), ("hidden", 1), ("value_prefix", 2), ("logits", 3), ("value", 4)]
)
def test_a_bad_model_output_is_named(name, output):
    def model_step(latent, hidden, action):
        outputs = [latent, hidden, torch.zeros(2), torch.zeros(2, 4), torch.zeros(2)]
        outputs[output] = torch.zeros(1, 7)
        return outputs

    with pytest.raises(ValueError, match=name):
        search(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 4), torch.zeros(2), model_step, SearchConfig())


def test_gumbel_action_names_bad_noise():
    result = SearchResult(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"^noise: "):
        gumbel_action(result, torch.zeros(2, 4))


@pytest.mark.parametrize("forbidden", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.unique()])
def test_the_capture_guard_sees_what_it_must(forbidden):
    with pytest.raises(AssertionError, match="captured graph cannot hold"), CaptureSafety():
        forbidden(torch.ones(3))


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_columns_of_one_output_will_do(kind):
    """A network of one output layer need not copy: values, prefixes and logits with any strides."""
    out = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))

    def results(form):
        def model_step(latent, hidden, action):
            return latent, hidden, form(out[:, 1]), form(out[:, 2:]), form(out[:, 0])

        arguments = torch.zeros(3, 1), torch.zeros(3, 1), form(out[:, 2:]), form(out[:, 0]), model_step
        noise = form(draw_noise(kind, 4, 3, 0).t())
        return search(*arguments, SearchConfig(kind=kind, num_simulations=9), noise)

    assert all(torch.equal(x, y) for x, y in zip(results(lambda x: x)[:4], results(torch.Tensor.contiguous)[:4], strict=True))


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
@pytest.mark.parametrize("noisy", [False, True])
def test_search_can_be_captured(kind, noisy):
    world = World(2, 4)
    arguments = world.roots(3)
    noise = draw_noise(kind, 3, 4, 0) if noisy else None
    counts = []
    for scale in (1.0, 100.0):
        world.value *= scale
        world.logits *= scale
        with CaptureSafety() as guard:
            result = search(*arguments, world.model_step, SearchConfig(kind=kind, num_simulations=9), noise)
            gumbel_action(result, noise)
        counts.append(guard.operations)
    assert counts[0] == counts[1]


def test_search_leaves_its_arguments_alone_and_records_no_gradient():
    world = World(4, 3)
    arguments = [x.clone() for x in world.roots(2)]
    arguments[2].requires_grad_()
    before = [x.detach().clone() for x in arguments]
    result = search(*arguments, world.model_step, SearchConfig(num_simulations=8))
    assert not result.policy.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


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
