"""How much of a search is still to come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution

from crossalign.core import progress
from crossalign.runs.promotion import Job
from crossalign.studies.search.follow import Board, forecast
from crossalign.studies.search.journal import Journal


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("trials", [16, 64])
def test_the_forecast_is_right_on_average_and_exact_at_the_end(bench: Any, trials: int, factor: int) -> None:
    draw, steps = np.random.default_rng(0), np.diff([0, *(factor**rung for rung in range(4))])

    def told(search: Any) -> list[int]:
        return forecast([len(rung) for rung in search.scores], [len(rung) for rung in search.begun], trials, factor)

    early, half = list[float](), list[float]()
    for _ in range(30):
        search, guesses = bench.Asha(trials, 4, factor), []
        while job := search.next(True):
            if job in (Job(0, 0), Job(trials // 2, 0)):
                guesses.append(np.dot(told(search), steps))
            search.done(job, float(draw.random()))
        assert told(search) == [len(rung) for rung in search.begun]
        early.append(guesses[0] / np.dot(told(search), steps))
        half.append(guesses[1] / np.dot(told(search), steps))
    assert abs(np.mean(early) - 1) < 0.1 and abs(np.mean(half) - 1) < 0.1
    assert np.abs(np.array(half) - 1).max() < 0.35


def drawn(number: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"optim.lr": float(number)}, {"optim.lr": FloatDistribution(0, 10)}


def test_the_bar_of_a_search_that_is_over_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    journal = Journal(tmp_path / "journal.log", "search", True, [2, 4], 2)
    with Board(journal, 5, lambda trial: tmp_path / f"{trial}") as board:
        board.show(set())
        assert board._bar.n == 0 and board._bar.total == 10 + 2 * 3
        done = 0
        while job := journal.next_job(5, set(), drawn):
            journal.begin(job)
            if job.trial == 1:
                journal.fail(job, "out of memory", [0.1])
            else:
                journal.end(job, 0.1 * job.trial, [0.1] * journal.ends[job.rung], 1.0)
            board.show(set())
            assert done <= board._bar.n <= board._bar.total
            done = board._bar.n
        assert board._bar.n == board._bar.total == journal.epochs() == 2 * 4 + 1 + 2 * len(journal.scores_and_begun()[1][1])
    assert "best 0.4 of trial 4" in capsys.readouterr().err


def test_epochs_of_a_job_that_has_ended_count_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.log", "search", True, [2, 4], 2)
    with Board(journal, 2, lambda trial: tmp_path / f"{trial}") as board:
        for trial in (0, 1):
            job = journal.next_job(2, set(), drawn)
            assert job == Job(trial, 0)
            journal.begin(job)
            (tmp_path / f"{trial}").mkdir()
            row = '{"stage": "train", "split": "validation", "epoch": %d, "accuracy": 0.5}\n'
            (tmp_path / f"{trial}" / "metrics.jsonl").write_text(row % 1 + row % 2)
            board._looked = 0.0
            board.show({trial})
            assert board._bar.n == 2 * (trial + 1)
            journal.end(job, 0.5, [0.5, 0.5], 1.0)
            board.show({trial})  # before it looks again
            assert board._bar.n == 2 * (trial + 1)
