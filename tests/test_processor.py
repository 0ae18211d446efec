"""What a run asks of the CPU: memory that malloc keeps, cores, bf16."""

import os
import subprocess
import sys

import pytest
import torch

from speedyzero import __main__, evaluate, processor
from speedyzero.config import ConfigError

# A block of 64 MiB, freed and taken again: whoever gets it anew from the system pays a page fault for each of its pages.
TWICE = """
import resource, sys, numpy
from speedyzero import processor
if sys.argv[1] == "keep":
    assert processor.keep_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.empty(1 << 26, numpy.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="mallopt is glibc's")
def test_memory_that_was_freed_is_taken_again_without_page_faults():
    def faults(mode: str) -> int:
        variables = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
        return int(subprocess.run([sys.executable, "-c", TWICE, mode], capture_output=True, text=True, check=True, env=variables).stdout)

    assert faults("keep") < 100
    assert faults("give back") > 1000


def test_bf16_is_for_processors_that_multiply_it(monkeypatch):
    for avx, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert processor.has_fast_bf16() == (avx or amx)


def test_only_the_cores_that_the_process_may_run_on_are_counted(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert processor.usable_cores() == 3


@pytest.mark.parametrize(("given", "wanted"), [(None, "32"), ("4", "4")])
def test_streams_get_their_queues_before_anything_asks_for_a_gpu(monkeypatch, given, wanted):
    asked = []

    def pick_device(name):
        asked.append(os.environ.get(processor.MAX_CONNECTIONS))
        raise ConfigError("no")

    monkeypatch.setattr(__main__, "pick_device", pick_device)
    monkeypatch.setattr(evaluate, "pick_device", pick_device)
    monkeypatch.setattr(sys, "argv", ["evaluate", "run"])
    for main in (lambda: __main__.main([]), evaluate.main):
        monkeypatch.setenv(processor.MAX_CONNECTIONS, given or "")
        if given is None:
            monkeypatch.delenv(processor.MAX_CONNECTIONS)
        with pytest.raises(SystemExit, match="no"):
            main()
    assert asked == [wanted, wanted]
