"""The paper's findings beside ours: numbers of Table 1, signs, and verdicts that a difference has to earn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from crossalign.report.published import FINDINGS, TABLE1, published_tables
from crossalign.results.frame import Results
from crossalign.runs.records import open_study, read_run

Maker = Callable[..., Path]


def right(share: float, seed: int, images: int = 500) -> np.ndarray:
    """Exactly ``share`` of the images, give or take one or two by seed."""
    return np.arange(images) < round(share * images) + seed % 3 - 1  # type: ignore[no-any-return]


def verdicts(root: Path) -> dict[str, list[str]]:
    (table,) = published_tables(Results(open_study([root])))
    assert table.title == "The paper's findings, with stories260K"
    return {cells[0]: cells[1:] for cells in table.rows}


def test_differences_are_those_of_table_1() -> None:
    told = {finding.text: round(100 * finding.published, 2) for finding in FINDINGS}
    assert told["Full fine-tuning is better than FPT (§3.2.3)"] == 18.20
    assert told["MMD alignment helps LoRA (§3.2.4)"] == 2.44
    assert told["MSE alignment does nothing for FPT (§3.2.2)"] == -0.32
    assert {name for finding in FINDINGS for name in (finding.reference, finding.other)} == set(TABLE1)


def test_a_finding_holds_fails_or_stays_open(new_run: Maker, tmp_path: Path) -> None:
    shares = {"FPT": 0.4, "LoRA": 0.6, "Full fine-tuning": 0.5, "FPT + alignment (MSE)": 0.4, "FPT + alignment (MMD)": 0.3}
    methods = {"FPT": "fpt", "LoRA": "lora", "Full fine-tuning": "full"}
    for row, share in shares.items():
        name, _, metric = row.partition(" + alignment (")
        for seed in range(5):
            align = metric.strip(")").lower() or "none"
            noise = {"FPT": seed, "FPT + alignment (MSE)": 2 * seed}.get(row, 1)
            correct = right(share, noise)
            new_run(tmp_path / row / str(seed), row, method=methods[name], align=align, seed=seed, correct=correct)
    told = verdicts(tmp_path)
    assert told["LoRA is better than FPT (§3.2.4)"][-1] == "holds"
    assert told["Full fine-tuning is better than LoRA (§3.2.4)"][1:] == [
        "−10.00 ± 0.00",
        "–",
        "was not shown; the opposite direction",
    ]
    assert told["MMD alignment does nothing for FPT (§3.2.2)"][-1] == "is contradicted"
    assert told["MSE alignment does nothing for FPT (§3.2.2)"][-1].startswith("agrees: no difference shown (visible:")


def test_one_seed_tells_nothing(new_run: Maker, tmp_path: Path) -> None:
    for row, method in (("FPT", "fpt"), ("LoRA", "lora")):
        new_run(tmp_path / row, row, method=method, correct=right(0.5, 0))
    assert published_tables(Results(open_study([tmp_path]))) == []


def test_predictions_without_confidence_can_be_compared(new_run: Maker, tmp_path: Path) -> None:
    folder = new_run(tmp_path / "run")
    whole = read_run(folder).predictions
    pq.write_table(pq.read_table(folder / "predictions.parquet").drop(["confidence"]), folder / "predictions.parquet")
    run = read_run(folder)
    assert run.predictions is not None and whole is not None and not run.notes
    assert np.isnan(run.predictions.confidence).all() and np.array_equal(run.predictions.predicted, whole.predicted)
