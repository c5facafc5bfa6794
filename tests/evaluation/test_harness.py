"""Our task files and batches give what lm-evaluation-harness gives: the same requests and the same numbers."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval
import torch
from datasets import Dataset
from lm_eval.api.metrics import perplexity, weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from crossalign.data.text.evals import local_rows
from crossalign.verbs.evaluate import TASKS, harness
from crossalign.verbs.evaluate.harness import EvalTask, open_task, quietly, score_task
from crossalign.verbs.evaluate.model import Scored, Scorer, batch_ends, open_scored

SHIPPED = {
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "copa": "super_glue/copa/default",
    "lambada_openai": "lambada/lambada_openai",
    "swag": "swag/swag",
    "commonsense_qa": "commonsense_qa/default",
    "wikitext": "wikitext/wikitext",
    "hellaswag": "hellaswag/hellaswag",
}
each_task = pytest.mark.parametrize("name", SHIPPED)
NO_EXAMPLES = ("lambada_openai", "wikitext")
"""The first has no training split; running text takes none."""


def shipped(name: str, data: Path) -> ConfigurableTask:
    """The harness's own task over our rows."""
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{SHIPPED[name]}.yaml")
    found = {split: local_rows(name, split, data) for split in ("train", "validation", "test")}
    some = next(part for part in found.values() if part)
    rows = {split: Dataset.from_list((part or some).rows) for split, part in found.items()}
    for key in ("tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    with quietly(name):
        return ConfigurableTask(config={**config, "custom_dataset": lambda **_: rows})


def requests(task: Any) -> list[Any]:
    return [(request.request_type, request.args, request.doc_id, request.idx) for request in task._instances]


def test_every_task_file_is_compared() -> None:
    assert set(TASKS) == set(SHIPPED)


def check_requests_equal(name: str, data: Path, shots: int, limit: int = 20) -> None:
    ours = open_task(name, data, few_shot=shots, limit=limit, seed=7)
    ours.build()
    theirs = shipped(name, data)
    theirs.set_config("num_fewshot", shots)
    theirs.set_fewshot_seed(7)
    with quietly(name):
        theirs.build_all_requests(limit=limit)
    assert requests(ours.task) == requests(theirs)
    documents = ours.documents()
    assert len(documents) == min(limit, len(ours.task.eval_docs))
    assert [ours.task.doc_to_target(doc) for doc in documents] == [theirs.doc_to_target(doc) for doc in documents]
    assert ours.task.aggregation() == theirs.aggregation()
    assert ours.task.higher_is_better() == theirs.higher_is_better()


@pytest.mark.parametrize(
    ("name", "shots"), [(name, shots) for name in SHIPPED for shots in (0, 3) if not (shots and name in NO_EXAMPLES)]
)
def test_the_requests_are_those_of_the_shipped_templates(name: str, shots: int, evals: Path) -> None:
    check_requests_equal(name, evals, shots)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ("swag", "hellaswag")])
def test_the_requests_of_real_rows_are_those_of_the_shipped_templates(name: str, shared_data: Path) -> None:
    check_requests_equal(name, shared_data / "evals", 0)


def direct(
    opened: Scored,
    task: ConfigurableTask,
    name: str,
    max_length: int | None = None,
    bootstrap: int = 0,
    limit: int | None = None,
) -> Any:
    """The harness called as anybody would, with its own adapter."""
    bos = opened.bos and name != "wikitext"  # whose first token follows the prefix token, which is BOS already
    with quietly(name):
        model = HFLM(
            pretrained=opened.model, tokenizer=opened.tokenizer, add_bos_token=bos, batch_size=3, max_length=max_length
        )
        task.set_fewshot_seed(7)
        return lm_eval.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=bootstrap)["results"][name]


