"""What of the captured loop can be tried without a GPU; the rest is tests/gpu/test_captured_loop.py."""

from contextlib import contextmanager

import pytest

from speedyzero.graph import first_error


@contextmanager
def failing_to_end():
    """Like a capture: once its body has failed, ending it fails too."""
    try:
        yield
    finally:
        raise RuntimeError("capturing stream has unjoined work")


def test_the_error_that_ended_a_capture_is_not_hidden_by_that_of_ending_it():
    cause = MemoryError("out of memory")
    with pytest.raises(RuntimeError, match="unjoined") as raised, failing_to_end():
        raise cause
    assert first_error(raised.value) is cause


def test_an_error_alone_is_the_first():
    error = ValueError("x")
    assert first_error(error) is error
