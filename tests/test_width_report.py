import copy
import json
import warnings

import datasets
import pytest
import torch
from conftest import build_inputs, build_model, same_bits, weights_of

from hf_spp import SPPConfig, SubnetworkSpec, apply_spp, extract_subnetwork
from hf_spp.cards.width_results import PLOTS, WidthReport, check_report_folder
from hf_spp.cards.width_rows import check_width_rows
from hf_spp.curves.arguments import name_of_spec
from hf_spp.curves.measurement import width_report
from hf_spp.curves.quality import accuracy_and_f1, measured
from hf_spp.errors import (
    CalibrationError,
    CheckpointError,
    DatasetError,
    ExampleInputsError,
    NonFiniteWeightsError,
    SPPConfigError,
    SubnetworkError,
)


def reordered(name="vit", head=None, **changes):
    model = build_model(name, head, **changes)
    apply_spp(model)
    return model


def batches_of(model, count=3, batch=4, first=0):
    return [build_inputs(model, batch, seed=first + seed) for seed in range(count)]


def report_of(model, specs=0.5, **options):
    return width_report(model, batches_of(model), specs, **{"latency_runs": 0, **options})


def numbers(report):
    return [{key: value for key, value in row.items() if key != "latency"} for row in report.rows]


def kinds(report):
    return [(row["width"], row["kind"], row["seed"]) for row in report.rows]


@pytest.fixture(scope="module")
def whole():
    """A report with everything, its model and its batches."""
    model = reordered()
    batches, calibration = batches_of(model), batches_of(model, 2, first=9)
    options = {"calibration": calibration, "random_control": (0, 4), "latency_runs": 2}
    return model, batches, calibration, width_report(model, batches, [0.5, SubnetworkSpec(ffn=16)], **options)


# What is measured


def test_rows_are_the_full_model_and_each_width_by_kind_and_seed(whole):
    *_, report = whole
    each = [("plain", None), ("compensated", None)]
    each += [(kind, seed) for seed in (0, 4) for kind in ("random", "random-compensated")]
    assert kinds(report) == [("full", "full", None), *((w, k, s) for w in ("50 %", "ffn 16") for k, s in each)]
    check_width_rows(report.rows)
    assert json.loads(json.dumps(report.rows)) == report.rows
    assert report.rows[1]["spec"] == SubnetworkSpec.uniform(whole[0], 0.5).to_dict()


def test_quality_is_that_of_the_extracted_models(whole):
    model, batches, calibration, report = whole
    spec = SubnetworkSpec.uniform(model, 0.5)
    shuffled = copy.deepcopy(model)
    apply_spp(shuffled, SPPConfig(metric="random", axes=("ffn", "heads"), seed=4))
    wanted = {
        ("full", "full", None): model,
        ("50 %", "plain", None): extract_subnetwork(model, spec),
        ("50 %", "compensated", None): extract_subnetwork(model, spec, calibration=calibration),
        ("50 %", "random", 4): extract_subnetwork(shuffled, spec),
        ("50 %", "random-compensated", 4): extract_subnetwork(shuffled, spec, calibration=calibration),
    }
    rows = dict(zip(kinds(report), report.rows, strict=True))
    for key, small in wanted.items():
        assert rows[key]["metrics"] == measured(accuracy_and_f1, small, batches)
        assert rows[key]["parameters"] == small.num_parameters()
        assert rows[key]["bytes"] == 4 * small.num_parameters()
        assert rows[key]["share"] == round(small.num_parameters() / model.num_parameters(), 6)


def test_times_are_taken_once_for_each_width(whole):
    *_, report = whole
    for row in report.rows:
        (latency,) = row["latency"]
        low, high = latency["spread"]
        assert 0 < low <= latency["milliseconds"] <= high
        assert (latency["batch"], latency["runs"], latency["threads"], latency["device"]) == (4, 2, 1, "cpu")
    assert len({json.dumps(row["latency"]) for row in report.rows if row["width"] == "50 %"}) == 1


def test_settings_say_how_it_was_measured(whole):
    settings = whole[-1].settings
    assert json.loads(json.dumps(settings)) == settings
    expected = {
        "model": "ViTForImageClassification",
        "dtype": "float32",
        "threads": 1,
        "ordered": True,
        "saliency": "l1",
        "samples": 12,
        "calibration_samples": 8,
        "random_seeds": [0, 4],
        "latency_batch_sizes": [4],
        "metric": "accuracy_and_f1",
    }
    assert {name: settings[name] for name in expected} == expected
    assert settings["specs"].keys() == {"50 %", "ffn 16"}
    assert settings["versions"].keys() == {"hf_spp", "python", "torch", "transformers"}


