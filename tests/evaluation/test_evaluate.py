"""``evaluate``: what it writes, what it does again and what not, and what it refuses before anything is scored."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("lm_eval")

from crossalign import cli
from crossalign.config import EvaluateConfig, TrackingConfig
from crossalign.core.errors import UserError
from crossalign.verbs.evaluate.job import evaluate
from crossalign.verbs.evaluate.model import Scorer

EVERY = ("arc_easy", "arc_challenge", "copa", "lambada_openai", "swag", "commonsense_qa", "wikitext", "hellaswag")
Make = Callable[..., EvaluateConfig]


@pytest.fixture
def make(evals: Path, tiny: Path, tmp_path: Path) -> Make:
    def build(*tasks: str, **changes: Any) -> EvaluateConfig:
        config = EvaluateConfig(model=str(tiny), tasks=tasks, data_dir=evals, output=tmp_path / "out", device="cpu")
        return replace(config, tracking=TrackingConfig(mlflow=False), **changes)

    return build


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of the model."""
    calls: list[int] = []
    call = Scorer._model_call

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Scorer, "_model_call", count)
    return calls


def test_every_task_is_scored_and_kept(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(make(",".join(EVERY)))
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    assert list(results["tasks"]) == list(EVERY)
    assert results["harness"].startswith("lm-eval ")
    seen = {(entry["bos"], entry["precision"], entry["max_length"]) for entry in results["tasks"].values()}
    assert seen == {(False, "fp32", 256)}
    for name, entry in results["tasks"].items():
        table = pq.read_table(tmp_path / f"out/samples/{name}.parquet")
        rows = table.to_pylist()
        assert entry["n"] == len(rows) == len({row["doc_id"] for row in rows})
        assert entry["metrics"].keys() == entry["stderr"].keys()
        assert all(error is not None and error >= 0 for error in entry["stderr"].values())
        assert table.column_names[0] == "doc_id"
        assert {str(table.schema.field(column).type) for column in table.column_names[1:]} == {"double"}
        for metric in ("acc", "acc_norm"):
            if metric in entry["metrics"]:
                assert entry["metrics"][metric] == pytest.approx(sum(row[metric] for row in rows) / len(rows))
        asked = pq.read_table(tmp_path / f"out/outputs/{name}.parquet").to_pylist()
        assert [row["doc_id"] for row in asked] == [row["doc_id"] for row in rows]
    labels = [entry["label"] for entry in results["tasks"].values()]
    assert labels[2] == "COPA dev 18"  # of 24, of which a quarter is mirrored
    assert labels[6] == "WikiText-2 test with <unk>" and labels[4] == "SWAG val"
    assert "acc_norm" in results["tasks"]["arc_easy"]["metrics"] and "acc_norm" not in results["tasks"]["copa"]["metrics"]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(EVERY) and told[0].startswith("ARC-Easy test (24 documents): acc 0.")


def test_bits_a_byte_come_from_the_kept_rows(make: Make, tmp_path: Path) -> None:
    import math

    results = evaluate(make("lambada_openai", "wikitext"))
    for name in ("lambada_openai", "wikitext"):
        rows = pq.read_table(tmp_path / f"out/samples/{name}.parquet").to_pylist()
        bits = -sum(row["loglikelihood"] for row in rows) / sum(row["bytes"] for row in rows) / math.log(2)
        assert results["tasks"][name]["metrics"]["bits_per_byte"] == pytest.approx(bits)
    words = sum(row["words"] for row in rows)
    perplexity = math.exp(-sum(row["loglikelihood"] for row in rows) / words)
    assert results["tasks"]["wikitext"]["metrics"]["word_perplexity"] == pytest.approx(perplexity)


def test_a_second_call_scores_only_what_is_new_or_changed(make: Make, evals: Path, tmp_path: Path, scored: list[int]) -> None:
    data = Path(shutil.copytree(evals, tmp_path / "data"))
    first = evaluate(make("arc_easy", data_dir=data))
    calls = len(scored)
    both = evaluate(make("arc_easy", "copa", data_dir=data))
    assert calls < len(scored)
    assert both["tasks"]["arc_easy"] == first["tasks"]["arc_easy"]
    calls = len(scored)
    assert evaluate(make("copa", "arc_easy", data_dir=data))["tasks"] == both["tasks"]
    assert evaluate(make("copa", data_dir=data, batch_size=2))["tasks"] == both["tasks"]  # which changes no score
    assert len(scored) == calls
    whole = (tmp_path / "out/results.json").read_text()
    for change in ({"few_shot": 1}, {"limit": 5}, {"max_length": 200}, {"bos": "yes"}, {"precision": "bf16"}):
        evaluate(make("arc_easy", data_dir=data, **change))
        assert len(scored) > calls, change
        calls = len(scored)
        (tmp_path / "out/results.json").write_text(whole)
    other = evaluate(make("arc_easy", data_dir=data, max_length=200))["tasks"]  # each task keeps what it was scored with
    assert (other["arc_easy"]["max_length"], other["copa"]["max_length"]) == (200, 256)
    calls = len(scored)
    (tmp_path / "out/outputs/copa.parquet").unlink()
    (tmp_path / "out/samples/arc_easy.parquet").write_bytes(b"PAR1")
    evaluate(make("arc_easy", "copa", data_dir=data))
    assert len(scored) > calls + 1 and (tmp_path / "out/outputs/copa.parquet").is_file()
    file = data / "arc_easy_test.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0].replace("?", "??"), *lines[1:]]))
    calls = len(scored)
    again = evaluate(make("arc_easy", data_dir=data))
    assert len(scored) > calls and "copa" in again["tasks"]
    assert again["tasks"]["arc_easy"]["data_fingerprint"] != first["tasks"]["arc_easy"]["data_fingerprint"]


def test_other_weights_keep_nothing(make: Make, tiny: Path, tmp_path: Path) -> None:
    evaluate(make("arc_easy", "copa"))
    other = evaluate(make("copa", model=f"random:{tiny}"))
    assert list(other["tasks"]) == ["copa"]


def test_a_stopped_call_goes_on_at_the_task_it_was_in(make: Make, monkeypatch: pytest.MonkeyPatch, scored: list[int]) -> None:
    import crossalign.verbs.evaluate.harness

    whole = crossalign.verbs.evaluate.harness.score_task

    def stop(task: Any, scorer: Any) -> Any:
        if task.name == "copa":
            raise KeyboardInterrupt
        return whole(task, scorer)

    monkeypatch.setattr(crossalign.verbs.evaluate.harness, "score_task", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(make("arc_easy", "copa"))
    monkeypatch.setattr(crossalign.verbs.evaluate.harness, "score_task", whole)
    calls = len(scored)
    alone = evaluate(make("arc_easy"))
    assert len(scored) == calls and list(alone["tasks"]) == ["arc_easy"]
    assert list(evaluate(make("arc_easy", "copa"))["tasks"]) == ["arc_easy", "copa"]


def test_examples_are_shown(make: Make, tmp_path: Path) -> None:
    results = evaluate(make("arc_easy", few_shot=2))
    assert results["tasks"]["arc_easy"]["few_shot"] == 2
    asked = pq.read_table(tmp_path / "out/outputs/arc_easy.parquet").to_pylist()
    assert all(row["prompt"].count("Question:") == 3 for row in asked)


def test_a_task_file_of_the_user_s_own(make: Make, tmp_path: Path) -> None:
    (tmp_path / "capitals_test.jsonl").write_text('{"q": "the cat", "a": " sat"}\n{"q": "a dog", "a": " ran"}\n')
    task = tmp_path / "capitals.yaml"
    text = (
        "task: capitals\noutput_type: loglikelihood\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    task.write_text(f"{text}dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/capitals_test.jsonl}}}}\n")
    found = evaluate(make(str(task), output=tmp_path / "one"))
    assert found["tasks"]["capitals"]["n"] == 2
    task.write_text(f"{text}dataset_path: some/set\n")  # of the hub, which --data-dir stands in for
    local = evaluate(make(str(task), data_dir=tmp_path, output=tmp_path / "two"))
    assert local["tasks"]["capitals"]["metrics"] == found["tasks"]["capitals"]["metrics"]


