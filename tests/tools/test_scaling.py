"""tools/profile/scaling: the time of launches and messages by hand, the messages of a real run of two ranks, the tool itself.

`python -m tests.tools.test_scaling CONFIG.json FOUND`, once for each rank, is that run.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from speedyzero import loop
from speedyzero.config import ConfigError, from_json, preset_config, resolve
from speedyzero.envs import describe
from speedyzero.nets import outline
from speedyzero.ranks import Ranks, RanksError, join
from speedyzero.schedule import iterations
from speedyzero.sizes import network_spec
from tests.conftest import TINY
from tests.run.test_ranks import two_workers
from tools.profile import scaling
from tools.profile.launches import Iterations, Launch, flops, number, summed
from tools.profile.scaling import PARTS, HostMessages, Machine, grown, messages_of, parts_of, predict

CPU = torch.device("cpu")
SECOND = 1e6
"""In microseconds."""
SLOW = Machine(
    tflops=100e-12, tbs=10e-12, launch_us=SECOND, message_us=2 * SECOND, net_message_us=3 * SECOND, link_gbs=8e-9, net_gbs=4e-9,
    host_message_us=SECOND, host_gbs=1e-9, emulator_rate=0.5, cores_per_gpu=2, gpus_per_node=2,
)  # fmt: skip
"""100 FLOP and 10 bytes a second, and so on: its times can be worked out by hand."""


def test_the_time_of_an_iteration_is_what_a_hand_works_out():
    found = Counter(
        {
            Launch("2.2 tree search", "mm", 1, 500, 20, 20, True): 3,  # 5 s of FLOPs against 2 of bytes, and 1 to launch it
            Launch("5.3 losses", "add", 2, 0, 40, 40, False): 1,  # 4 s of bytes, 2 to launch both
            Launch("5.4 backward", "all_reduce", 1, 0, 20, 20, False, 16): 1,
            Launch("5.4 backward", "all_gather", 1, 0, 20, 20, False, 16): 1,
        }
    )
    # On two nodes of two. The sum: 2 + 3 s, in each node 16 bytes there and back by half at 8 a second, between the nodes 8 bytes there and
    # back by half at 4 a second, 2 s of bytes on the device and 1 to launch it. The gathering goes one way.
    reduced, gathered = (2 + 3) + 2 + 2 + (2 + 1), (2 + 3) + 1 + 1 + (2 + 1)
    host = HostMessages(emulators=(30,), stop=(8,))
    parts = parts_of(found, "train", host, lanes=3, gpus=4, machine=SLOW)
    turn = 2 / 0.5 + (2 + 30 * 3 / 4)  # two rounds of emulators; two doublings, and three quarters come from others
    assert parts == pytest.approx({
        "operations": 15, "memory": 4, "search launches": 3, "launches": 2, "messages": reduced + gathered,
        "emulators": turn - (4 + 2 + reduced + gathered), "host": 2 + 8 * 3 / 4,
    })  # fmt: skip
    assert parts_of(found, "learn", host, 3, 4, SLOW)["emulators"] == 0
    hidden = Counter({Launch("5.3 losses", "add", 2, 0, 4000, 4000, False): 1})
    assert parts_of(hidden, "train", host, 3, 4, SLOW)["emulators"] == 0
    assert parts_of(hidden, "collect", HostMessages((), ()), 3, 1, SLOW)["messages"] == 0


def test_the_gpus_of_a_machine_fill_its_nodes():
    assert [Machine().nodes(gpus) for gpus in (1, 5, 8, 16)] == [1, 1, 1, 2]
    with pytest.raises(ConfigError, match="--gpus 12: does not fill its nodes of --gpus-per-node 8"):
        Machine().nodes(12)


@pytest.fixture(scope="module")
def made():
    """A config as on CUDA that two ranks can share, and its environment."""
    sizes = {"batch_size": 8, "lanes": 8, "start_transitions": 160, "env_steps": 320, "ring_positions": 400, "refresh_roots": 32}
    settings = TINY | sizes | {"refresh_values": 8, "device": "cuda", "amp": True}
    config = dataclasses.replace(preset_config("cpu"), env="Catch-v0", run_dir=Path("run"), **settings)
    return resolve(config, image=False, atari=False), describe("Catch-v0")


@pytest.fixture(scope="module")
def shared(made):
    """The launches of one of two ranks in an iteration of training."""
    return Iterations(*made, ranks=Ranks(0, 2)).iteration("train", 32)


@pytest.mark.slow
def test_the_messages_that_are_counted_are_those_that_two_ranks_send(made, tmp_path):
    config, spec = made
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.replace(config, device="cpu", amp=False).to_json()))
    codes, errors = two_workers("tests.tools.test_scaling", str(path), str(tmp_path / "found"))
    assert codes == [0, 0], errors
    ranks = Ranks(0, 2)
    counted, host = Iterations(config, spec, ranks=ranks), scaling.host_messages(config, spec, ranks)
    sent = json.loads((tmp_path / "found").read_text())
    assert {phase for phase, _, _ in sent} == {"collect", "sweep", "train", "learn"}
    assert len({roots for _, roots, _ in sent}) > 2
    for phase, roots, messages in sent:
        expected = Counter({(name.split("_")[1], bytes_): 0 for name, bytes_ in messages})
        for launch, times in messages_of(counted.iteration(phase, roots)).items():
            expected[launch.name.split("_")[1], launch.sent] += times
        expected.update([("gather", bytes_) for bytes_ in host.emulators] if phase in ("collect", "train") else [])
        expected.update([("reduce", bytes_) for bytes_ in host.stop])
        assert Counter((name.split("_")[1], bytes_) for name, bytes_ in messages) == +expected, (phase, roots)


@pytest.mark.slow
def test_a_rank_of_many_does_its_share_and_sends_its_gradient_once_an_update(made, shared):
    config, spec = made
    alone = Iterations(config, spec).iteration("train", 32)
    assert not messages_of(alone)
    assert summed(shared, flops) == pytest.approx(summed(alone, flops) / 2, rel=0.03)  # the maps of the actions are made by every rank
    parameters = sum(p.numel() for p in outline(network_spec(config, spec.frame_shape, spec.num_actions)).parameters())
    gradients = {launch: times for launch, times in messages_of(shared).items() if launch.sent == 4 * parameters}
    assert list(gradients.values()) == [config.updates_per_iteration]
    # A BatchNorm sends its sums and adds up their chunks, each way: not as many launches more as PyTorch would need for it.
    norms = sum(messages_of(shared).values()) - config.updates_per_iteration
    assert number(alone) < number(shared) < number(alone) + 3 * norms


@pytest.mark.slow
def test_an_iteration_takes_less_on_a_machine_that_is_better_in_anything(shared):
    host = HostMessages((100.0,), (8.0,))
    # All of its rates matter to so small a network, and the emulators are not all hidden.
    machine = Machine(tflops=1e-6, tbs=1e-3, emulator_rate=1e-3, cores_per_gpu=1, gpus_per_node=2)
    usual = parts_of(shared, "train", host, 4, 4, machine)
    assert min(usual.values()) > 0
    for field in dataclasses.fields(Machine):
        value = getattr(machine, field.name)
        better = dataclasses.replace(machine, **{field.name: value / 2 if field.name.endswith("_us") else 2 * value})
        changed = parts_of(shared, "train", host, 4, 4, better)
        # A faster device waits longer for the same emulators.
        assert any(changed[name] < usual[name] for name in PARTS), field.name
        assert {name for name in PARTS if changed[name] > usual[name]} <= {"emulators"}, field.name


@pytest.mark.slow
def test_the_time_of_a_run_is_that_of_its_iterations(made):
    config, spec = made
    found = predict(config, spec, 2, Machine())
    counted, host = Iterations(config, spec, ranks=Ranks(0, 2)), scaling.host_messages(config, spec, Ranks(0, 2))
    seconds = sum(sum(parts_of(counted.iteration(*each), each[0], host, 4, 2, Machine()).values()) for each in iterations(config))
    assert found.minutes == pytest.approx(seconds / 60)
    assert found.limit == max(found.run, key=lambda name: found.run[name])


def test_a_weakly_scaled_run_sees_as_many_samples_and_says_what_it_cannot_do(made):
    config, _ = made
    assert grown(config, 1) == config
    larger = grown(config, 2)
    assert (larger.lanes, larger.batch_size, larger.refresh_roots, larger.refresh_values) == (16, 16, 64, 16)
    assert larger.total_updates * larger.batch_size == pytest.approx(config.total_updates * config.batch_size, rel=0.02)
    assert grown(config, 4).refresh_roots == 96  # a quarter of the ring, in shares of eight
    atari = resolve(dataclasses.replace(preset_config("speedyzero"), env="Pong-v5", device="cuda"), image=True, atari=True)
    with pytest.raises(ConfigError, match="--batch-size 131072"):
        grown(atari, 64)
    with pytest.raises(RanksError, match="--lanes 8"):
        predict(config, describe(config.env), 16, Machine())


@pytest.mark.slow
def test_the_tool_prints_a_row_for_each_number_of_gpus_and_refuses_rates_that_make_no_sense(call, tmp_path):
    flags = ["--env", "Catch-v0", "--preset", "smoke", "--gpus", "1", "16", "--scaling", "strong"]
    code, printed = call(scaling, *flags, "--json", tmp_path / "rows.json", "--refresh-roots", "32", "--simulations", "2")
    assert code == 0, printed
    alone, refused = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert "--lanes 8: is not shared equally by 16 ranks" in printed
    assert refused["refused"].startswith("--lanes 8: ")
    assert (alone["speed_up"], alone["efficiency"], alone["refresh_roots"]) == (1, 1, 32)
    assert f"{alone['run']['minutes']:.2f}" in printed
    for flag, value in (("--tbs", "0.0"), ("--gpus", "0"), ("--launch-us", "-1.0"), ("--json", str(tmp_path / "none" / "rows.json"))):
        code, _ = call(scaling, *flags, flag, value)
        assert str(code).startswith(f"error: {flag} {value}: "), code


def main() -> None:
    """Train as a rank of two and write what rank 0 sent: [phase, R, messages] of each iteration, a message by its name and bytes."""
    torch.set_num_threads(1)
    config = from_json(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
    ranks = join(CPU, 60.0)
    trainer, sent = loop.Trainer(config, describe(config.env), CPU, ranks), []
    trainer.start()
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor, *rest):
        sent[-1][2].append(["all_reduce", tensor.nbytes])
        reduce(tensor, *rest)

    def all_gather(everyone, mine):
        sent[-1][2].append(["all_gather", sum(theirs.nbytes for theirs in everyone)])
        gather(everyone, mine)

    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather):
        while (phase := trainer.phase()) is not None:
            sent.append([phase, 0 if phase == "collect" else trainer.roots(), []])
            trainer.step(phase)
            loop._asked_to_stop(ranks, SimpleNamespace(requested=None))
    if ranks.leads:
        Path(sys.argv[2]).write_text(json.dumps(sent))
    ranks.leave()


if __name__ == "__main__":
    main()