def test_a_report_is_deterministic_and_leaves_the_model_alone(whole):
    model, batches, calibration, report = whole
    model = copy.deepcopy(model).train()
    weights, state = weights_of(model), torch.get_rng_state()
    options = {"calibration": iter(calibration), "random_control": [0, 4], "latency_runs": 1}
    again = width_report(model, iter(batches), [0.5, SubnetworkSpec(ffn=16)], **options)
    assert numbers(again) == numbers(report)
    assert same_bits(model, weights)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "metric"), [("llama", "perplexity"), ("gpt2", "perplexity")])
def test_language_models_are_measured_by_perplexity(name, metric):
    report = report_of(reordered(name), [0.5], random_control=False)
    assert [list(row["metrics"]) for row in report.rows] == [[metric]] * 2


def test_models_without_a_head_are_measured_by_their_nearness_to_the_full_one():
    full, plain, random = report_of(reordered("bert", "base"), SubnetworkSpec(ffn=8)).rows
    assert full["metrics"] == {"cosine": pytest.approx(1)}
    assert random["metrics"]["cosine"] < 1 > plain["metrics"]["cosine"] > 0.3


def test_an_axis_that_is_cut_is_shuffled_also_hidden():
    model = build_model("bert", "sequence-classification")
    apply_spp(model, SPPConfig(axes=("hidden", "ffn")))
    report = report_of(
        model, [SubnetworkSpec(hidden=16)], metric=lambda small, _: {"sum": float(small.classifier.bias.sum())}
    )
    assert kinds(report)[1:] == [("hidden 16", "plain", None), ("hidden 16", "random", 0)]
    assert report.rows[1]["parameters"] == report.rows[2]["parameters"] < report.rows[0]["parameters"]


def test_what_no_stock_config_states_is_marked():
    report = report_of(reordered("bert", "sequence-classification"), [SubnetworkSpec(ffn=8), SubnetworkSpec(heads=2)])
    assert [row["stock"] for row in report.rows] == [True, True, True, False, False]


def test_a_metric_of_ones_own_sees_the_batches_and_each_model():
    model, seen = reordered(), []

    def metric(small, batches):
        seen.append((small.num_parameters(), small.training, [sorted(batch) for batch in batches]))
        return {"size": small.num_parameters(), "nothing": float("nan" if len(seen) > 1 else 0)}

    report = report_of(model, [0.5], metric=metric, random_control=False)
    assert seen == [(row["parameters"], False, [["labels", "pixel_values"]] * 3) for row in report.rows]
    assert report.rows[1]["metrics"] == {"size": report.rows[1]["parameters"], "nothing": None}
    with pytest.raises(NonFiniteWeightsError, match="quality of the full"):
        report_of(model, metric=lambda *_: {"x": float("nan")})


def test_a_dataset_is_collated():
    model = reordered()
    rows = [build_inputs(model, 1, seed=seed) for seed in range(6)]
    columns = {"pixel_values": [row["pixel_values"][0] for row in rows], "label": [int(row["labels"]) for row in rows]}
    data = datasets.Dataset.from_dict(columns).with_format("torch")
    found = width_report(model, data, 0.5, batch_size=4, latency_runs=1)
    assert numbers(found) == numbers(width_report(model, rows, 0.5, latency_runs=0))
    assert found.rows[0]["latency"][0]["batch"] == 4


def test_batch_sizes_are_made_of_the_example_inputs():
    model = reordered("bert", "sequence-classification")
    inputs = {**build_inputs(model, 3), "token_type_ids": torch.zeros(3, 7, dtype=torch.int64)}
    report = report_of(model, [0.5], example_inputs=inputs, latency_batch_sizes=(1, 5), latency_runs=1)
    assert [[one["batch"] for one in row["latency"]] for row in report.rows] == [[1, 5]] * 3


def test_a_model_in_no_known_order_is_measured_with_a_warning(caplog):
    model = build_model("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = report_of(model)
    assert "was not reordered along all axes that are cut" in caplog.text
    assert not report.settings["ordered"]
    assert kinds(report)[1:] == [("50 %", "plain", None), ("50 %", "random", 0)]


# What specs are called


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (SubnetworkSpec(ffn=0.5, heads=2), "heads 2, ffn 50 %"),
        (SubnetworkSpec(ffn=[96, 1024, 512]), "ffn 96–1024"),
        (SubnetworkSpec(heads=[0.5, 0.5]), "heads 50 %"),
        (SubnetworkSpec(), "nothing cut"),
    ],
)
def test_specs_are_named_by_their_widths(spec, name):
    assert name_of_spec(spec) == name


def test_specs_may_be_named_by_the_user():
    report = report_of(reordered(), {"small": 0.25, "large": SubnetworkSpec(ffn=16)}, random_control=False)
    assert [row["width"] for row in report.rows] == ["full", "small", "large"]


# Files