def ours(opened: Scored, task: EvalTask, max_length: int | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = score_task(task, Scorer(opened, max_length=max_length))
    assert found is not None
    return found


@each_task
@pytest.mark.parametrize("bos", ["yes", "no"])
def test_the_numbers_are_those_of_the_harness_called_directly(name: str, bos: Any, evals: Path, tiny: Path) -> None:
    opened = open_scored(str(tiny), bos)
    summary, rows = ours(opened, open_task(name, evals), max_length=48 if name == "wikitext" else None)
    told = direct(opened, shipped(name, evals), name, max_length=48 if name == "wikitext" else None)
    wanted = {key.partition(",")[0]: value for key, value in told.items() if key.endswith(",none") and "stderr" not in key}
    assert len(rows) == told["sample_len"]
    assert summary["metrics"].keys() - wanted.keys() <= {"bits_per_byte"}
    for metric, value in wanted.items():
        assert summary["metrics"][metric] == pytest.approx(value, rel=1e-6), metric


@pytest.mark.parametrize(("name", "limit"), [("arc_easy", 20), ("copa", 60), ("lambada_openai", 20), ("wikitext", 2)])
def test_the_numbers_of_a_real_model_are_those_of_the_harness(name: str, limit: int, shared_data: Path) -> None:
    opened = open_scored(str(shared_data / "models/stories260K"))
    summary, rows = ours(opened, open_task(name, shared_data / "evals", limit=limit))
    told = direct(opened, shipped(name, shared_data / "evals"), name, limit=limit)
    assert len(rows) == told["sample_len"] == limit
    for metric in summary["metrics"].keys() - ({"bits_per_byte"} if name == "lambada_openai" else set()):
        assert summary["metrics"][metric] == pytest.approx(told[f"{metric},none"], rel=1e-6), metric


def test_standard_errors_of_means_are_the_harness_s(evals: Path, tiny: Path) -> None:
    opened = open_scored(str(tiny))
    summary, _ = ours(opened, open_task("arc_easy", evals))
    told = direct(opened, shipped("arc_easy", evals), "arc_easy", bootstrap=10)
    assert summary["stderr"]["acc"] == pytest.approx(told["acc_stderr,none"])
    assert summary["stderr"]["acc_norm"] == pytest.approx(told["acc_norm_stderr,none"])


def test_the_standard_error_of_bits_a_byte_is_near_the_bootstrap_s() -> None:
    import random

    from crossalign.verbs.evaluate.harness import _ratio_stderr

    draw = random.Random(0)
    items = []
    for _ in range(60):
        size = draw.uniform(500, 3000)
        items.append((-size * draw.gauss(1, 0.1), size))

    def ratio(sample: list[tuple[float, float]]) -> float:
        return sum(x for x, _ in sample) / sum(w for _, w in sample)

    again = [ratio(draw.choices(items, k=len(items))) for _ in range(4000)]
    mean = sum(again) / len(again)
    spread = math.sqrt(sum((value - mean) ** 2 for value in again) / len(again))
    assert _ratio_stderr(items) == pytest.approx(spread, rel=0.08)


def test_the_standard_error_of_a_perplexity_is_near_the_bootstrap_s() -> None:
    import random

    draw = random.Random(0)
    items = [(-size * draw.gauss(0.2, 0.02), size) for size in (draw.uniform(500, 3000) for _ in range(60))]
    for aggregation, held in ((weighted_perplexity, items), (perplexity, [x / w for x, w in items])):
        again = [aggregation(draw.choices(held, k=len(held))) for _ in range(4000)]
        assert harness._stderr(aggregation, held, aggregation(held)) == pytest.approx(statistics.pstdev(again), rel=0.08)


def test_bf16_weights_keep_the_order_of_answers(evals: Path, tiny: Path) -> None:
    """Sums of log-likelihoods in bf16 would be rounded to an eighth, and answers would tie."""
    opened = open_scored(str(tiny))
    opened.model.bfloat16()
    _, rows = ours(opened, open_task("arc_easy", evals))
    found = torch.tensor([value for row in rows for value in row["loglikelihoods"]])
    assert (found != found.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("name", ["arc_easy", "wikitext"])
def test_numbers_do_not_depend_on_the_batch(name: str, evals: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_scored(str(tiny))
    found = []
    for tokens in (1, 200, 100_000):
        monkeypatch.setattr(Scorer, "tokens_per_batch", lambda self, tokens=tokens: tokens)
        _, rows = ours(opened, open_task(name, evals), max_length=64)
        found.append([value for row in rows for value in row["loglikelihoods"]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_batches_hold_every_request_once_and_no_more_tokens_than_fit() -> None:
    lengths = sorted([3, 50, 7, 7, 12, 30, 1, 1, 1, 90], reverse=True)
    ends = batch_ends(lengths, 60)
    assert sum(ends.values()) == len(lengths) and max(ends) == len(lengths) - 1
    for last, size in ends.items():
        assert size == 1 or size * lengths[last + 1 - size] <= 60
    assert batch_ends(lengths, 10_000) == {9: 10}


def test_bos_stands_before_a_question_once_and_before_a_text_once(evals: Path, tiny: Path) -> None:
    """The tokenizer has the token and no rule that adds it, so asking the harness alone would change nothing."""
    opened = open_scored(str(tiny), "yes")
    scorer = Scorer(opened)
    bos = opened.tokenizer.bos_token_id
    seen: list[list[int]] = []

    def look(requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        seen.extend([*before, *after] for _, before, after in requests)
        return [(0.0, False)] * len(requests)

    scorer._loglikelihood_tokens = look  # type: ignore[method-assign]
    for name in ("arc_easy", "wikitext"):
        opened_task = open_task(name, evals)
        scorer_requests = opened_task.build()
        (scorer.loglikelihood if name == "arc_easy" else scorer.loglikelihood_rolling)(scorer_requests)
    assert all(tokens[0] == bos and tokens.count(bos) == 1 for tokens in seen)
    plain = open_scored(str(tiny), "no")
    assert plain.tokenizer.encode("a cat")[0] != bos


def test_examples_do_not_depend_on_the_number_of_processes(evals: Path) -> None:
    task = open_task("arc_easy", evals, few_shot=2)
    whole = requests_of(task.build())
    parts = [requests_of(task.build(rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(whole) == sorted(parts[0] + parts[1] + parts[2])
    assert requests_of(task.build()) == whole


def requests_of(found: list[Any]) -> list[tuple[int, int, str, str]]:
    return [(request.doc_id, request.idx, *request.args) for request in found]


def test_without_a_training_split_examples_are_other_documents(evals: Path) -> None:
    task = open_task("lambada_openai", evals, few_shot=2)
    for request in task.build():
        shown, question = request.args[0].split("\n\n")[:-1], request.args[0].split("\n\n")[-1]
        assert len(shown) == 2
        assert question + request.args[1] not in shown
