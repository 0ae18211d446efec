"""The emulators (steps 3 and 6 of the iteration: `send` and `recv`), and exact replay.

`Emulators` steps `N` lanes of an environment into host buffers that are allocated once. EnvPool's rule (*measured*, 1.2.5): the step
after a done ignores its action and returns the reset observation with reward 0; that step is no transition. After a lost life that reset
is up to 30 no-ops, and if the game ends in them EnvPool starts the next one without a word (*measured*, RoadRunner played at random: 6
games of 55); `Emulators` sees it by the lives.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from speedyzero.envs import EnvError, EnvSpec, envpool_version, make_pool, sticky_fault
from speedyzero.ranks import ALONE, Ranks

LOG_CHUNK = 4096
SAID = ("env_id", "elapsed_step", "lives", "terminated")
"""What is read of EnvPool's info, where it is there."""
VERIFIED = ("frames", "reward", "done", "first", "game_over")
_NOT_STARTED = "Emulators: call reset first"


class Emulators:
    """`N` lanes of one environment behind two verbs: `send` starts a step of all lanes, `recv` waits for it.

    The buffers are torch CPU tensors, allocated here once and overwritten in place by `reset` and `recv`:

    frames: [N, C, H, W] u8 if `spec.image`, else f32.
    reward: [N] f32, raw: never clipped; 0 where `first`.
    done: [N] bool, terminated or truncated; in training a lost life is a done.
    first: [N] bool, this frame is a reset frame: the one before was done, or there is none.
    game_over: [N] bool, the game really ended (no further life, or the time limit); otherwise as `done`. In training a game may also
        end in the no-ops that EnvPool plays after a lost life: then it is true at the reset frame, of the next game, where `done` is not.
    actions: [N] i64, written by the caller before `send`, which copies them. They are not checked there: the caller
        owes 0 <= action < A.
    cut: [N] bool on the host (numpy), the game that ended with this step was ended by a time limit that was set here: `max_episode_steps`
        or Atari's 27,000. An environment's own limit is part of the task.

    transitions: i64 host count of real transitions so far, that is of received steps that were not resets.
    """

    def __init__(
        self,
        spec: EnvSpec,
        lanes: int,
        seed: int,
        *,
        training: bool,
        threads: int | None = None,
        max_episode_steps: int | None = None,
        sticky_actions: float = 0.0,
        pin: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Allocate the buffers; `reset` starts the emulators.

        training: lives are episodes (Atari). threads: EnvPool's, None for one a lane up to the machine's cores; results
        do not depend on it. max_episode_steps: None for 27,000 on Atari and elsewhere the environment's own.
        sticky_actions: Atari only, the chance that an emulator repeats the last action for a frame; drawn from the seed.
        pin: page-locked buffers. ranks: each steps its share of the lanes, which must be equal, and all know what all of them said: the
        verbs are collective.

        Raises EnvError: a count that makes no sense, or sticky actions elsewhere.
        """
        if lanes < 1 or seed < 0 or (max_episode_steps is not None and max_episode_steps < 1):
            raise EnvError(f"{lanes=}, {seed=}, {max_episode_steps=}: want lanes >= 1, seed >= 0 and a limit >= 1")
        if fault := sticky_fault(spec.env_id, spec.family == "atari", sticky_actions):
            raise EnvError(fault)
        self.spec, self.lanes, self.seed, self.training, self.sticky_actions = spec, lanes, seed, training, sticky_actions
        self._ranks, self._mine = ranks, ranks.share(lanes)
        self._settings = spec.game_settings(training=training, sticky_actions=sticky_actions, max_episode_steps=max_episode_steps)
        self._threads, self._limit = threads or 0, max_episode_steps

        def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((lanes, *shape), dtype=dtype, pin_memory=pin)

        self.frames = buffer(spec.frame_shape, torch.uint8 if spec.image else torch.float32)
        self.reward = buffer((), torch.float32)
        self.done = buffer((), torch.bool)
        self.first = buffer((), torch.bool)
        self.game_over = buffer((), torch.bool)
        self.actions = buffer((), torch.int64)
        self.cut = np.zeros(lanes, bool)
        self._host = {name: getattr(self, name).numpy() for name in (*VERIFIED, "actions")}
        self._pool: Any = None
        self._clear()

    def reset(self) -> None:
        """Start the emulators from the seed (again, if they ran) and fill the buffers with the first frames."""
        self.close()
        self._pool = self._make()
        self._clear()
        host = self._host
        observations, info = self._pool.reset()
        (observations,), info = self._from_all(info, observations)
        self._store(observations, info["env_id"])
        if self.spec.family == "atari":
            self._lives[info["env_id"]] = info["lives"]
            self._all_lives[:] = self._lives
        host["reward"][:], host["done"][:], host["first"][:], host["game_over"][:] = 0, False, True, False
        self.cut[:] = False
        self._frames_crc = _crc(host["frames"])

    def send(self) -> None:
        """Start one step of every lane with `actions`; returns at once, and `actions` may be overwritten."""
        if self._pool is None or self._in_flight:
            raise EnvError("Emulators.send: call recv before the next send" if self._in_flight else _NOT_STARTED)
        actions = self._host["actions"]
        row = self._steps % LOG_CHUNK
        if row == 0:
            self._log.append(np.empty((LOG_CHUNK, self.lanes), _log_dtype(self.spec.num_actions)))
        self._log[-1][row] = actions
        self._steps += 1
        self._pool.send(actions[self._mine])
        self._in_flight = True

    def recv(self) -> None:
        """Wait for the step that `send` started and fill the buffers with it.

        Raises EnvError if the environment plays on past an explicit `max_episode_steps` (Catch, CliffWalking and the
        highway family ignore it; gfootball stops one step late).
        """
        if not self._in_flight:
            raise EnvError("Emulators.recv: nothing was sent" if self._pool is not None else _NOT_STARTED)
        observations, reward, terminated, truncated, info = self._pool.recv()
        self._in_flight = False
        (observations, reward, terminated, truncated), info = self._from_all(info, observations, reward, terminated, truncated)
        # Before anything is written: a step that fails leaves the buffers as they were.
        if self._limit is not None and (~(terminated | truncated) & (info["elapsed_step"] > self._limit)).any():
            raise EnvError(f"--max-episode-steps {self._limit}: {self.spec.env_id} ignores it in EnvPool; leave it out")
        host, lane = self._host, info["env_id"]  # sorted, measured; `lane` keeps us right were it not
        host["first"][:] = host["done"]
        life_lost = host["first"] & ~host["game_over"]
        self._store(observations, lane)
        host["reward"][lane] = reward
        host["done"][lane] = terminated | truncated
        over = info["terminated"].astype(bool) | truncated if self.spec.family == "atari" else terminated | truncated
        host["game_over"][lane] = over
        host["game_over"] &= host["done"]
        self.cut[lane] = truncated if "max_episode_steps" in self._settings else False
        self.cut &= host["game_over"]
        if self.spec.family == "atari":
            host["game_over"] |= self._ended_in_noops(life_lost, info["lives"], lane)
        self._frames_crc = _crc(host["frames"], self._frames_crc)
        self._received = self._steps
        self._count()

    def withdraw(self) -> None:
        """Take back a step whose `send` or `recv` raised, as if it had not been sent: the state is that before it."""
        if self._steps > self._received:
            self._steps -= 1
            if self._steps % LOG_CHUNK == 0:
                self._log.pop()
        self._in_flight = False

    def drain_finished(self) -> list[tuple[float, int]]:
        """(raw return, length in transitions) of every game that ended since the last call, lost lives included.

        In the order of their ends, those of one step by lane: drained after each `recv`, row i belongs to the i-th true
        lane of `game_over`.
        """
        finished, self._finished = self._finished, []
        return finished

    def unfinished(self) -> list[tuple[float, int]]:
        """(raw return, length in transitions) so far of the game that each lane is in."""
        return list(zip(self._returns.tolist(), self._lengths.tolist(), strict=True))

    def state_dict(self) -> dict[str, np.ndarray | int | str]:
        """All that `restore` needs: the actions sent so far, [steps, N], and what to check the replay against.

        An emulator cannot be serialised, but its future is a function of the seed and the actions. These are copies:
        later steps do not change them. Raises EnvError between `send` and `recv`.
        """
        if self._pool is None or self._in_flight:
            raise EnvError("Emulators.state_dict: call recv first" if self._in_flight else _NOT_STARTED)
        log = np.concatenate([np.empty((0, self.lanes), _log_dtype(self.spec.num_actions)), *self._log])[: self._steps]
        return {
            **self._identity(),
            "envpool": envpool_version(),
            "log": log,
            "log_crc": _crc(log),
            "transitions": self.transitions,
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "finished": np.array(self._finished, np.float64).reshape(-1, 2),
            "crc": np.array([_crc(self._host[name]) for name in VERIFIED], np.int64),
            "frames_crc": self._frames_crc,
        }

    def restore(self, state: dict[str, Any], seen: Callable[[int, int], None] | None = None) -> None:
        """Reset, replay the actions of a `state_dict`, and verify that every frame on the way and the buffers are those of then.

        seen: called after each number of steps from 0 on with it and the steps in all; the buffers then hold what that step gave. What
        it raises ends the replay. Raises EnvError if the state is of other emulators, damaged, or names actions there are not, or if
        the replay goes elsewhere.
        """
        try:
            state = {"sticky_actions": 0.0, **state}  # older checkpoints do not say
            for name, mine in self._identity().items():
                if state[name] != mine:
                    raise EnvError(f"the emulators could not be restored: saved with {name}={state[name]}, not {mine}")
            log = np.asarray(state["log"])
            damaged = log.shape[1:] != (self.lanes,) or log.dtype != _log_dtype(self.spec.num_actions) or _crc(log) != state["log_crc"]
            damaged |= np.shape(state["crc"]) != (len(VERIFIED),)
            if damaged or (log.size and not 0 <= log.min() <= log.max() < self.spec.num_actions):
                raise EnvError("the emulators could not be restored: the checkpoint's action log is damaged")
            finished = [(float(total), int(length)) for total, length in np.asarray(state["finished"]).reshape(-1, 2)]
            expected = {name: state[name] for name in ("crc", "frames_crc", "transitions", "returns", "lengths", "envpool")}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, EnvError):
                raise
            raise EnvError(f"the emulators could not be restored: what the checkpoint says of them is damaged ({error})") from None
        self.reset()
        for step in range(len(log) + 1):
            if step > 0:
                self._host["actions"][:] = log[step - 1]
                self.send()
                self.recv()
            if seen is not None:
                seen(step, len(log))
        self._verify(expected, len(log))
        self._finished = finished

    def close(self) -> None:
        """Stop the emulators and their threads; the buffers stay. `reset` starts them again."""
        if self._pool is not None:
            if self._in_flight:
                self._pool.recv()
                self._in_flight = False
            self._pool.close()
            self._pool = None  # EnvPool's threads end with the object, not with its close()

    def _make(self) -> Any:
        """A fresh EnvPool, each lane with a seed of its own: EnvPool's `seed + lane` would make lane 1 of one run lane 0 of the next
        seed's."""
        seeds = np.random.SeedSequence([self.seed, int(self.training)]).generate_state(self.lanes)[self._mine] >> 1
        pool, self._order = make_pool(self.spec, seeds.tolist(), {"num_threads": self._threads, **self._settings})
        return pool

    def _from_all(self, info: dict[str, np.ndarray], *arrays: np.ndarray) -> tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]:
        """What this rank's emulators said, `arrays` and SAID of `info`, as what all ranks' said."""
        said = {name: info[name] for name in SAID if name in info}
        said["env_id"] = said["env_id"] + self._mine.start
        whole = self._ranks.gather_arrays(*arrays, *said.values())
        return whole[: len(arrays)], dict(zip(said, whole[len(arrays) :], strict=True))

    def _clear(self) -> None:
        """Empty log and counters, as before the first step."""
        self._in_flight = False
        self._log: list[np.ndarray] = []
        self._steps = self._received = 0
        self._frames_crc = 0
        """Over all frames since the start."""
        self.transitions = 0
        self._returns = np.zeros(self.lanes, np.float64)
        self._lengths = np.zeros(self.lanes, np.int64)
        self._lives, self._all_lives = np.zeros((2, self.lanes), np.int64)
        self._finished: list[tuple[float, int]] = []

    def _store(self, observations: np.ndarray, lane: np.ndarray) -> None:
        """Copy observations, row i of lane `lane[i]`, into `frames`."""
        frames = self._host["frames"]
        if self._order == "one-hot":
            frames[:] = 0
            frames[lane, observations] = 1
        elif self._order == "hwc":
            frames.transpose(0, 2, 3, 1)[lane] = observations
        else:
            frames[lane] = observations.reshape(frames.shape)

    def _ended_in_noops(self, life_lost: np.ndarray, lives: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """[N] bool, the lanes whose reset after a lost life found the game over and started another; keeps the lives of this step.

        life_lost: [N] bool, this is such a reset. lives: those of now, entry i of lane `lane[i]`. No flag of EnvPool's says it, and its
        `elapsed_step` goes on over both games, the time limit with it; but the lives rise to those of a new game. A life won in the
        no-ops makes them rise as well, though not that far.
        """
        before = self._lives.copy()
        self._lives[lane] = lives
        return life_lost & (self._lives > before) & (self._lives >= self._all_lives)

    def _count(self) -> None:
        """Add the received step to the transitions and to the games; a reset step is neither."""
        host = self._host
        moved = ~host["first"]
        self.transitions += int(np.count_nonzero(moved))
        self._returns += host["reward"]
        self._lengths += moved
        for lane in np.flatnonzero(host["game_over"]):
            self._finished.append((float(self._returns[lane]), int(self._lengths[lane])))
            self._returns[lane] = self._lengths[lane] = 0

    def _identity(self) -> dict[str, int | float | str]:
        """What must be equal for a replay to mean anything."""
        limit = self._settings.get("max_episode_steps", 0)
        identity = {"env_id": self.spec.env_id, "lanes": self.lanes, "seed": self.seed}
        return identity | {"training": int(self.training), "max_episode_steps": limit, "sticky_actions": self.sticky_actions}

    def _verify(self, state: dict[str, Any], steps: int) -> None:
        """Raise EnvError unless the replay of `steps` steps went and ended as they did before the state was saved."""
        now = self.state_dict()
        wrong = [name for name, crc, saved in zip(VERIFIED, now["crc"], state["crc"], strict=True) if crc != saved]
        if not wrong and now["frames_crc"] != state["frames_crc"]:
            wrong = ["frames on the way"]
        wrong += [name for name in ("transitions", "returns", "lengths") if not np.array_equal(now[name], state[name])]
        if wrong:
            here, there = now["envpool"], state["envpool"]
            if here == there:
                why = f"envpool is {here} in both, so its build, the game's ROM or the checkpoint must differ"
            else:
                why = f"saved with envpool {there}, this is {here}: pip install envpool=={there}"
            raise EnvError(f"the emulators could not be restored: {', '.join(wrong)} differ after {steps} steps; {why}")


def _log_dtype(num_actions: int) -> type:
    return np.uint8 if num_actions <= 256 else np.int16 if num_actions <= 32768 else np.int32


def _crc(array: np.ndarray, before: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, before) if array.size else before