def test_a_report_is_saved_with_its_table_and_plots(whole, tmp_path):
    *_, report = whole
    assert report.save(tmp_path / "out") == tmp_path / "out"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "widths.md", *PLOTS.values()}
    assert WidthReport.load(tmp_path / "out") == report
    assert (tmp_path / "out" / "widths.md").read_text() == report.to_markdown()
    assert report.to_markdown().count("\n| ") == 5
    assert "2 seeds" in report.to_markdown()


def test_saving_again_replaces_and_leaves_no_stale_plot(whole, tmp_path):
    model, *_, report = whole
    report.save(tmp_path)
    shorter = report_of(model, output_dir=tmp_path)
    assert WidthReport.load(tmp_path) == shorter
    assert not (tmp_path / PLOTS["latency"]).exists()
    assert "Milliseconds" not in (tmp_path / "widths.md").read_text()


def test_results_of_something_else_are_not_replaced(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"format_version": 1, "rows": [], "settings": {}}))
    with pytest.raises(CheckpointError, match="holds results of something else"):
        report_of(reordered(), output_dir=tmp_path, metric=lambda *_: pytest.fail("measured in vain"))
    with pytest.raises(CheckpointError, match="is no width report"):
        WidthReport.load(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        check_report_folder(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "this hf_spp reads up to 1"),
        ({"rows": [{"width": "50 %"}]}, "Row 0 of the widths lacks kind, seed"),
        ({"settings": None}, "settings are missing"),
    ],
)
def test_damaged_reports_are_refused(whole, tmp_path, change, message):
    whole[-1].save(tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(CheckpointError, match=message):
        WidthReport.load(tmp_path)


def test_a_report_goes_into_a_card(whole, tmp_path):
    model, *_, report = whole
    with pytest.raises(CheckpointError, match=r"has no README\.md to write the widths into"):
        report.add_to_card(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert report.add_to_card(tmp_path) == tmp_path / "README.md"
    first = (tmp_path / "README.md").read_text()
    assert first.startswith("---\nlicense: mit\n---\n# Mine\n\n<!-- hf_spp widths:start -->\n\n## Widths\n")
    assert first.count("](widths_") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", *PLOTS.values()}
    report.add_to_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    report_of(model).add_to_card(tmp_path)
    assert (tmp_path / "README.md").read_text().count("](widths_") == 1


# What is refused


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "names no width"),
        ("half", "specs='half' names no width"),
        (1, "specs=1 names no width"),
        ([0.5, 1], "A width is 1. Accepted: a fraction"),
        ([1.5], "is no width"),
        ([SubnetworkSpec(experts=2)], "experts cannot be cut in ViTForImageClassification"),
        ([SubnetworkSpec(ffn=99)], "has 20 channels"),
        ([0.5, 0.5], "Two widths are called '50 %'"),
        ({"full": 0.5}, "Two widths are called 'full'"),
    ],
)
def test_widths_that_do_not_fit_are_refused(specs, message):
    model = reordered()
    with pytest.raises(SubnetworkError, match=message):
        width_report(model, iter(lambda: pytest.fail("read in vain"), None), specs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "accuracy"}, SPPConfigError, "metric='accuracy' is no function"),
        ({"latency_runs": -1}, SPPConfigError, "latency_runs has -1"),
        ({"batch_size": 0}, SPPConfigError, "batch_size has 0"),
        ({"random_control": "0"}, SPPConfigError, "random_control='0' is neither"),
        ({"random_control": (0, True)}, SPPConfigError, r"random_control=\(0, True\) is neither"),
        ({"calibration": 3}, CalibrationError, "The calibration data is a int"),
        ({"calibration": {"pixel_values": 0}}, CalibrationError, "The calibration data is a dict"),
        ({"calibration": []}, CalibrationError, "holds no batch"),
        ({"calibration": [torch.ones(1)]}, CalibrationError, "A calibration batch is a Tensor"),
        ({"latency_runs": 1, "latency_batch_sizes": 4}, SPPConfigError, "latency_batch_sizes=4 is no list"),
        ({"latency_runs": 1, "latency_batch_sizes": [0]}, SPPConfigError, "latency_batch_sizes has 0"),
        ({"latency_runs": 1, "example_inputs": torch.ones(2)}, ExampleInputsError, "example_inputs is a Tensor"),
        ({"latency_runs": 1, "example_inputs": {"x": 1}}, ExampleInputsError, "without a tensor"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        report_of(reordered(), **options)


def test_calibration_that_the_model_does_not_take_is_refused():
    with pytest.raises(CalibrationError):
        report_of(reordered(), calibration=[{"input_ids": torch.ones(1, 2)}])


def test_a_data_set_without_labels_is_refused():
    model = reordered()
    with pytest.raises(DatasetError, match="and no labels, which accuracy needs"):
        width_report(model, [build_inputs(model, labels=False)], 0.5)