@pytest.mark.parametrize("method", ["fpt", "full"])
def test_what_a_classifier_s_language_model_forgot(method: Any, make: Make, tiny: Path, tmp_path: Path) -> None:
    from test_scored import classifier

    _, run = classifier(tiny, method, tmp_path / "run")
    (run / "config.yaml").write_text("{}")
    results = evaluate(make("wikitext", "arc_easy", model=str(run), output=None))
    before = json.loads((run / "evaluation/before/results.json").read_text())
    assert evaluate(make("wikitext", output=tmp_path / "alone"))["tasks"]["wikitext"]["metrics"] == pytest.approx(
        before["tasks"]["wikitext"]["metrics"]
    )
    told = results["forgetting"]["wikitext"]["bits_per_byte"]
    assert told["before"] == before["tasks"]["wikitext"]["metrics"]["bits_per_byte"]
    assert told["after"] == results["tasks"]["wikitext"]["metrics"]["bits_per_byte"] != told["before"]
    assert "forgetting" not in evaluate(make("wikitext", model=str(run), output=tmp_path / "after", before=False))


def test_a_run_s_results_lie_in_its_folder_and_on_its_mlflow_run(make: Make, tiny: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    from crossalign.training.tracking import RunLog

    run = tmp_path / "runs" / "one"
    shutil.copytree(tiny, run / "model")
    (run / "config.yaml").write_text("{}")
    with RunLog(run, TrackingConfig(), "training", {}) as log:
        log.log({"stage": "train", "step": 1, "loss": 2.0})
    results = evaluate(replace(make("copa", model=str(run), output=None), tracking=TrackingConfig()))
    assert (run / "evaluation/results.json").is_file() and (run / "metrics.jsonl").read_text().count("\n") == 1
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "crossalign"]
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.data.metrics["evaluation/copa/acc"] == results["tasks"]["copa"]["metrics"]["acc"]
    assert kept.info.status == "FINISHED" and "train/loss" in kept.data.metrics


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tasks", "arc_esy"], "unknown task 'arc_esy'; did you mean 'arc_easy'?"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "none.yaml"], "no task file at 'none.yaml'"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--tasks", "wikitext", "--few-shot", "2"], "wikitext is running text and takes no examples"),
        (["--tasks", "copa", "--few-shot", "24"], "--few-shot 24 is more than the 23 examples"),
        (["--tasks", "copa", "--max-length", "900"], "sees 256 tokens: lower --max-length 900"),
        (["--tasks", "arc_easy", "--max-length", "8"], "24 of 24 documents of arc_easy have more than the 8 tokens"),
        (["--tasks", "arc_easy,copa", "--data-dir", "."], "'.' has no data of arc_easy: arc_easy_test.jsonl is expected"),
        (["--data-dir", "/nowhere"], "--data-dir /nowhere is no folder"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_scored(
    args: list[str], says: str, evals: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, scored: list[int],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    data = [] if "--data-dir" in args else ["--data-dir", str(evals)]
    assert cli.main(["evaluate", str(tiny), *args, *data, "--device", "cpu"]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and said.startswith("crossalign: ") and len(said) < 400
    assert not scored


def test_results_of_something_else_are_left_alone(make: Make, tmp_path: Path, scored: list[int]) -> None:
    (tmp_path / "out").mkdir()
    for content in ('{"tas', '{"results": {}}', '{"tasks": {"copa": 3}}'):
        (tmp_path / "out/results.json").write_text(content)
        with pytest.raises(UserError, match=r"results.json' is damaged or not of crossalign evaluate: take it away"):
            evaluate(make("copa"))
        assert (tmp_path / "out/results.json").read_text() == content and not scored


def test_long_questions_are_cut_and_counted_where_that_is_asked_for(make: Make) -> None:
    entry = evaluate(make("arc_easy", max_length=30, too_long="cut"))["tasks"]["arc_easy"]
    assert 0 < entry["cut"] <= 24
    with pytest.raises(UserError, match="arc_easy have more than the 30 tokens") as told:
        evaluate(make("arc_easy", max_length=30))
    assert "--too-long cut" in str(told.value) and "--few-shot" not in str(told.value)  # there are no examples to leave out
    with pytest.raises(UserError, match=r"arc_easy, document 1: its answer alone takes \d+ tokens, and the model sees 2"):
        evaluate(make("arc_easy", max_length=2, too_long="cut"))


@pytest.mark.parametrize("name", ["../../escaped", "/abs/deep", "..", ".", "-x", "a b", ""])
def test_a_task_file_s_name_leads_nowhere(make: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / "own.yaml").write_text(f"task: '{name}'\noutput_type: loglikelihood\n")
    with pytest.raises(UserError, match=f"names its task '{name}': use letters, digits"):
        evaluate(make(str(tmp_path / "own.yaml"), data_dir=tmp_path))


def test_an_empty_text_is_told(make: Make, tmp_path: Path) -> None:
    (tmp_path / "own_test.jsonl").write_text('{"q": "the cat", "a": " sat"}\n{"q": "a dog", "a": ""}\n')
    (tmp_path / "own.yaml").write_text(
        'task: own\noutput_type: loglikelihood\ndataset_path: x/y\ntest_split: test\ndoc_to_text: "{{q}}"\n'
        'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )
    with pytest.raises(UserError, match="own, document 2: its text is empty, or its answer"):
        evaluate(make(str(tmp_path / "own.yaml"), data_dir=tmp_path))
    (tmp_path / "own_test.jsonl").write_text('{"q": " ", "a": "sat"}\n')
    with pytest.raises(UserError, match="own, document 1: its text is empty"):
        evaluate(make(str(tmp_path / "own.yaml"), data_dir=tmp_path, bos="no"))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"q": "a", "a": " b"}', '{"a": " c"}'], "line 2: field 'q' is missing"),
        (['{"a": " b"}', '{"q": "a", "a": " c"}'], "line 2: field 'q' is not in the lines before"),
        (['{"q": "a", "a": " b"}', '{"q": 3, "a": " c"}'], "line 2: field 'q' holds 3, which is of another kind"),
        (['{"q": null, "a": " b"}', '{"q": "a", "a": " c"}', '{"q": ["a"], "a": ""}'], "line 3: field 'q' holds"),
        (['{"q": ["a"], "a": " b"}', '{"q": [1], "a": " c"}'], "own_test.jsonl' do not go into one table"),
        (['{"q": {"a": "x"}, "a": " b"}'], "the prompts of own cannot be made (UndefinedError: 'dict object' has no"),
        (['{"q": {"b": {"c": "x"}}, "a": " b"}', '{"q": null, "a": ""}'], "the prompts of own cannot be made (UndefinedError"),
    ],
)
def test_lines_for_a_task_of_the_user_s_own_are_alike(make: Make, tmp_path: Path, lines: list[str], says: str) -> None:
    (tmp_path / "own_test.jsonl").write_text("\n".join(lines))
    (tmp_path / "own.yaml").write_text(
        'task: own\noutput_type: loglikelihood\ndataset_path: x/y\ntest_split: test\ndoc_to_text: "{{q.b.c}}{{q}}"\n'
        'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )
    with pytest.raises(UserError, match=re.escape(says)):
        evaluate(make(str(tmp_path / "own.yaml"), data_dir=tmp_path))


def test_a_change_in_what_a_prompt_s_function_calls_is_seen(make: Make, tmp_path: Path, scored: list[int]) -> None:
    (tmp_path / "own_test.jsonl").write_text('{"q": "the cat", "a": " sat"}\n')
    (tmp_path / "own.yaml").write_text(
        "task: own\noutput_type: loglikelihood\ndataset_path: x/y\ntest_split: test\ndoc_to_text: !function own.text\n"
        'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )
    asked = []
    for head in ("Question: ", "Say: "):
        (tmp_path / "own.py").write_text(f"HEAD = {head!r}\n\n\ndef text(doc):\n    return HEAD + doc['q']\n")
        evaluate(make(str(tmp_path / "own.yaml"), data_dir=tmp_path))
        asked.append(pq.read_table(tmp_path / "out/outputs/own.parquet").to_pylist()[0]["prompt"])
    assert asked == ["Question: the cat", "Say: the cat"] and len(scored) == 2


def test_a_task_that_generates_needs_room_for_it(make: Make, tmp_path: Path) -> None:
    (tmp_path / "own_test.jsonl").write_text('{"q": "the cat", "a": "sat"}\n{"q": "a dog and a cat and a bird", "a": "ran"}\n')
    (tmp_path / "own.yaml").write_text(
        'task: own\noutput_type: generate_until\ndataset_path: x/y\ntest_split: test\ndoc_to_text: "{{q}}"\n'
        'doc_to_target: "{{a}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    task = str(tmp_path / "own.yaml")
    assert evaluate(make(task, data_dir=tmp_path))["tasks"]["own"]["n"] == 2
    with pytest.raises(UserError, match="1 of 2 documents of own have more than the 15 tokens"):
        evaluate(make(task, data_dir=tmp_path, max_length=15))
    with pytest.raises(UserError, match="its answer alone takes 7 tokens, and the model sees 6"):
        evaluate(make(task, data_dir=tmp_path, max_length=6, too_long="cut"))


def test_as_many_examples_as_there_are_may_be_shown(make: Make, tmp_path: Path) -> None:
    """Canonical examples are often just as many as are shown."""
    (tmp_path / "own_test.jsonl").write_text('{"q": "the cat", "a": " sat"}\n')
    (tmp_path / "own.yaml").write_text(
        'task: own\noutput_type: loglikelihood\ndataset_path: x/y\ntest_split: test\ndoc_to_text: "{{q}}"\n'
        'doc_to_target: "{{a}}"\nnum_fewshot: 2\n'
        "fewshot_config: {sampler: first_n, samples: [{q: a dog, a: ran}, {q: a bird, a: sang}]}\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    assert evaluate(make(str(tmp_path / "own.yaml"), data_dir=tmp_path))["tasks"]["own"]["few_shot"] == 2
    asked = pq.read_table(tmp_path / "out/outputs/own.parquet").to_pylist()[0]["prompt"]
    assert asked.split("\n\n")[-1] == "the cat" and "a dog ran" in asked and "a bird sang" in asked


def test_data_are_checked_before_the_model_is_opened(make: Make, tmp_path: Path) -> None:
    (tmp_path / "arc_easy_test.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1: field 'choices' is missing"):
        evaluate(make("arc_easy", data_dir=tmp_path, model="/nowhere"))


def test_nothing_reaches_for_a_hub_where_data_are_local(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    evaluate(make(*EVERY, limit=2))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(make: Make, evals: Path, tiny: Path, tmp_path: Path) -> None:
    alone = evaluate(make("arc_easy", "wikitext", few_shot=0, limit=23))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "crossalign.cli",
        "evaluate", str(tiny), "--tasks", "arc_easy,wikitext", "--data-dir", str(evals), "--limit", "23", "--device", "cpu",
        "--output", str(tmp_path / "two"), "--tracking.no-mlflow",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    both = json.loads((tmp_path / "two/results.json").read_text())
    for name, entry in alone["tasks"].items():
        assert both["tasks"][name]["metrics"] == pytest.approx(entry["metrics"], rel=1e-5)
        assert both["tasks"][name]["stderr"] == pytest.approx(entry["stderr"], rel=1e-4)
        assert both["tasks"][name]["processes"] == 2 and both["tasks"][name]["key"] == entry["key"]
        assert (
            pq.read_table(tmp_path / f"two/samples/{name}.parquet")
            .column("doc_id")
            .equals(pq.read_table(tmp_path / f"out/samples/{name}.parquet").column("doc_id"))
        )
    assert done.stdout.count("ARC-Easy") == 1


def test_documents_that_are_too_long_are_left_out_and_counted(make: Make, evals: Path) -> None:
    whole = evaluate(make("arc_easy"))["tasks"]["arc_easy"]
    file = evals / "arc_easy_test.jsonl"
    before = file.read_text()
    long = json.loads(before.splitlines()[0])
    long["choices"][0] = " ".join(["cat"] * 400)  # one answer alone is more than the model sees
    lines = before.splitlines()
    file.write_text("\n".join([*lines[:3], json.dumps(long), *lines[3:]]) + "\n")
    try:
        with pytest.raises(UserError, match="--too-long skip"):
            evaluate(make("arc_easy", too_long="cut"))
        found = evaluate(make("arc_easy", too_long="skip"))["tasks"]["arc_easy"]
    finally:
        file.write_text(before)
    assert (found["n"], found["skipped"], found["cut"]) == (whole["n"], 1, 0)
    assert found["metrics"] == whole["metrics"]


def test_a_task_of_the_harness_is_found_by_name_and_a_group_by_its_tasks(make: Make, tmp_path: Path) -> None:
    rows = [{"goal": f"sit on mat {i}", "sol1": "a cat", "sol2": "the dog ran", "label": i % 2} for i in range(6)]
    (tmp_path / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(make("piqa", data_dir=tmp_path))["tasks"]
    assert found["piqa"]["n"] == 6 and set(found["piqa"]["metrics"]) == {"acc", "acc_norm"}
    from crossalign.verbs.evaluate.harness import task_files

    assert [Path(file).name for file in task_files("piqa")] == ["piqa.yaml"] and task_files("copa") == ["copa"]
    assert len(task_files("blimp")) == 67 and len(set(task_files("mmlu"))) == 57
    assert {Path(file).name for file in task_files("ai2_arc")} == {"arc_easy.yaml", "arc_challenge.yaml"}
