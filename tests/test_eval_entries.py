import datetime

import pytest
from huggingface_hub import parse_eval_result_entries
from hypothesis import given
from hypothesis import strategies as st
from test_model_card import row

from hf_spp.cards.eval_entries import ENTRIES_NAME, Benchmark, eval_result_files
from hf_spp.cards.yaml_text import read_yaml, write_yaml
from hf_spp.errors import CardError

BENCHMARKS = {"cifar10": Benchmark("uoft-cs/cifar10", "test"), "gpqa": Benchmark("Idavidrein/gpqa", "gpqa_diamond")}
ROWS = [row("cifar10", "spp", 0.5), row("cifar10", "original", 0.25), row("gpqa", "spp", 0.125)]
# What others write: comments, flow style, keys that huggingface_hub does not know, a token, notes of their own.
THEIRS = [
    "# mine\n",
    "- dataset: {id: cais/hle, task_id: default}  # inline\n  value: 20.90\n",
    "- dataset:\n    id: uoft-cs/cifar10\n    task_id: test\n  value: 1\n  evaluation_framework: hle\n\n# next\n",
    "- dataset: {id: a/b, task_id: c}\n  value: 0.5\n  notes: 'hf_spp: accuracy'\n  verifyToken: x.y.z\n",
    "-\n  dataset: {id: a/b, task_id: d}\n  value: [1, 2]\n  notes: |\n    - of two\n    - lines\n",
    "- just text\n",
]


def written(rows=ROWS, before=None, **options):
    existing = {} if before is None else {ENTRIES_NAME: before, ".eval_results/theirs.yaml": "[ no yaml"}
    return eval_result_files(rows, existing, benchmarks=BENCHMARKS, **options)


def test_entries_are_what_the_client_reads():
    found = written(date=datetime.date(2025, 1, 2))
    first, second = parse_eval_result_entries(read_yaml(found.files[ENTRIES_NAME]))
    assert (first.dataset_id, first.task_id, first.value) == ("uoft-cs/cifar10", "test", 0.5)
    assert (first.date, first.notes) == ("2025-01-02", "hf_spp: accuracy, method spp")
    assert (second.dataset_id, second.task_id, second.value) == ("Idavidrein/gpqa", "gpqa_diamond", 0.125)
    assert first.verify_token is None
    assert list(found.files) == [ENTRIES_NAME]
    assert found.left_out == {"cifar10 (original)": "the checkpoint is of the method spp"}


def test_what_the_hub_cannot_file_is_left_out_with_the_reason():
    rows = [row("mine"), {"dataset": "gpqa", "method": "spp", "metrics": {"loss": 1.0}}]
    found = written(rows)
    assert found.files == {}
    assert found.left_out == {
        "mine": "no task of a benchmark on the Hub is given for it",
        "gpqa": "it was measured without accuracy",
    }


def test_other_metrics_and_revisions():
    benchmark = Benchmark("a/b", "c", metric="mrr", revision="5503434ddd753f426f4b38109466949a1217c2bb")
    rows = [{"dataset": "x", "method": "spp", "metrics": {"mrr": 0.75, "loss": 1.0}}]
    [entry] = parse_eval_result_entries(
        read_yaml(eval_result_files(rows, {}, benchmarks={"x": benchmark}).files[ENTRIES_NAME])
    )
    assert (entry.value, entry.dataset_revision) == (0.75, benchmark.revision)
    assert entry.notes == "hf_spp: mrr, method spp"


def test_several_seeds_become_their_mean():
    rows = [row("cifar10", "spp", accuracy, seed=seed) for seed, accuracy in enumerate((0.25, 0.75))]
    [entry] = read_yaml(written(rows).files[ENTRIES_NAME])
    assert (entry["value"], entry["notes"]) == (0.5, "hf_spp: accuracy, method spp, mean of 2 runs")


def test_another_method_may_be_the_checkpoint():
    [entry] = read_yaml(written(method="original").files[ENTRIES_NAME])
    assert entry["value"] == 0.25


def test_earlier_entries_are_replaced_and_those_of_others_stay_byte_for_byte():
    ours = written([row("cifar10", "spp", 0.9)]).files[ENTRIES_NAME]
    before = THEIRS[0] + THEIRS[1] + ours + "# for the third\n" + THEIRS[2] + THEIRS[3] + THEIRS[4]
    after = written(before=before).files[ENTRIES_NAME]
    kept = THEIRS[0] + THEIRS[1] + "# for the third\n" + THEIRS[2] + THEIRS[3] + THEIRS[4]
    assert after == kept + written().files[ENTRIES_NAME]
    assert written(before=after).files == {}
    assert written([], before=after).files == {ENTRIES_NAME: kept}
    assert written([], before=kept).files == {}
    assert written([], before=ours).files == {ENTRIES_NAME: None}
    assert written(before=THEIRS[1].rstrip()).files[ENTRIES_NAME] == THEIRS[1] + written().files[ENTRIES_NAME]


@given(st.lists(st.sampled_from([*THEIRS[1:], "ours"]), max_size=5), st.booleans())
def test_nothing_of_others_is_lost(parts, comment):
    ours = written([row("cifar10", "spp", 0.9)]).files[ENTRIES_NAME]
    before = THEIRS[0] * comment + "".join(ours if part == "ours" else part for part in parts)
    kept = THEIRS[0] * comment + "".join(part for part in parts if part != "ours")
    assert written(before=before).files[ENTRIES_NAME] == kept + written().files[ENTRIES_NAME]


@pytest.mark.parametrize(
    "before",
    [
        "[{dataset: {id: a/b, task_id: c}, value: 1}]\n",
        "- &a {value: 1}\n- *a\n",
        "a: 1\n",
        "text\n",
        "  - value: 1\n",
        "- value: 1\n---\n- value: 2\n",
        "- value: 1\n  value: 2\n",
        "[",
        "- " * 10_000,
        "\x00",
    ],
)
def test_what_is_not_understood_is_refused_and_stays(before):
    with pytest.raises(CardError, match=ENTRIES_NAME):
        written(before=before)


def test_malformed_benchmarks_are_refused():
    for given_ids in (("a/b/c", "d"), ("a", ""), ("a", "b\nc"), ("a", "b", ""), ("a", "b", "f1", "x\ny")):
        with pytest.raises(CardError):
            Benchmark(*given_ids)
    twice = {"x": Benchmark("a/b", "c"), "y": Benchmark("a/b", "c")}
    with pytest.raises(CardError, match="for several data sets"):
        eval_result_files([row("x"), row("y")], {}, benchmarks=twice)


@given(st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20))
def test_any_task_is_the_same_string_again(task):
    text = eval_result_files([row("x")], {}, benchmarks={"x": Benchmark("a/b", task)}).files[ENTRIES_NAME]
    assert read_yaml(text)[0]["dataset"] == {"id": "a/b", "task_id": task}
    again = eval_result_files([row("x", accuracy=0.1)], {ENTRIES_NAME: text}, benchmarks={"x": Benchmark("a/b", task)})
    assert len(read_yaml(again.files[ENTRIES_NAME])) == 1
    assert write_yaml(read_yaml(text)) + "\n" == text
