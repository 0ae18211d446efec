"""What the host says of numbers that go bad, and how it stops a run that they have ruined."""

import json

import pytest
import torch

from speedyzero import learn
from speedyzero.__main__ import main
from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.ring import ingest
from speedyzero.run import checkpoint, health
from speedyzero.run.health import BATCH, Health, NonFiniteError
from speedyzero_kernels.support import transform
from tests.runs import resumed, save

CPU = torch.device("cpu")
SETTINGS = {"augment": True, "shift": 1, "batch_size": 8}


def trained(config) -> Trainer:
    """A trainer that has learned a little."""
    trainer = Trainer(config, describe(config.env), CPU)
    trainer.start()
    while trainer.updates < 6:
        trainer.step(trainer.phase())
    return trainer


def infinite_variance(trainer: Trainer) -> None:
    """Frames that are finite, and so is the loss of them; the statistics of BatchNorm are not."""
    trainer.state.ring.frames[:, ::2] = 1e25


def missing(trainer: Trainer) -> None:
    trainer.state.ring.frames.fill_(torch.nan)
    trainer.state.ring.value.fill_(torch.nan)


def skip(trainer: Trainer, spoil, times: int) -> None:
    """Let updates be skipped, and nothing else be done."""
    state, before = trainer.state, int(trainer.state.learner.skipped_in_a_row)
    spoil(trainer)
    allowed = ~state.ring.done
    allowed[:, trainer.slots - trainer.config.window :] = False
    for _ in range(times):
        drawn, weights = learn.draw(state.ring, allowed, trainer.config, state.updates, state.generator)
        state.learn_averages.add(learn.update(state.learner, state.ring, drawn, weights, state.updates, trainer.config, state.generator))
    assert state.learner.skipped_in_a_row == before + times


# Updates that were skipped


def test_updates_skipped_since_the_last_row_are_said_in_one_line_and_no_others(tiny_config):
    trainer, lines = Trainer(tiny_config(), describe("Catch-v0"), CPU), []
    trainer.state.learner.skipped.fill_(4)  # a run that went on: those were said before
    watch = Health(trainer.state, lines.append)
    why = "skipped since loss, gradient or statistics were not finite"
    for skipped, said in [(4, []), (5, [f"1 update was {why} (5 in all)"]), (5, []), (12, [f"7 updates were {why} (12 in all)"]), (12, [])]:
        trainer.state.learner.skipped.fill_(skipped)
        watch.check(trainer.metrics())
        assert lines == said
        lines.clear()


def test_the_run_stops_when_as_many_in_a_row_were_skipped_as_the_flag_says_and_not_before(tiny_config):
    trainer = trained(tiny_config(max_skipped=7, **SETTINGS))
    trainer.config.run_dir.mkdir()
    watch = Health(trainer.state, lambda line: None)
    skip(trainer, missing, 6)
    watch.check(trainer.metrics())
    assert not (trainer.config.run_dir / BATCH).exists()
    skip(trainer, missing, 1)
    with pytest.raises(NonFiniteError) as stop:
        watch.check(trainer.metrics())
    line, run_dir = str(stop.value), trainer.config.run_dir
    assert "\n" not in line
    what, where, mend = line.split("; ")
    assert what == "the last 7 updates were skipped since loss, gradient or statistics were not finite (--max-skipped 7)"
    assert where.startswith(f"the last batch is in {run_dir / BATCH} (not finite: observation, future, targets.value, loss, ")
    assert mend == (
        f"start anew with a lower --lr or --max-grad-norm, or go on from the last checkpoint with --resume --run-dir {run_dir}"
    )
    # No new one, no stop: a run that goes on takes its first updates before it is judged.
    Health(trainer.state, lambda line: None).check(trainer.metrics())


