"""tools/runs: look.py and overfit.py say what is so, of a tiny run and of runs that were broken on purpose."""

import dataclasses
import hashlib
import math
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from speedyzero import checkpoint, learn, ring
from speedyzero.config import preset_config, resolve
from speedyzero.contents import filled
from speedyzero.envs import describe
from speedyzero.learn import Augmentation, Batch
from speedyzero.log import write_json
from speedyzero.loop import Trainer
from speedyzero_kernels.nstep import Targets
from speedyzero_kernels.support import inverse_transform
from tests.conftest import TINY
from tests.runs import save

sys.path.append(str(Path(__file__).parents[1] / "tools" / "runs"))

import findings
import look
import overfit
from bounds import Bounds, bounds
from byhand import Raw, augmented
from opened import open_run
from pictures import GAP, picture, write_png

CPU = torch.device("cpu")


def make_run(folder: Path, iterations: int = 64, **settings) -> Trainer:
    """A tiny run in `folder`, saved after some iterations: its ring has lapped, and it has learned a little."""
    spec = describe("Catch-v0")
    config = dataclasses.replace(preset_config("cpu"), env="Catch-v0", run_dir=folder, **({"device": "cpu"} | TINY | settings))
    trainer = Trainer(resolve(config, image=spec.image, atari=False), spec, CPU)
    trainer.start()
    while trainer.iterations < iterations and trainer.phase() is not None:
        trainer.step(trainer.phase())
    folder.mkdir()
    write_json(folder / "config.json", trainer.config.to_json())
    (folder / "checkpoints").mkdir()
    save(trainer, folder / "checkpoints")
    return trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return make_run(tmp_path_factory.mktemp("diagnosis") / "run")


