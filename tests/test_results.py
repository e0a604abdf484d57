import json

import pytest

from hf_spp.cards.results import RESULTS_NAME, ResultsFile, load_results
from hf_spp.errors import CheckpointError, SPPConfigError

SETTINGS = {
    "model": "m",
    "seed": 1,
    "recipe": {"image_size": None},
    "config": {"axes": None},
    "training_arguments": {"learning_rate": 0.1},
    "datasets": {},
    "left_out": {},
}


def row(dataset="a", method="spp", **values):
    return {
        "dataset": dataset,
        "method": method,
        "accuracy": 0.5,
        "f1": 0.25,
        "max_abs_diff": 0.0,
        "relative_diff": 0.0,
        "seconds": 1.0,
        "seed": 1,
        "versions": {},
        "parameters": {"total": 1, "trainable": 1},
        "train_samples": 1,
        "eval_samples": 1,
        "model": "m",
        "fingerprint": "f",
        **values,
    }


def begin(folder, **changes):
    return ResultsFile.open(folder, {**SETTINGS, **changes})


def test_rows_are_kept_in_order_of_data_sets_and_methods(tmp_path):
    file = begin(tmp_path)
    for dataset, method in (("b", "spp"), ("a", "spp"), ("b", "original"), ("a", "pruning-rank")):
        file.add_row(row(dataset, method))
    rows = load_results(tmp_path).rows
    assert [(r["dataset"], r["method"]) for r in rows] == [
        ("b", "original"),
        ("b", "spp"),
        ("a", "pruning-rank"),
        ("a", "spp"),
    ]


def test_a_row_replaces_an_older_one(tmp_path):
    file = begin(tmp_path)
    file.add_row(row(accuracy=0.1))
    file.add_row(row(accuracy=0.9))
    assert [r["accuracy"] for r in load_results(tmp_path).rows] == [0.9]


def test_a_finished_run_is_told_by_its_fingerprint(tmp_path):
    file = begin(tmp_path)
    file.add_row(row())
    file = begin(tmp_path)
    assert file.has("a", "spp", "f")
    assert not file.has("a", "original", "f")
    assert not file.has("b", "spp", "f")
    with pytest.raises(SPPConfigError, match="the settings of 'spp' on 'a'"):
        file.has("a", "spp", "other")


def test_fingerprints_tell_runs_apart(tmp_path):
    def fingerprint(method="spp", data=1, **changes):
        file = begin(tmp_path, **changes)
        file.add_dataset("a", {"train_samples": data})
        return file.fingerprint("a", method, None)

    assert fingerprint() == fingerprint()
    assert fingerprint(config={"axes": ["qk"]}) == fingerprint()
    others = [fingerprint("original"), fingerprint(data=2), fingerprint(seed=2), fingerprint(model="n")]
    assert len({fingerprint(), *others}) == 5


def test_every_other_setting_is_named(tmp_path):
    begin(tmp_path).add_row(row())
    with pytest.raises(SPPConfigError) as caught:
        begin(tmp_path, seed=2, training_arguments={"learning_rate": 0.2, "bf16": True})
    assert str(caught.value).startswith(
        f"{tmp_path / RESULTS_NAME} holds results of other settings: seed is 1 there and 2 now; "
        "training_arguments.bf16 is None there and True now; "
        "training_arguments.learning_rate is 0.1 there and 0.2 now. "
    )


def test_other_data_of_the_same_name_is_refused(tmp_path):
    file = begin(tmp_path)
    file.add_dataset("a", {"classes": 2})
    with pytest.raises(SPPConfigError, match=r"a\.classes is 2 there and 3 now"):
        file.add_dataset("a", {"classes": 3})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"rows": [], "settings": {}}', "format_version None"),
        ('{"format_version": 2, "rows": [], "settings": {}}', "format_version 2; this hf_spp reads up to 1"),
        ('{"format_version": 1, "rows": [{"dataset": "a"}], "settings": {}}', "its rows lack some of"),
        ('{"format_version": 1, "rows": 3, "settings": {}}', "its rows lack some of"),
        ('{"format_version": 1, "rows": [], "settings": {}}', "its settings lack"),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(tmp_path, content, said):
    (tmp_path / RESULTS_NAME).write_text(content)
    for read in (begin, load_results):
        with pytest.raises(CheckpointError, match=said):
            read(tmp_path)
    assert (tmp_path / RESULTS_NAME).read_text() == content


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=RESULTS_NAME):
        load_results(tmp_path)


def test_the_table_names_what_was_left_out(tmp_path):
    file = begin(tmp_path, left_out={"b": "no network"})
    file.add_row(row())
    lines = file.to_results().to_markdown().splitlines()
    assert lines[-1] == "Left out: **b** (no network)"
    assert any("50.00 / 25.00" in line for line in lines)


def test_rows_are_plain_json(tmp_path):
    begin(tmp_path).add_row(row())
    stored = json.loads((tmp_path / RESULTS_NAME).read_text())
    assert stored == {"format_version": 1, "rows": [row()], "settings": SETTINGS}