@pytest.mark.parametrize("amp", [False, True])
def test_the_saved_batch_is_the_one_that_was_skipped_and_gives_the_same_loss_again(tiny_config, monkeypatch, amp):
    trainer = trained(tiny_config(max_skipped=3, amp=amp, **SETTINGS))
    trainer.config.run_dir.mkdir()
    watch = Health(trainer.state, lambda line: None)
    batches, losses = [], learn.losses
    monkeypatch.setattr(learn, "losses", lambda network, batch, config: batches.append(batch) or losses(network, batch, config))
    skip(trainer, infinite_variance, 3)
    kept, row = trainer.state.learner.evidence.read(), trainer.metrics()
    with pytest.raises(NonFiniteError, match=r"\(not finite: \d+ of 38 statistics\)"):
        watch.check(row)
    tensors, meta = checkpoint.load(trainer.config.run_dir / BATCH)
    assert set(kept) < set(tensors)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept if name != "grad_norm")
    assert tensors["update"] == trainer.state.updates
    config = trainer.config
    assert tensors["observation"].shape == (8, config.frame_stack, 10, 5)
    assert tensors["future"].shape == (8 * config.unroll, config.frame_stack, 10, 5)
    assert tensors["observation"].dtype == (torch.bfloat16 if amp else torch.float32)
    assert torch.equal(tensors["observation"], batches[-1].observation)
    assert torch.equal(tensors["future"], batches[-1].future)
    assert not torch.equal(tensors["observation"], batches[-2].observation), "or the test could not tell"
    # The same frames, targets, weights and draws on the same network: to the bit.
    assert tensors["loss"].isfinite()
    assert tensors["again.loss"] == tensors["loss"]
    assert tensors["again.grad_norm"].isfinite()
    assert tensors["again.value"].shape == (8,)
    assert not tensors["overwritten"].any()
    bad = meta["not_finite"]
    assert (bad["batch"], bad["losses"], bad["gradients"]) == ([], [], [])
    assert "representation.0.norm.running_var" in bad["statistics"]
    assert not any("num_batches" in name for name in bad["statistics"])
    assert (meta["slots"], meta["env"], meta["config"]["seed"]) == (config.slots, "Catch-v0", config.seed)


def test_what_is_not_finite_in_the_saved_batch_is_named(tiny_config):
    trainer = trained(tiny_config(max_skipped=1, **SETTINGS))
    trainer.config.run_dir.mkdir()
    watch = Health(trainer.state, lambda line: None)
    trainer.state.learner.network.value_head.last.bias.data[3] = torch.inf
    skip(trainer, lambda trainer: None, 1)
    with pytest.raises(NonFiniteError, match=r"\(not finite: loss, value_loss, grad_norm, value, \d+ of 68 gradients\)"):
        watch.check(trainer.metrics())
    tensors, meta = checkpoint.load(trainer.config.run_dir / BATCH)
    bad = meta["not_finite"]
    assert bad["batch"] == bad["statistics"] == []
    assert bad["losses"] == ["loss", "value_loss", "grad_norm", "value"]
    assert "value_head.last.weight" in bad["gradients"]
    assert not any(name.startswith(("policy_", "prefix_", "predictor")) for name in bad["gradients"])
    assert tensors["again.value_loss"].isnan()
    assert tensors["again.policy_loss"].isfinite()


@pytest.mark.parametrize("spoil", [infinite_variance, missing])
def test_looking_into_a_batch_changes_nothing_of_the_state(tiny_config, spoil):
    trainer = trained(tiny_config(max_skipped=1, **SETTINGS))
    trainer.config.run_dir.mkdir()
    watch = Health(trainer.state, lambda line: None)
    skip(trainer, spoil, 2)
    row = trainer.metrics()

    def everything():
        state = {name: tensor.numpy(force=True).tobytes() for name, tensor in trainer.state.tensors().items()}
        return state | {"generator": trainer.state.generator.get_state().numpy().tobytes()}

    before = everything()
    with pytest.raises(NonFiniteError):
        watch.check(row)
    assert everything() == before