@pytest.fixture
def run(trainer) -> Path:
    return trainer.config.run_dir


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run, to break."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def state(run):
    return open_run(run, CPU)[0]


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that calls a tool as a command would: exit code or message, and what it printed."""

    def of(tool, *arguments) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [tool.__name__ + ".py", *map(str, arguments)])
        code = 0
        try:
            tool.main()
        except SystemExit as stop:
            code = int(stop.code) if isinstance(stop.code, bool) else stop.code
        return code, capsys.readouterr().out

    return of


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def batch_of(state, count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = look.anywhere(state, count, generator)
    return index, *look.batches(state, index, generator)


def bad(found) -> list[str]:
    return [finding.text for finding in found if finding.verdict == "BAD"]


# bounds


def goals(value, mask, policy, policy_mask, prefix) -> Targets:
    value, mask, policy, policy_mask, prefix = map(torch.tensor, (value, mask, policy, policy_mask, prefix))
    return Targets(value=value, prefix=prefix, policy=policy, action=torch.zeros_like(prefix, dtype=torch.int64), mask=mask,
                   policy_mask=policy_mask)  # fmt: skip


def entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def test_bounds_of_worked_targets():
    half = float(inverse_transform(torch.tensor(0.5, dtype=torch.float64)))  # h(half) = 0.5: shared by the bins of 0 and 1
    goal = goals(value=[[half, 0.0], [0.0, 9.0]], mask=[[1.0, 1.0], [1.0, 0.0]], prefix=[[half], [9.0]],
                 policy=[[[0.5, 0.25], [9.0, 9.0]], [[0.0, 1.0], [9.0, 0.0]]], policy_mask=[[1.0, 0.0], [1.0, 0.0]])  # fmt: skip
    got = bounds(goal, 5)
    assert got["value_loss"].floor == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert got["value_loss"].constant == pytest.approx(3 * entropy(5 / 6, 1 / 6) / 2, rel=1e-5)
    assert got["value_prefix_loss"].floor == got["value_prefix_loss"].constant == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert got["policy_loss"].floor == pytest.approx(0.75 * entropy(2 / 3, 1 / 3) / 2)
    assert got["policy_loss"].constant == pytest.approx(1.75 * entropy(0.5 / 1.75, 1.25 / 1.75) / 2)
    assert got["consistency_loss"] == Bounds(-0.5, 0.0)


def test_bounds_divide_by_the_steps_as_the_losses_do():
    flat = [[0.0, 0.0, 0.0]]
    goal = goals(value=flat, mask=[[1.0, 1.0, 1.0]], prefix=[[0.0, 0.0]], policy=[[[0.5, 0.5]] * 3], policy_mask=[[1.0, 1.0, 1.0]])
    got = bounds(goal, 5)
    assert got["policy_loss"].floor == pytest.approx(3 * math.log(2) / 2)
    assert got["consistency_loss"].floor == -1
    assert goal.value.tolist() == flat


def test_learned_is_one_at_the_floor_and_zero_at_the_constant():
    limit = Bounds(1.0, 3.0)
    assert [limit.learned(loss) for loss in (1.0, 2.0, 3.0, 4.0)] == [1.0, 0.5, 0.0, -0.5]
    assert Bounds(1.0, 1.0).learned(1.0) == 1
    assert Bounds(1.0, 1.0).learned(1.5) == 0


@pytest.mark.parametrize(
    ("by_batch", "running", "said"),
    [(1.1, 1.1, "fits, 95%"), (1.8, 1.8, "fits in part, 60%"), (2.9, 2.9, "does NOT fit, 5%"), (1.1, 2.9, "only 5% by the running"),
     (2.2, 9.9, "does NOT fit, 40%")],
)
def test_verdict_of_a_fit(by_batch, running, said):
    assert said in overfit.verdict(Bounds(1.0, 3.0), by_batch, running)


def test_targets_that_are_alike_have_a_verdict_of_their_own():
    assert overfit.verdict(Bounds(1.0, 1.0), 1.01, 1.01).startswith("nothing to learn")
    assert overfit.verdict(Bounds(1.0, 1.0), 1.2, 1.2).startswith("does NOT fit")


# by hand


@pytest.fixture
def made():
    """A ring of one lane and 12 slots, 14 written: slots 0 and 1 are the newest. Episodes end at slots 4 and 9, their deaths."""
    config = dataclasses.replace(
        preset_config("cpu"), lanes=1, ring_positions=12, frame_stack=3, unroll=3, n_step=3, discount=0.5, lstm_horizon=2, clip_reward=True,
        env_steps=100, n_step_age=0.05, amp=False,
    )  # fmt: skip
    made = ring.allocate(config, (1, 1, 1), torch.float32, 2, CPU)
    made.frames.copy_(torch.arange(12.0).view(1, 12, 1, 1, 1))
    made.reward.copy_(torch.tensor([[1, 0, 1, 0, -1, 0, 1, 1, 0, -1, 0, 1.0]]))
    made.value.copy_(torch.arange(12.0) * 8)
    made.done[0, [4, 9]] = True
    made.first[0, [5, 10]] = True
    made.head.fill_(14)
    return made, config


def test_a_window_over_an_end_is_worked_out_as_on_paper(made):
    raw = Raw(*made)
    # Slot 2 is 11 steps old and n_step_age is 5 transitions: n = 3 - 2 = 1. Slot 8, 5 steps old: 2. Slot 10, 3 steps old: 3.
    assert [raw.n(slot) for slot in (2, 8, 10)] == [1, 2, 3]
    steps = raw.window(0, 2)
    assert [step.slot for step in steps] == [2, 3, 4, 5]
    # z of 2: the reward 0 of slot 3 and half the value 24 there. z of 3: the -1 of the end, and no bootstrap. The end itself: 0.
    assert [(step.rewards, step.bootstrap) for step in steps] == [(0, 12), (-1, 0), (0, 0), (0, 0)]
    assert [step.counts for step in steps] == [True, True, True, False]
    assert [step.acts for step in steps] == [True, True, False, False]
    assert [step.prefix for step in steps] == [0, 0, -1, 0]


def test_a_window_over_the_end_of_the_lap_goes_on_at_slot_0(made):
    steps = Raw(*made).window(0, 10)
    assert [step.slot for step in steps] == [10, 11, 0, 1]
    # z of 10: rewards 1, 1, 0 of slots 11, 0, 1, at 1, 1/2 and 1/4, and 1/8 of the value 8 of slot 1.
    assert (steps[0].rewards, steps[0].bootstrap) == (1.5, 1)
    assert steps[0].rewarded == [(1, 1.0), (2, 1.0)]
    # The prefix sums slots 11 and 0, and starts anew after two steps.
    assert [step.prefix for step in steps] == [0, 1, 2, 0]


def test_a_target_of_n_steps_stops_at_an_end_within_them(made):
    step = Raw(*made).window(0, 8)[0]
    assert (step.rewards, step.bootstrap) == (-1, 0)


def test_a_stack_is_oldest_first_and_repeats_the_first_frame(made):
    raw = Raw(*made)
    assert [raw.stack(0, slot).ravel().tolist() for slot in (8, 5, 6, 1)] == [[6, 7, 8], [5, 5, 5], [5, 5, 6], [11, 0, 1]]


def test_augmentation_replicates_the_border():
    seen = augmented(np.array([[[1.0, 2.0], [3.0, 4.0]]]), (0, 2), 1, 2.0)
    assert seen.tolist() == [[[4, 4], [4, 4]]]
    assert augmented(np.array([[[1.0, 2.0], [3.0, 4.0]]]), (2, 1), 1, 1.0).tolist() == [[[3, 4], [3, 4]]]


def test_an_update_agrees_with_what_is_worked_out_by_hand(state):
    assert bad(findings.byhand_findings(state, *batch_of(state, 40))) == []


BROKEN_BATCHES = {
    "value": lambda goal: dataclasses.replace(goal, value=goal.value + 0.01),
    "prefix": lambda goal: dataclasses.replace(goal, prefix=goal.prefix.roll(1, 1) + 0.01),
    "mask": lambda goal: dataclasses.replace(goal, mask=1 - goal.mask),
    "policy mask": lambda goal: dataclasses.replace(goal, policy_mask=1 - goal.policy_mask),
    "policy": lambda goal: dataclasses.replace(goal, policy=goal.policy.flip(2)),
    "action": lambda goal: dataclasses.replace(goal, action=goal.action + 1),
}


@pytest.mark.parametrize("name", BROKEN_BATCHES)
def test_a_target_that_is_not_as_worked_out_by_hand_is_bad_and_named(state, name):
    index, batch, plain = batch_of(state)
    (text,) = bad(findings.byhand_findings(state, index, dataclasses.replace(batch, targets=BROKEN_BATCHES[name](batch.targets)), plain))
    wrong = text.partition("differing ")[2].split(", ")
    assert [line for line in wrong if not line.endswith(" 0")] == [line for line in wrong if line.rpartition(" ")[0] == name]


def test_observations_that_are_not_as_worked_out_by_hand_are_bad(tmp_path):
    state = make_run(tmp_path / "run", iterations=44, frame_stack=2, augment=True, shift=2).state
    index, batch, plain = batch_of(state)
    drawn = batch.augmentation
    assert bad(findings.byhand_findings(state, index, batch, plain)) == []
    for wrong, named in (
        ((batch, dataclasses.replace(plain, observation=plain.observation.flip(1))), "observation"),
        ((batch, dataclasses.replace(plain, future=plain.future.roll(1, 0))), "observation"),
        ((dataclasses.replace(batch, augmentation=Augmentation(drawn.shift.flip(2), drawn.intensity)), plain), "augmentation"),
        ((dataclasses.replace(batch, augmentation=Augmentation(drawn.shift.flip(0), drawn.intensity)), plain), "augmentation"),
    ):
        (text,) = bad(findings.byhand_findings(state, index, *wrong))
        other = {"observation": "augmentation", "augmentation": "observation"}[named]
        assert f"{named} 0" not in text
        assert f"{other} 0" in text


# findings


def test_nothing_is_bad_in_a_run_that_is_well(state):
    _, batch, plain = batch_of(state)
    assert bad(findings.ring_findings(state) + findings.network_findings(state, batch, plain)) == []


def break_first(state):
    state.ring.first.copy_(state.ring.first.roll(1, 1))


def break_reward(state):
    state.ring.reward[state.ring.first] = state.ring.raw_reward[state.ring.first] = 1.0


def break_dead(state):
    state.ring.priority[state.ring.done] = 0.5


def break_clip(state):
    state.ring.reward += 0.5 * ~state.ring.first


def break_eligible(state):
    state.ring.refreshed_at.fill_(-1)


def break_policy(state):
    state.ring.policy *= 0.5


def break_weights(state):
    state.learner.network.value_head.last.weight[0, 0] = torch.nan


BROKEN_RUNS = {
    break_first: "follow no end", break_reward: "first frame: ", break_dead: "dead slots with a priority",
    break_clip: "rewards that are not", break_eligible: "eligible: 0", break_policy: "sum to 1", break_weights: "value_head.last.weight 1",
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN_RUNS, ids=lambda broken: broken.__name__)
def test_what_cannot_be_in_a_run_is_bad(state, broken):
    with torch.no_grad():
        broken(state)
    (text,) = bad(findings.ring_findings(state))
    assert BROKEN_RUNS[broken] in text


def test_counts_are_those_of_the_ring(state):
    state.ring.done.zero_()
    state.ring.done[0, 3] = True
    text = findings.ring_findings(state)[0].text
    assert text.endswith("dead 1.0% (1 of 96)")


def test_a_run_without_rewards_and_with_uniform_visits_is_looked_at(state):
    state.ring.reward.zero_()
    state.ring.raw_reward.zero_()
    state.ring.policy.fill_(1 / 3)
    texts = [finding.text for finding in findings.ring_findings(state) if finding.verdict == "look"]
    assert any(text.startswith("rewards: 0: 96") for text in texts)
    assert any(text.startswith("entropy of the visits: 1.1 1.1 1.1 1.1 1.1; uniform would be 1.1") for text in texts)


def test_a_fold_that_forgets_a_shift_is_bad(state, monkeypatch):
    def forgetful(source, snapshot, fold=findings.fold):
        fold(source, snapshot)
        with torch.no_grad():
            snapshot.policy_head.last.bias.add_(1)

    monkeypatch.setattr(findings, "fold", forgetful)
    _, batch, plain = batch_of(state)
    (text,) = bad(findings.network_findings(state, batch, plain))
    assert text.startswith("folding: ")


def test_statistics_that_lag_behind_are_looked_at(state):
    with torch.no_grad():
        for module in state.learner.network.value_head.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.add_(30.0)
        state.learner.network.value_head.last.weight.normal_(generator=torch.Generator().manual_seed(0))
    _, batch, plain = batch_of(state)
    found = {finding.text.split(":")[0]: finding.verdict for finding in findings.network_findings(state, batch, plain)}
    assert found["value_loss"] == "look"


def test_a_loss_above_that_of_a_constant_is_looked_at(state):
    """Whatever the statistics are: without weights, the policy is a bias that favours one action."""
    head = state.learner.network.policy_head.last
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    _, batch, plain = batch_of(state)
    (found,) = (one for one in findings.network_findings(state, batch, plain) if one.text.startswith("policy_loss"))
    assert found.verdict == "look"
    by_batch, running = (float(part.split()[0]) for part in found.text.removeprefix("policy_loss: ").split(", ")[:2])
    assert by_batch == running


@pytest.mark.parametrize(
    ("module", "part"), [("dynamics_block", "dynamics"), ("policy_head", "heads"), ("representation", "representation")],
)
def test_the_part_whose_statistics_lag_is_named(state, module, part):
    """A network whose running statistics are those of one batch, before and after those of one module are moved."""
    network, generator = state.learner.network, torch.Generator().manual_seed(0)
    norms = torch.nn.modules.batchnorm._BatchNorm
    _, batch, plain = batch_of(state, 40)

    def found():
        (one,) = (one for one in findings.network_findings(state, batch, plain) if one.text.startswith("policy loss with the running"))
        by_part = dict(text.split() for text in one.text.partition("alone: ")[2].split(", "))
        return one.verdict, {name: abs(float(more)) for name, more in by_part.items()}

    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, norms):
                norm.weight.fill_(1)
                norm.bias.zero_()
        network.policy_head.last.weight.normal_(generator=generator)
        for _ in range(60):
            learn.losses(network, batch, state.config)
        settled = found()[1]
        for norm in network.get_submodule(module).modules():
            if isinstance(norm, norms):
                norm.running_mean.add_(norm.running_var.sqrt() * 10 * torch.randn(norm.running_mean.shape, generator=generator))
    verdict, moved = found()
    assert verdict == "look"
    assert moved[part] > max(0.05, 1.1 * settled[part])
    assert all(moved[name] == settled[name] for name in moved if name != part)


def test_predictions_of_the_snapshot_are_those_of_the_search(state):
    """`unrolled` is what `model_step` gives, along a path within one horizon."""
    network = findings.copies(state)[2]
    _, _, plain = batch_of(state)
    action = plain.targets.action
    values, prefixes, logits = findings.unrolled(network, plain.observation, action, state.config.lstm_horizon)
    latent, hidden = network.represent(plain.observation), network.initial_hidden(len(action))
    for k in range(action.shape[1]):
        latent, hidden, prefix, policy, value = network.model_step(latent, hidden, action[:, k].contiguous())
        assert torch.equal(prefixes[:, k], prefix)
        assert torch.equal(values[:, k + 1], value)
        assert torch.equal(logits[:, k + 1], policy)
    again = findings.unrolled(network, plain.observation, action, 1)[1]
    assert torch.equal(again[:, 0], prefixes[:, 0])
    second = network.advance(network.represent(plain.observation), action[:, 0].contiguous())
    alone = network.model_step(second, network.initial_hidden(len(action)), action[:, 1].contiguous())[2]
    assert torch.equal(again[:, 1], alone)
    assert not torch.equal(again[:, 1], prefixes[:, 1])


def test_looking_at_a_network_leaves_it_and_its_statistics(state):
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    _, batch, plain = batch_of(state)
    findings.network_findings(state, batch, plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


# pictures


def test_a_picture_has_the_stack_left_to_right_the_future_below_and_the_augmented_at_the_right():
    colours = torch.rand(1, 2, 2, 3, generator=torch.Generator().manual_seed(0))  # [positions, steps, stack, RGB]
    plain = colours.flatten(2)[..., None, None].expand(-1, -1, -1, 40, 40)
    image = picture(plain, plain * 0.5, stack=2, pixels=True)
    side = 41
    for k in range(2):
        for frame in range(2):
            for half in range(2):
                corner = image[k * side, half * (2 * side + GAP) + frame * side]
                want = colours[0, k, frame] * (1.0 if half == 0 else 0.5)
                assert (corner - want * 255).abs().max() <= 1
    assert image[0, 2 * side].tolist() == [255, 255, 255]


def test_frames_that_are_small_or_grey_are_shown_larger_and_without_pixels_from_least_to_greatest():
    plain = torch.tensor([[-1.0, 3.0]]).view(1, 1, 1, 1, 2)
    image = picture(plain, plain, stack=1, pixels=False)
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[0, 39].tolist() == [255, 255, 255]


def test_a_png_is_what_was_written(tmp_path):
    image = torch.randint(256, (3, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_png(tmp_path / "a.png", image)
    data, at, chunks = (tmp_path / "a.png").read_bytes(), 8, {}
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert data[at + 8 + length : at + 12 + length] == struct.pack(">I", zlib.crc32(kind + body))
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"] == struct.pack(">IIBBBBB", 5, 3, 8, 2, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(3, 16)
    assert (lines[:, 0] == 0).all()
    assert (lines[:, 1:].reshape(3, 5, 3) == image.numpy()).all()


# opening


def test_a_run_is_opened_as_it_was_saved(trainer, state):
    mine, theirs = state.tensors(), trainer.state.tensors()
    assert all(torch.equal(filled(name, mine[name], trainer.slots), filled(name, theirs[name], trainer.slots)) for name in theirs)
    assert state.ring.frames.any()
    assert state.config == dataclasses.replace(trainer.config, graph="off")


def test_frames_that_were_not_kept_are_replayed(trainer, copy):
    shutil.rmtree(copy / "checkpoints" / "frames")
    opened, path = open_run(copy, CPU)
    assert path == copy / "checkpoints" / "checkpoint_000000064.safetensors"
    assert torch.equal(opened.ring.frames, trainer.state.ring.frames)


def test_a_damaged_checkpoint_is_passed_over_and_stays(copy):
    newer = copy / "checkpoints" / "checkpoint_000000099.safetensors"
    newer.write_bytes(b"nothing")
    assert open_run(copy, CPU)[1].name == "checkpoint_000000064.safetensors"
    assert newer.read_bytes() == b"nothing"


def test_a_checkpoint_of_another_network_is_refused(trainer, copy):
    write_json(copy / "config.json", trainer.config.to_json() | {"lstm": 16})
    with pytest.raises(checkpoint.CheckpointError, match=r"holds another network or ring than config.json says \(network.prefix_lstm"):
        open_run(copy, CPU)


def test_a_run_on_cuda_can_be_opened_on_a_cpu(trainer, copy):
    """Its snapshot is in bf16 and its generator's state of another size."""
    path = copy / "checkpoints" / "checkpoint_000000064.safetensors"
    tensors, meta = checkpoint.load(path)
    tensors = {name: tensor.bfloat16() if name.startswith("snapshot.") else tensor.clone() for name, tensor in tensors.items()}
    tensors["generator"] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.save(path, tensors, meta)
    write_json(copy / "config.json", trainer.config.to_json() | {"device": "cuda", "graph": "on"})
    opened = open_run(copy, CPU)[0]
    name, mine = next(opened.snapshot.named_parameters())
    assert torch.equal(mine, trainer.state.snapshot.get_parameter(name).bfloat16().float())


