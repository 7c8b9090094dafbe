"""Work beside training: in order, to the end, and never a reason to stop."""

import threading

import pytest

from moe_dist.telemetry.thread import MOST_WAITING, Worker

PART = "the test"


def nothing() -> None: ...


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_tasks_run_in_order_and_all_of_them(warnings: list[str]) -> None:
    worker, done = Worker(warnings.append), []  # type: ignore[var-annotated]
    for number in range(100):
        worker.submit(PART, lambda number=number: done.append((number, threading.current_thread().name)))
    worker.flush()
    assert done == [(number, "telemetry") for number in range(100)]
    worker.submit(PART, lambda: done.append("last"))
    worker.close(True, nothing)
    assert done[-1] == "last"
    assert warnings == []


def test_a_part_that_fails_is_told_once_and_left_out(warnings: list[str]) -> None:
    worker, tried, done = Worker(warnings.append), [], []  # type: ignore[var-annotated]

    def write() -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    def task() -> None:
        done.append((worker.attempt("load records", write), worker.attempt("metrics.jsonl", lambda: "written")))

    for _ in range(3):
        worker.submit(PART, task)
    worker.close(True, nothing)
    assert done == [(None, "written")] * 3
    assert len(tried) == 1
    assert warnings == [
        "telemetry: load records failed, and training goes on without it: [Errno 28] No space left on device"
    ]


def test_a_task_that_fails_and_a_warning_that_fails_end_nothing() -> None:
    def warn(message: str) -> None:
        raise BrokenPipeError

    worker, done = Worker(warn), []  # type: ignore[var-annotated]
    worker.submit(PART, lambda: [][0])
    worker.submit(PART, lambda: done.append("the same part"))
    worker.submit("another", lambda: done.append("another"))
    worker.close(True, lambda: done.append("finished"))
    assert done == ["another", "finished"]


def test_with_many_tasks_waiting_the_next_waits_and_none_is_lost(warnings: list[str]) -> None:
    worker, open_gate, done = Worker(warnings.append), threading.Event(), []  # type: ignore[var-annotated]
    worker.submit(PART, lambda: done.append(open_gate.wait()))

    def submit_many() -> None:
        for number in range(3 * MOST_WAITING):
            worker.submit(PART, lambda number=number: done.append(number))

    training = threading.Thread(target=submit_many)
    training.start()
    assert done == []
    open_gate.set()
    training.join()
    worker.close(True, nothing)
    assert done == [True, *range(3 * MOST_WAITING)]


def test_a_failed_run_does_not_wait_for_a_task_that_never_ends(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_dist.telemetry.thread.SECONDS_TO_LEAVE", 0.01)
    for waiting in (0, MOST_WAITING):
        worker, never = Worker(warnings.append), threading.Event()
        worker.submit(PART, never.wait)
        for _ in range(waiting):
            worker.submit(PART, lambda: None)
        worker.close(False, nothing)  # returns
        never.set()


def test_without_a_task_there_is_no_thread(warnings: list[str]) -> None:
    worker, done = Worker(warnings.append), []  # type: ignore[var-annotated]
    worker.flush()
    worker.close(True, lambda: done.append(threading.current_thread()))
    assert done == [threading.current_thread()]