def test_a_batch_that_cannot_be_saved_or_evaluated_is_said_to_be_and_the_run_stops_all_the_same(tiny_config, monkeypatch):
    trainer = trained(tiny_config(max_skipped=1, **SETTINGS))
    path = trainer.config.run_dir / BATCH
    watch = Health(trainer.state, lambda line: None)
    skip(trainer, missing, 1)
    with pytest.raises(NonFiniteError, match=r"the last batch could not be saved to \S+ \(No such file or directory\); start anew"):
        watch.check(trainer.metrics())  # there is no run directory
    path.parent.mkdir()

    def no_memory(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def stopped():
        watch._skipped = 0
        with pytest.raises(NonFiniteError) as stop:
            watch.check(trainer.metrics())
        return str(stop.value)

    with monkeypatch.context() as patch:
        patch.setattr(health, "losses", no_memory)
        assert f"the last batch is in {path} (not evaluated again: the GPU has too little memory); start anew" in stopped()
        tensors, meta = checkpoint.load(path)
        assert tensors["observation"].isnan().all()
        assert meta["not_finite"] == {"batch": ["observation", "future", "targets.value"]}
    path.unlink()
    monkeypatch.setattr(health, "observe", no_memory)
    assert "could not be saved" in stopped()
    assert "too little memory to gather it" in stopped()
    assert not path.exists()


def test_samples_whose_frames_the_ring_has_lost_since_are_marked(tiny_config):
    trainer = trained(tiny_config(frame_stack=2))
    ring, slots = trainer.state.ring, trainer.config.slots
    while ring.head < slots + 5:
        ingest(ring, trainer.state.inbox, False)
    ring.first.fill_(False)
    index = torch.arange(slots) + slots  # of lane 1
    head = ring.head.clone()

    def stacks():
        """Which step each frame of each stack is of, by slot: what is written anew is of a later lap."""
        last = int(ring.head) - 1
        step = {slot: last - (last - slot) % slots for slot in range(slots)}
        return [(step[(slot - 1) % slots], step[slot]) for slot in range(slots)]

    before = stacks()
    whole = [older + 1 == newer for older, newer in before]
    assert whole.count(False) == 1, "the oldest has no frame before it"
    for more in range(6):
        lost = [a != b for a, b in zip(before, stacks(), strict=True)]
        found = health._overwritten(trainer.state, index, head).tolist()
        assert [f for f, w in zip(found, whole, strict=True) if w] == [x for x, w in zip(lost, whole, strict=True) if w]
        assert sum(lost) == (0 if more == 0 else more + 1)
        ingest(ring, trainer.state.inbox, False)


def test_the_count_in_a_row_and_the_last_metrics_outlive_a_checkpoint(tiny_config, tmp_path):
    trainer = trained(tiny_config())
    learner = trainer.state.learner
    learner.skipped_in_a_row.fill_(17)
    other = resumed(tiny_config(), save(trainer, tmp_path)).state.learner
    assert other.skipped_in_a_row == 17
    assert torch.equal(other.reported, learner.reported)
    assert learner.reported[learn.LEARN_METRICS.index("losses/loss")] > 0


@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_of_no_updates_is_refused(tiny_config, count):
    with pytest.raises(ConfigError, match=f"--max-skipped {count}: must be greater than 0"):
        tiny_config(max_skipped=count)


# Values that outgrow their support


def test_values_near_the_end_of_the_support_are_said_once_and_again_only_after_they_fell_under_half(tiny_config):
    trainer, lines = Trainer(tiny_config(support=5), describe("Catch-v0"), CPU), []
    watch = Health(trainer.state, lines.append)
    # h(34.586...) = 5, by bisection; 90% of it is 31.13, half 17.29.
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if transform(torch.tensor(middle, dtype=torch.float64)) < 5 else (low, middle)
    assert low == pytest.approx(34.586, abs=1e-3)
    said = []
    for value in (0.9 * low - 0.01, 0.9 * low + 0.01, 34.0, 0.5 * low + 0.01, 34.0, float("nan"), 0.5 * low - 0.01, 31.0, 34.0, 34.0):
        watch.check({"train/skipped_updates": 0, "train/value_abs_max": value})
        said.append(len(lines))
    assert said == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    watch.check({"train/skipped_updates": 0})  # a row without: nothing was learned yet
    assert lines[0] == (
        "--support 5: a value of 31.14 was predicted, and the most it can express is 34.59; if returns are that large start anew with "
        "more, if not with a lower --lr"
    )


# Whole runs


def test_a_learning_rate_that_explodes_leaves_weights_and_statistics_finite(tiny_config):
    config = tiny_config(lr=1e30, max_skipped=8, env_steps=400)
    trainer = Trainer(config, describe(config.env), CPU)
    trainer.start()
    config.run_dir.mkdir()
    lines = []
    watch = Health(trainer.state, lines.append)

    def run():
        while (phase := trainer.phase()) is not None:
            trainer.step(phase)
            if trainer.iterations % config.log_interval == 0:
                watch.check(trainer.metrics())

    with pytest.raises(NonFiniteError):
        run()
    assert lines
    assert trainer.updates < 40
    assert all(tensor.isfinite().all() for tensor in trainer.state.learner.network.state_dict().values())
    assert trainer.state.learner.optimizer.flat.momentum.isfinite().all()
    assert trainer.state.ring.priority.isfinite().all()
    assert all(sums.isfinite().all() for sums in (trainer.state.learner.reported, trainer.state.learn_averages.sums))


def test_the_program_stops_an_exploded_run_with_one_line_a_batch_and_a_checkpoint(tmp_path, capsys):
    run_dir = tmp_path / "run"
    small = ["--env", "Catch-v0", "--preset", "smoke", "--device", "cpu", "--run-dir", str(run_dir), "--log-interval", "5"]
    with pytest.raises(SystemExit) as end:
        main([*small, "--lr", "1e30", "--max-skipped", "3"])
    line = end.value.code
    assert line.startswith("error: the last ")
    assert "(--max-skipped 3)" in line
    assert f"the last batch is in {run_dir / BATCH} (not finite: " in line
    assert "\n" not in line
    assert "updates were skipped since loss, gradient or statistics were not finite (" in capsys.readouterr().out
    tensors, meta = checkpoint.load(run_dir / BATCH)
    assert meta["not_finite"]["statistics"]
    assert tensors["update"] > 0
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    saved, _ = checkpoint.load(checkpoint.latest(run_dir / "checkpoints"))
    assert saved["learner.skipped"] == row["train/skipped_updates"] >= saved["learner.skipped_in_a_row"] >= 3
    assert all(tensor.isfinite().all() for name, tensor in saved.items() if name.startswith("network."))
    # It goes on, and stops again: the weights are as they were.
    with pytest.raises(SystemExit) as end:
        main(["--resume", "--run-dir", str(run_dir)])
    assert "error: the last " in str(end.value.code)


def test_a_run_goes_on_after_fewer_skipped_updates_than_the_limit(tiny_config, monkeypatch):
    config = tiny_config(max_skipped=5)
    trainer = Trainer(config, describe(config.env), CPU)
    trainer.start()
    lines, count = [], [0]
    watch = Health(trainer.state, lines.append)
    losses = learn.losses

    def fails_at_times(*args):
        count[0] += 1
        loss, metrics, value = losses(*args)
        if count[0] % 10 < 4:
            loss = loss * torch.inf
        return loss, metrics | {"loss": loss.detach()}, value

    monkeypatch.setattr(learn, "losses", fails_at_times)
    rows = []
    while (phase := trainer.phase()) is not None:
        trainer.step(phase)
        if trainer.iterations % config.log_interval == 0:
            rows.append(trainer.metrics())
            watch.check(rows[-1])
    skipped = sum(n % 10 < 4 for n in range(1, count[0] + 1))
    assert trainer.state.learner.skipped == skipped > 15
    assert len(lines) > 2
    learned = [row for row in rows if "losses/loss" in row]
    assert len(learned) > 2
    assert all(torch.tensor(row["losses/loss"]).isfinite() for row in learned)