# the commands


def test_look_prints_verdicts_and_tables_draws_a_picture_and_changes_nothing(run, tmp_path, call):
    before = contents(run)
    code, printed = call(look, run, "--positions", 4, "--at", "1:5", "--out", tmp_path)
    assert code == 0
    assert contents(run) == before
    assert printed.count("\nposition ") == 5
    assert "position 4: lane 1, slot 5," in printed
    assert "BAD" not in printed
    assert (tmp_path / "look.png").read_bytes()[12:16] == b"IHDR"


def test_look_draws_the_same_again_and_others_by_another_seed(state):
    drawn = [look.positions(state, 8, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    eventful = (state.ring.reward != 0) | state.ring.done
    for flat in drawn[0][:4]:
        lane, slot = divmod(flat, state.ring.slots)
        assert any(eventful[lane, (slot + k) % state.ring.slots] for k in range(1, 4))
    assert all(ring.eligible(state.ring, state.config).view(-1)[flat] for flat in drawn[0])


def test_look_exits_with_1_if_something_is_bad(copy, call):
    path = copy / "checkpoints" / "checkpoint_000000064.safetensors"
    tensors, meta = checkpoint.load(path)
    checkpoint.save(path, tensors | {"ring.priority": torch.ones_like(tensors["ring.priority"])}, meta)
    code, printed = call(look, copy, "--positions", 1, "--out", copy)
    assert code == 1
    assert "BAD  dead slots with a priority" in printed


def test_overfit_fits_and_changes_nothing(run, call):
    before = contents(run)
    code, printed = call(overfit, run, "--updates", 120, "--batch", 6, "--fresh", "--lr", 0.3)
    assert code == 0
    assert contents(run) == before
    assert "6 positions, 120 updates of 6, sgd, lr 0.3, amp False, augment False, a new network" in printed
    table = {line.split()[0]: line for line in printed.splitlines() if line.split() and line.split()[0] in findings.LOSSES}
    assert "  fits" in table["policy_loss"]
    start, end = (float(table["value_loss"].split()[column]) for column in (3, 4))
    assert end < 1.1 * float(table["value_loss"].split()[1]) < start


def test_overfit_says_so_if_nothing_is_learned(run, call):
    _, printed = call(overfit, run, "--updates", 3, "--lr", 1e-9, "--fresh", "--optimizer", "clipped-lars", "--amp", "True")
    assert "clipped-lars, lr 1e-09, amp True" in printed
    assert "policy_loss" in printed
    assert printed.count("does NOT fit") >= 2


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        (look, ["--at", "4:0"], "--at 4:0: there are lanes 0 to 3 and slots 0 to 23"),
        (look, ["--at", "1"], "--at 1: give LANE:SLOT"),
        (look, ["--positions", "0"], "--positions 0: must be at least 1"),
        (look, ["--out", "/nowhere/at/all"], "--out /nowhere/at/all: not a folder"),
        (overfit, ["--batch", "5000"], "--batch 5000: only "),
        (overfit, ["--batch", "1"], "--batch 1: must be at least 2"),
        (overfit, ["--lr", "-1"], "--lr -1.0: must be greater than 0"),
    ],
)
def test_bad_arguments_are_one_line(run, call, tool, arguments, said):
    message, printed = call(tool, run, *arguments)
    assert message.startswith(f"error: {said}")
    assert "\n" not in message
    assert printed == ""


def test_a_run_that_is_none_or_has_nothing_to_learn_from_is_one_line(tmp_path, call):
    assert "no run there" in call(look, tmp_path)[0]
    make_run(tmp_path / "run", iterations=12)
    assert "no position can be learned from yet" in call(look, tmp_path / "run", "--out", tmp_path)[0]
    (tmp_path / "run" / "checkpoints" / "checkpoint_000000012.safetensors").unlink()
    assert "no checkpoint there" in call(look, tmp_path / "run", "--out", tmp_path)[0]


def test_a_batch_of_positions_is_what_an_update_learns_from(state):
    index, batch, plain = batch_of(state)
    assert isinstance(batch, Batch)
    assert len(set(index.tolist())) == len(index)
    assert torch.equal(batch.targets.value, plain.targets.value)
