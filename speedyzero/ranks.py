"""Many ranks: one run, shared by the processes that torchrun started. Nothing else knows `torch.distributed`.

Every rank holds the same state, bit for bit: ring, network, generator, counts. So every decision is common without a word, all noise is
that of its position and not of its rank, and a checkpoint, which rank 0 writes, is of the run and not of so many ranks. What the ranks
share is the work. In the order of an iteration, each

    steps its own lanes                         what the emulators said is gathered on the host, by all
    searches its share of the positions         policies, values, visits are gathered
    learns from its share of each batch         BatchNorm's sums are added up, the flat gradient averaged, the predicted values gathered

The results differ from those of one rank by rounding alone: sums add up in another order, and products of fewer rows round differently.
In the shapes `m` is a rank's share of some rows.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from speedyzero.torchrun import on_this_machine

if TYPE_CHECKING:
    from speedyzero.config import Config

ANSWER_S = 3.0
"""Seconds that the ranks which are left have to say so, when a message fails: those that do not are gone."""

TORCHRUN_ANSWERS_S = 30.0
"""Seconds in which a machine on which torchrun has ended must refuse to answer."""


class RanksError(RuntimeError):
    """The ranks cannot start together, or one is gone; the message is one line, empty if another rank says it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; without arguments, the only one, for which every method returns what it was given.

    Every collective method must be called by all ranks in the same order with the same shapes. Each raises RanksError if a rank is gone.
    """

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None
    """What the ranks met in."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files of the run, and speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's rows of `count`, a multiple of `size`."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def gather(self, *shares: Tensor) -> tuple[Tensor, ...]:
        """The rows [m, ...] of this rank, 4 bytes an element -> those of all ranks [size x m, ...], rank 0's first. One message."""
        if self.size == 1:
            return shares
        rows = shares[0].shape[0]
        words = [share.reshape(rows, -1).contiguous().view(torch.int32) for share in shares]
        mine = torch.cat(words, 1)
        everyone = mine.new_empty(self.size * rows, mine.shape[1])
        with self._peers():
            dist.all_gather(list(everyone.chunk(self.size)), mine)
        parts = everyone.split([word.shape[1] for word in words], 1)
        return tuple(part.contiguous().view(share.dtype).view(-1, *share.shape[1:]) for part, share in zip(parts, shares, strict=True))

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks, the same bits on all. One message."""
        if self.size > 1:
            with self._peers():
                dist.all_reduce(tensor)

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the ranks, the same bits on all. One message."""
        self.add(tensor)
        if self.size > 1:
            tensor.div_(self.size)

    def average_metrics(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics [] float32 of this rank's share of a batch -> of the batch. One message."""
        if self.size == 1:
            return metrics
        row = torch.stack(list(metrics.values())).float()
        self.average(row)
        return dict(zip(metrics, row.unbind(), strict=True))

    def gather_arrays(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """As `gather`, of host arrays of any dtypes, which are the same on all ranks."""
        if self.size == 1:
            return arrays
        arrays = tuple(np.ascontiguousarray(array) for array in arrays)
        mine = torch.from_numpy(np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays]))
        everyone = torch.empty(self.size, mine.numel(), dtype=torch.uint8)
        with self._peers():
            dist.all_gather(list(everyone.unbind()), mine)
        parts = np.split(everyone.numpy(), np.cumsum([array.nbytes for array in arrays])[:-1], axis=1)
        return tuple(
            np.ascontiguousarray(part).view(array.dtype).reshape(-1, *array.shape[1:]) for part, array in zip(parts, arrays, strict=True)
        )

    def greatest(self, number: int) -> int:
        """The greatest of the ranks' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        with self._peers():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def told(self, value: Any) -> Any:
        """What rank 0 gave."""
        if self.size == 1:
            return value
        values = [value]
        with self._peers():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def check_same(self, tensors: Iterable[Tensor]) -> None:
        """Raise RanksError unless tensors of 4-byte elements have the same bits on all ranks, as far as sums of their words tell.

        Waits for the device: for the host loop only.
        """
        if self.size == 1:
            return
        sums = torch.stack([tensor.reshape(-1).view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]).cpu()
        (everyone,) = self.gather(sums.view(torch.int32)[None])
        if other := (everyone != everyone[0]).any(1).nonzero().flatten().tolist():
            raise self._said_by_first(f"rank {other[0]} no longer has the state of rank 0; go on from a checkpoint with --resume")

    def check_started_alike(self, settings: Mapping[str, Any]) -> None:
        """Raise RanksError unless all ranks have the same settings; they have the same names."""
        if self.size == 1:
            return
        everyone: list[Mapping[str, Any]] = [{}] * self.size
        with self._peers():
            dist.all_gather_object(everyone, dict(settings))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    odd = f"{name} {theirs.get(name)}: of rank {rank}, and rank 0 has {value}"
                    raise self._said_by_first(f"{odd}; start all ranks with the same flags and software")

    def leave(self) -> None:
        """Wait for all, and part."""
        if self.size > 1:
            with self._peers():
                dist.barrier()
            dist.destroy_process_group()

    def _said_by_first(self, line: str) -> RanksError:
        return RanksError(line if self.leads else "")

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Say who is gone if a message fails."""
        try:
            yield
        except RuntimeError as error:
            raise RanksError(self._who_is_gone(error)) from error

    def _who_is_gone(self, error: RuntimeError) -> str:
        remedy = "go on with --resume, as torchrun --max-restarts does by itself"
        try:
            self.store.set(f"here/{self.rank}", "")
            end = time.monotonic() + ANSWER_S
            while (gone := self._silent()) and time.monotonic() < end:
                time.sleep(0.05)
        except RuntimeError:
            return f"rank {self.rank} lost the others; {remedy}"
        if self.rank > min(set(range(self.size)) - set(gone)):
            return ""
        if not gone:
            return f"a message between the ranks failed ({_first_line(error)}); {remedy}"
        return f"{_named(gone)} ended or {'is' if len(gone) == 1 else 'are'} stuck, and so all end; {remedy}"

    def _silent(self) -> list[int]:
        return [rank for rank in range(self.size) if not self.store.check([f"here/{rank}"])]


