"""Ctrl-C and SIGTERM become a request to stop."""

import signal
from collections.abc import Iterator

import pytest

from moe_dist.training.signals import StopRequest


@pytest.fixture(autouse=True)
def outer_signals() -> Iterator[list[int]]:
    """Handlers outside of StopRequest that note what reaches them."""
    seen: list[int] = []
    before = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_inside_the_block_only(number: int, outer_signals: list[int]) -> None:
    with StopRequest() as stop:
        assert stop.number == 0
        signal.raise_signal(number)
        assert stop.number == number
    assert outer_signals == []
    signal.raise_signal(number)
    assert outer_signals == [number]


def test_without_a_signal_nothing_is_set() -> None:
    with StopRequest() as stop:
        pass
    assert stop.number == 0


def test_a_second_sigterm_changes_nothing(outer_signals: list[int]) -> None:
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert outer_signals == []


def test_a_second_ctrl_c_ends_the_run_at_once(outer_signals: list[int]) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    signal.raise_signal(signal.SIGINT)
    assert outer_signals == [signal.SIGINT]  # the handlers are back in place


def test_handlers_are_put_back_after_an_error(outer_signals: list[int]) -> None:
    with pytest.raises(RuntimeError, match="a step failed"), StopRequest():
        raise RuntimeError("a step failed")
    signal.raise_signal(signal.SIGTERM)
    assert outer_signals == [signal.SIGTERM]
