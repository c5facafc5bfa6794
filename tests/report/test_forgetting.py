"""The table of what a classifier's language model forgot."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossalign.report.blocks import Table
from crossalign.report.tables import forgetting_table
from crossalign.results.frame import Results
from crossalign.runs.records import open_study

SIZE = np.random.default_rng(0).integers(50, 900, 40).astype(float)


def write(folder: Path, bits: np.ndarray) -> float:
    """An evaluation on 40 texts, of so many bits each; its bits a byte."""
    rate = float(bits.sum() / SIZE.sum())
    (folder / "samples").mkdir(parents=True)
    table = {"doc_id": [f"{i}" for i in range(40)], "loglikelihood": -bits * math.log(2), "bytes": SIZE}
    pq.write_table(pa.table(table), folder / "samples" / "wikitext.parquet")
    told = {"tasks": {"wikitext": {"label": "WikiText-2", "n": 40, "metrics": {"bits_per_byte": rate}, "stderr": {}}}}
    (folder / "results.json").write_text(json.dumps(told))
    return rate


def evaluated(run: Path, more: float, seed: int) -> np.ndarray:
    """The bits that each text takes more than before."""
    draw = np.random.default_rng(seed)
    before = SIZE * draw.normal(2.0, 0.3, 40)
    change = SIZE * draw.normal(more, 0.05, 40)
    rates = write(run / "evaluation" / "before", before), write(run / "evaluation", before + change)
    path = run / "evaluation" / "results.json"
    forgot = {"wikitext": {"bits_per_byte": {"before": rates[0], "after": rates[1]}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "forgetting": forgot}))
    return change


def tables(*runs: Path) -> list[Table]:
    return list(filter(None, [forgetting_table(Results(open_study(list(runs))))]))


def test_one_seed_has_the_error_over_documents_and_several_that_over_seeds(
    tmp_path: Path, new_run: Callable[..., Path]
) -> None:
    runs = [new_run(tmp_path / f"seed-{seed}", row="LoRA", method="lora", align="none", seed=seed) for seed in range(3)]
    changes = [evaluated(run, 0.2 + 0.05 * seed, seed) for seed, run in enumerate(runs)]
    (one,) = tables(runs[0])
    mean = changes[0].sum() / SIZE.sum()
    error = np.sqrt(np.sum((changes[0] - mean * SIZE) ** 2) * 40 / 39) / SIZE.sum()
    assert one.rows[0][1] == "WikiText-2 (bits a byte)" and one.rows[0][4:] == [f"{mean:+.3f} ± {error:.3f}†", "1"]
    assert "says nothing of other seeds" in one.notes[-1]
    (several,) = tables(*runs)
    means = [change.sum() / SIZE.sum() for change in changes]
    assert several.rows[0][4:] == [f"{np.mean(means):+.3f} ± {np.std(means, ddof=1) / math.sqrt(3):.3f}", "3"]
    assert len(several.notes) == 1


def test_runs_that_were_not_scored_before_make_no_table(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    run = new_run(tmp_path / "seed-0", row="FPT", method="fpt", align="none", seed=0)
    assert tables(run) == []
    evaluated(run, 0.1, 0)
    shutil.rmtree(run / "evaluation" / "before")
    (table,) = tables(run)
    assert table.rows[0][4].endswith("(no ±)")


@pytest.mark.parametrize("damaged", ['{"tas', '{"tasks": {}, "forgetting": 3}'])
def test_a_damaged_evaluation_is_one_sentence(tmp_path: Path, new_run: Callable[..., Path], damaged: str) -> None:
    from crossalign.core.errors import UserError

    run = new_run(tmp_path / "seed-0", row="FPT", method="fpt", align="none", seed=0)
    evaluated(run, 0.1, 0)
    (run / "evaluation" / "results.json").write_text(damaged)
    with pytest.raises(UserError, match=r"results.json is damaged or has no tasks"):
        tables(run)