ALONE = Ranks()
"""The only rank."""


def join(device: torch.device, limit: float) -> Ranks:
    """Meet the other ranks that torchrun started; the only rank without it. On CUDA each takes the device of its local rank.

    limit: seconds after which a rank that has not come, or does not answer, is given up.

    Raises:
        RanksError: a rank did not come, torchrun has ended, or there are more ranks than devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if device.type == "cuda":
        devices = torch.cuda.device_count()
        if on_this_machine() > devices:
            raise RanksError(
                f"--nproc-per-node {on_this_machine()}: this machine has {devices} CUDA devices; start at most so many ranks, or give "
                "--device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, rank, patience = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", int(os.environ["RANK"]), timedelta(seconds=limit)
    end = time.monotonic() + limit
    _find_torchrun()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        store = _met(store, rank, size, end)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError, TimeoutError) as error:
        # A store of rank 0's own waits for all ranks by itself, and knows nothing of who came.
        who = str(error) if isinstance(error, TimeoutError) else f"the {size} could not meet: {_first_line(error)}"
        raise RanksError(f"ranks: {who}, within {limit:g} s (--watchdog); start all of them, with one address") from error
    return Ranks(rank, size, store)


def _find_torchrun() -> None:
    """Raise RanksError if the ranks are to meet in a store of torchrun, and that has ended: it was there before they were."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        try:
            socket.create_connection((host, int(port)), TORCHRUN_ANSWERS_S).close()
        except OSError as error:
            raise RanksError(f"torchrun, which started this rank, has ended ({host}:{port}: {error}); start it again") from error


def _met(store: dist.Store, rank: int, size: int, end: float) -> dist.Store:
    """A store for this start of the ranks alone, once all are there: torchrun keeps one store over its restarts, and what ranks that have
    ended wrote there must not be taken for the others' word.

    Rank 0 names the start; the others answer under that name with a token of their own, until they find it in rank 0's list.

    Raises:
        TimeoutError: a rank is not there at `end`; names it.
    """
    token = uuid.uuid4().hex
    others = range(1, size)
    if rank == 0:
        store.set("start", token)
        here = dist.PrefixStore(token, store)
        while missing := [other for other in others if not here.check([f"token/{other}"])]:
            _wait_until(end, f"{_named(missing)} of {size} did not come")
        here.set("tokens", ",".join(here.get(f"token/{other}").decode() for other in others))
        return here
    while True:
        if store.check(["start"]):
            here = dist.PrefixStore(store.get("start").decode(), store)
            here.set(f"token/{rank}", token)
            if here.check(["tokens"]) and token in here.get("tokens").decode():
                return here
        _wait_until(end, f"rank 0 of {size} did not come, or another did not")


def _wait_until(end: float, why: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(why)
    time.sleep(0.02)


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def check_shares(config: Config, size: int) -> None:
    """Raise RanksError, which names the flag, if the ranks' shares of some work would not be equal."""
    units: dict[str, int] = {"lanes": 1, "batch_size": 1, "refresh_values": 1}
    if config.refresh == "sweep":
        units["refresh_roots"] = 8  # while the ring fills, a sweep takes an eighth of it
    for name, unit in units.items():
        value = getattr(config, name)
        if value % (unit * size):
            raise RanksError(
                f"--{name.replace('_', '-')} {value}: is not shared equally by {size} ranks; give a multiple of {unit * size}, or start "
                "another number of ranks"
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
