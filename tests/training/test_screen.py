"""What rank 0 shows."""

import pytest
import torch
from rich.console import Console

from moe_dist.placement import ExpertMap
from moe_dist.training.screen import Screen, Silence, load_table

RECORD = {"step": 5, "loss": 4.25, "tokens_per_second": 12345.6, "balance": {"mean": {"max_vio_batch": 0.375}}}
EVALUATION = {"step": 5, "val_loss": 3.5, "val_bits_per_byte": 5.05, "max_vio_global": 0.5}


def show(capsys: pytest.CaptureFixture[str], *records: dict, first_step: int = 0) -> list[str]:
    with Screen(num_steps=20, first_step=first_step) as screen:
        for record in records:
            screen.advance(record["step"])
            screen.show(record)
    return capsys.readouterr().out.splitlines()


def test_without_a_terminal_every_record_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(capsys, RECORD, EVALUATION, RECORD | {"step": 10}, RECORD | {"step": 20})
    assert len(lines) == 4
    assert lines[0].startswith("step 5/20  loss 4.2500  12,346 tokens/s  MaxVio 0.38  0:00 left")
    assert lines[1] == "step 5  held-out loss 3.5000  5.050 bits per byte  MaxVio_global 0.50"
    assert lines[2].startswith("step 10/20")
    assert lines[3].endswith("0:00 left")


def test_time_left_follows_from_the_steps_of_this_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("moe_dist.training.screen.time.monotonic", lambda: next(clock, 130.0))
    (line,) = show(capsys, RECORD | {"step": 14}, first_step=12)  # 2 steps in 30 s, 6 are left
    assert line.endswith("1:30 left")


ALARM = {
    "step": 5,
    "alarm": "dead_experts",
    "state": "raised",
    "message": "expert 3 had no token",
    "remedy": "raise it",
}


def test_an_alarm_is_a_box_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(num_steps=20, first_step=0)
    screen.alarm(ALARM)
    top, *lines, _ = capsys.readouterr().out.splitlines()
    assert "step 5: dead_experts raised" in top
    assert ["expert 3 had no token" in lines[0], "raise it" in lines[1], len(lines)] == [True, True, 2]
    screen.alarm(ALARM | {"state": "cleared"})
    assert "raise it" not in capsys.readouterr().out


def test_other_ranks_show_warnings_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.training.screen.dist.get_rank", lambda: 3)
    with Silence() as screen:
        screen.advance(5)
        screen.show(RECORD)
        screen.alarm(ALARM)
        screen.warn("telemetry: planted")
    assert capsys.readouterr() == ("", "moe-dist: rank 3: telemetry: planted\n")


def test_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(num_steps=20, first_step=0) as screen:
        screen.warn("step 3 skipped")
    assert capsys.readouterr().out == "step 3 skipped\n"


def test_on_a_terminal_the_bar_shows_the_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "150")
    text = "\n".join(show(capsys, RECORD, EVALUATION))
    assert "loss 4.2500  12,346 tokens/s  MaxVio 0.38" in text
    assert "5/20" in text
    assert "held-out loss 3.5000" in text


def table_text(load_NE: torch.Tensor, expert_map: ExpertMap) -> str:
    console = Console(width=200, record=True)
    with console.capture() as capture:
        console.print(load_table(load_NE, list(range(1, len(load_NE) + 1)), expert_map))
    return capture.get()


def test_the_table_has_every_expert_and_rank_as_multiples_of_the_mean() -> None:
    load_NE = torch.tensor([[10, 20, 30, 40, 10, 10], [20, 20, 20, 20, 20, 20]])  # means 20 and 20
    text = table_text(load_NE, ExpertMap.from_owners([2, 0, 1, 0, 2, 1]))
    assert "rank" in text
    for number in range(3):
        assert str(number) in text
    for value in ("0.50", "1.00", "1.50", "2.00"):  # of experts
        assert value in text
    for value in ("1.50", "1.00", "0.50"):  # of ranks: experts 1 and 3, 2 and 5, 0 and 4
        assert value in text
    assert "MaxVio" in text


def test_the_table_of_many_experts_and_of_no_load_is_short() -> None:
    expert_map = ExpertMap.contiguous(256, 4)
    assert len(table_text(torch.ones(1, 256, dtype=torch.int64), expert_map).splitlines()) < 20
    assert "nan" not in table_text(torch.zeros(2, 256, dtype=torch.int64), expert_map)
    assert "nan" not in table_text(torch.zeros(2, 8, dtype=torch.int64), ExpertMap.contiguous(8, 2))
