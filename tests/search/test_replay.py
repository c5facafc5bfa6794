"""The replay of recorded curves, on curves whose answer is known by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossalign.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CURVES = [  # of four epochs; the rungs are 2 and 4
    [0.1, 0.2, 0.2, 0.30],
    [0.1, 0.4, 0.3, 0.35],
    [0.1, 0.1, 0.1, 0.90],  # learns late: all in full alone finds it
    [0.3, 0.5, 0.6, 0.55],
]


def record(folder: Path, curves: list[list[float]], larger: bool = True, **changed: Any) -> Path:
    trials = [
        {"number": number, "state": "complete", "curve": curve, "rungs": [{"epochs": 4, "score": curve[-1], "seconds": 8.0}]}
        for number, curve in enumerate(curves)
    ]
    for number, change in changed.pop("trials", {}).items():
        trials[number] |= change
    file = folder / "search.json"
    file.write_text(json.dumps({"rungs": [4], "unit": "epoch", "larger_is_better": larger, "trials": trials} | changed))
    return file


def test_the_known_answer_with_one_worker(bench: Any, tmp_path: Path) -> None:
    """0 and 1 to epoch 2; 1, the better, on to 4; 2 to 2; 3 to 2, on to 4: 2 · 4 + 2 · 2 epochs. Random search: 0, 1, 2."""
    found = bench.replay(bench.read_curves(record(tmp_path, CURVES)), [2, 4], workers=1)
    assert (found.asha, found.asha_epochs) == (0.6, 12)  # the best of its curve, which is not its end
    assert (found.random, found.random_epochs) == (0.9, 12)
    assert (found.full, found.full_epochs) == (0.9, 16)
    assert found.time == 12


def test_two_workers_share_the_time_and_seconds_are_those_recorded(bench: Any, tmp_path: Path) -> None:
    """At 2, 0 and 1 are done: 2 begins and 1 goes on; at 4, 3 begins; at 6 it is of the best two of four: on to 8."""
    curves = bench.read_curves(record(tmp_path, CURVES))
    assert bench.replay(curves, [2, 4], workers=2).time == 8
    assert bench.replay(curves, [2, 4], workers=2, clock="seconds").time == 16


def test_random_search_has_the_same_epochs_rounded_up_to_whole_trainings(bench: Any, tmp_path: Path) -> None:
    curves = bench.read_curves(record(tmp_path, CURVES))
    order = np.array([3, 0, 1, 2])
    found = bench.replay(curves.of(order), [2, 4], workers=1)
    assert found.asha_epochs == 8 + 2 + 2  # 3 at the first comparison, then 1 of four
    assert (found.random, found.random_epochs) == (0.6, 12)
    found = bench.replay(curves.of(order[:3]), [2, 4], workers=1)
    assert (found.asha_epochs, found.random_epochs, found.full) == (8, 8, 0.6)
    found = bench.replay(curves.of(order[:1]), [2, 4], workers=1)  # the end game
    assert (found.asha, found.asha_epochs, found.random_epochs) == (0.6, 4, 4)


def test_a_budget_begins_nothing_new_but_sees_one_to_the_end(bench: Any, tmp_path: Path) -> None:
    curves = bench.read_curves(record(tmp_path, CURVES))
    found = bench.replay(curves, [2, 4], workers=1, budget=6)
    assert (found.asha, found.asha_epochs) == (0.4, 6)
    found = bench.replay(curves, [2, 4], workers=1, budget=4)  # 0 and 1 to epoch 2, then the better to the end
    assert (found.asha, found.asha_epochs) == (0.4, 6)


def test_a_failed_trial_costs_what_it_trained_and_is_never_chosen(bench: Any, tmp_path: Path) -> None:
    failed = {3: {"state": "failed", "curve": [0.3, 0.5, 0.99], "rungs": []}}
    curves = bench.read_curves(record(tmp_path, CURVES, trials=failed))
    assert curves.best[3].tolist() == [0.3, 0.5, 0.99, -np.inf]
    assert curves.seconds.tolist() == [2, 2, 2, 2]  # of those that were timed
    found = bench.replay(curves, [2, 4], workers=1)
    assert (found.asha, found.asha_epochs) == (0.4, 11)


def test_a_trial_that_failed_after_its_last_epoch_is_never_chosen(bench: Any, tmp_path: Path) -> None:
    failed = {2: {"state": "failed", "rungs": []}}
    curves = bench.read_curves(record(tmp_path, CURVES, trials=failed))
    assert curves.best[2].tolist() == [0.1, 0.1, 0.1, -np.inf]


def test_a_loss_is_that_of_the_last_weights_and_nan_is_never_best(bench: Any, tmp_path: Path) -> None:
    curves = bench.read_curves(record(tmp_path, [[3, 2, 1, 2], [3, 1, float("nan"), 4]], larger=False))
    assert curves.best.tolist() == [[-3, -2, -1, -2], [-3, -1, -np.inf, -4]]
    lines = bench.table([bench.replay(curves, [2, 4])], curves.points, 0.5)
    assert lines[2] == "| ASHA | 4.00 | 6 | 75.0% | 2.00 | 0% |"


def test_curves_that_are_not_of_a_search_in_full_are_refused(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trial 1 has 2 of 4 epochs; .*--rungs 1"):
        bench.read_curves(record(tmp_path, CURVES, trials={1: {"state": "paused", "curve": [0.1, 0.2]}}))
    with pytest.raises(UserError, match="none of its 1 trials"):
        bench.read_curves(record(tmp_path, [[0.1]], trials={0: {"state": "failed"}}))


def test_the_table_means_over_orders(bench: Any) -> None:
    runs = [bench.Replay(0.60, 10, 0.55, 12, 0.60, 32, 5.0), bench.Replay(0.58, 12, 0.59, 12, 0.60, 32, 5.0)]
    assert bench.table(runs, 100.0, within=0.5)[2:] == [
        "| ASHA | 59.00 ± 1.00 | 11 ± 1 | 34.4% | 1.00 ± 1.00 | 50% |",
        "| random search | 57.00 ± 2.00 | 12 | 37.5% | 3.00 ± 2.00 | 0% |",
        "| all in full | 60.00 | 32 | 100.0% | 0.00 | 100% |",
        "",
        "ASHA − random search, larger is better for ASHA, same order and epochs: 2.00 ± 3.00; "
        "better in 50%, equal in 0% of 2 orders.",
    ]


def test_the_jackknife_gives_the_error_of_a_mean(bench: Any) -> None:
    """Where the difference is the mean of what was drawn, its standard error is known; the orders add noise of their own."""
    draw = np.random.default_rng(0)
    values, noise = draw.normal(size=(64, 1)), np.random.default_rng(1)
    curves = bench.Curves(values, np.ones(64, int), np.ones(64))

    def once(drawn: Any) -> Any:
        return bench.Replay(float(drawn.best.mean() + 0.2 * noise.normal()), 1, 0.0, 1, 0.0, 1, 1.0)

    kept, found = bench.difference_over_configurations(curves, once, 40, draw)
    assert kept == 48
    assert found.mean == pytest.approx(values.mean(), abs=0.05)
    assert found.error == pytest.approx(values.std(ddof=1) / 8, rel=0.35)


def test_an_error_that_the_orders_hide_is_not_zero(bench: Any) -> None:
    noise = np.random.default_rng(0)
    curves = bench.Curves(np.zeros((64, 1)), np.ones(64, int), np.ones(64))  # all configurations are alike

    def once(drawn: Any) -> Any:
        return bench.Replay(float(noise.normal()), 1, 0.0, 1, 0.0, 1, 1.0)

    errors = [bench.difference_over_configurations(curves, once, 2, np.random.default_rng(seed))[1].error for seed in range(8)]
    assert None in errors and 0.0 not in errors


def test_the_command_writes_its_table(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    curves = np.maximum.accumulate(draw.random((12, 8)), axis=1).tolist()
    file = record(tmp_path, curves, rungs=[8])
    command = [sys.executable, str(ROOT / "benchmarks" / "search.py"), "--curves", str(file), "--orders", "5", "--rungs", "3"]
    done = subprocess.run([*command, "--out", str(tmp_path / "table.md")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("12 of 12 configurations, rungs 2, 4, 8, factor 2, 2 workers, 5 orders;")
    assert "Searches of 9 of them: difference" in text
    done = subprocess.run([*command, "--rungs", "5"], capture_output=True, text=True)
    assert done.returncode == 1 and "8 epochs" in done.stderr and "Traceback" not in done.stderr
