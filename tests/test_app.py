import statistics
import sys
import threading

import pytest
import torch
from command_line import refused
from conftest import build_inputs, build_model, same_bits, weights_of
from PIL import Image
from transformers import BertTokenizerFast, ViTImageProcessor

from hf_spp import AppError, CheckpointError, Reordering, SPPConfig, SubnetworkSpec, apply_spp, subnetwork_view
from hf_spp.app import markup, page, tasks
from hf_spp.app.contents import Contents
from hf_spp.app.heat_map import heat_maps, kept_cells
from hf_spp.app.measured import find_measured
from hf_spp.app.tasks import Answer, Comparison
from hf_spp.conversion import load_reordered, write_checkpoint
from hf_spp.curves.measurement import width_report

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "a",
    "is",
    "of",
    "paris",
    "france",
    "capital",
    "music",
    ".",
]
TEXT = "the capital of france is paris ."


def checkpoint(folder, name, head=None, config=None, processor=True, **changes):
    """A reordered checkpoint with its tokenizer or image processor."""
    model = build_model(name, head, **changes)
    folder.mkdir()
    if not processor:
        made = None
    elif "pixel_values" in model.main_input_name:
        made = ViTImageProcessor(size={"height": 12, "width": 12})
    else:
        words = [*WORDS, *(f"word{number}" for number in range(40 - len(WORDS)))]
        made = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}, model_max_length=32)
    write_checkpoint(folder, model, apply_spp(model, config or SPPConfig()), processing_class=made)
    return folder


def report_of(source, folder, specs=(0.5,), labels=5):
    model, _ = load_reordered(source)
    batches = [build_inputs(model, 4, seed=seed) for seed in range(2)]
    return width_report(model, batches, list(specs), latency_runs=1, dataset_name="pictures", output_dir=folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("app") / "vit", "vit", id2label=dict(enumerate("abcde")))


@pytest.fixture(scope="module")
def contents(vit):
    return Contents.open(vit)


@pytest.fixture(scope="module")
def picture():
    return Image.effect_noise((20, 16), 80)


# What a width costs


def test_costs_are_those_of_the_extracted_slice(contents):
    spec = contents.spec(0.5, 0.5)
    assert contents.widths(spec) == SubnetworkSpec.uniform(contents.model, 0.5).widths(contents.model)
    assert contents.what_stays(spec) == "2 of 3 heads and 8 of 20 neurons of each layer stay."
    described = spec.describe(contents.model, contents.task.sample[0])
    parameters, flops = contents.costs(spec)
    share = 100 * described.total.parameters / described.full.parameters
    assert parameters == (
        "Parameters",
        f"{described.full.parameters:,}",
        f"{described.total.parameters:,}",
        f"{share:.0f} %",
    )
    assert flops[0] == "FLOPs / sample"
    assert flops[3] == f"{100 * described.total.flops / described.full.flops:.0f} %"


def test_heads_and_neurons_are_cut_apart(contents):
    widths = contents.widths(contents.spec(1.0, 0.4))
    assert {name.rpartition(".")[2]: width for name, width in widths.items()} == {"ffn": 8}
    assert contents.what_stays(contents.spec(0.4, 1.0)) == "1 of 3 heads and 20 of 20 neurons of each layer stay."


def test_times_are_those_of_this_machine_in_turns(contents, picture):
    weights = weights_of(contents.model)
    found = contents.times(contents.spec(0.4, 0.4), [picture])
    assert len(found.full) == len(found.small) >= 3
    assert all(one > 0 for one in (*found.full, *found.small))
    assert found.gain == statistics.median(found.full) / statistics.median(found.small)
    assert (found.threads, found.device) == (torch.get_num_threads(), "cpu")
    assert same_bits(contents.model, weights)


def test_what_is_not_in_order_is_not_cut(tmp_path):
    folder = checkpoint(tmp_path / "bert", "bert", config=SPPConfig(axes=("ffn",)))
    contents = Contents.open(folder)
    assert contents.cuts == ("ffn",)
    assert [one.cut for one in contents.maps] == ["ffn"]
    assert contents.what_stays(contents.spec(0.5, 0.5)) == "8 of 20 neurons of each layer stay."
    folder = checkpoint(tmp_path / "vo", "bert", config=SPPConfig(axes=("vo",)))
    with pytest.raises(AppError, match=r"Neither heads nor neurons .* are in order"):
        Contents.open(folder)


# What it predicts


def test_full_model_and_view_classify_an_image(contents, picture):
    spec = contents.spec(0.4, 0.4)
    found = contents.predict(spec, [picture])
    inputs = contents.task.encode(picture)[0]
    with torch.no_grad():
        full = contents.model(**inputs).logits[0].softmax(-1)
        with subnetwork_view(contents.model, spec):
            small = contents.model(**inputs).logits[0].softmax(-1)
    assert {answer.name for answer in found.answers} == set("abcde")
    for answer in found.answers:
        index = "abcde".index(answer.name)
        assert answer.shares == pytest.approx((float(full[index]), float(small[index])), abs=1e-6)
        assert answer.texts == (f"{100 * full[index]:.1f} %", f"{100 * small[index]:.1f} %")
    assert found.answers[0].name == "abcde"[int(full.argmax())]
    assert contents.predict(contents.spec(1.0, 1.0), [picture]).summary == f"Both say {found.answers[0].name}."


def test_an_answer_of_the_full_model_is_kept_for_the_same_input_only(contents, picture):
    spec = contents.spec(0.4, 0.4)
    first = contents.predict(spec, [picture])
    other = contents.predict(spec, [Image.new("L", (9, 9), 200)])
    assert other != first
    assert contents.predict(spec, [picture]) == first


def test_images_of_another_size_are_interpolated(vit, picture):
    contents = Contents.open(vit, image_size=20)
    inputs = contents.task.encode(picture)[0]
    assert inputs["pixel_values"].shape == (1, 3, 20, 20)
    assert inputs["interpolate_pos_encoding"] is True
    assert contents.predict(contents.spec(0.4, 0.4), [picture]).answers


def test_requests_at_the_same_time_do_not_meet(contents, picture):
    specs = [contents.spec(share, share) for share in (0.3, 0.6, 1.0)]
    alone = [contents.predict(spec, [picture]) for spec in specs]
    weights, wrong = weights_of(contents.model), []

    def ask(number):
        for turn in range(6):
            index = (number + turn) % len(specs)
            if contents.predict(specs[index], [picture]) != alone[index]:
                wrong.append(index)
            contents.costs(specs[index], [picture])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert same_bits(contents.model, weights)


@pytest.mark.parametrize(
    ("name", "head", "task", "given"),
    [
        ("bert", "sequence-classification", "text-classification", [TEXT, "a music ."]),
        ("bert", "masked-lm", "fill-mask", ["the [MASK] of france"]),
        ("llama", "causal-lm", "text-generation", [TEXT]),
        ("gpt2", "causal-lm", "text-generation", [TEXT]),
        ("t5", "seq2seq", "text2text-generation", [TEXT]),
        ("bert", "base", "feature-extraction", [TEXT, "a music ."]),
        ("dinov2", "base", "feature-extraction", [Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "red")]),
    ],
)
def test_tasks(tmp_path, name, head, task, given):
    contents = Contents.open(checkpoint(tmp_path / name, name, head))
    assert contents.task is not None, contents.reason
    assert contents.task.name == task
    whole = contents.predict(contents.spec(1.0, 1.0), given)
    small = contents.predict(contents.spec(0.4, 0.4), given)
    assert whole != small
    for answer in whole.answers:
        assert answer.texts[0] in ("", answer.texts[1])
        assert answer.texts[0] or answer.texts[1] == "1.000"
    summaries = ("Both say", "Both go on alike for all", "Cosines of")
    assert whole.summary.startswith(summaries)
    assert [answer.texts[0] for answer in small.answers][:1] == [answer.texts[0] for answer in whole.answers][:1]


def test_a_regression_shows_its_value(tmp_path):
    contents = Contents.open(checkpoint(tmp_path / "bert", "bert", "sequence-classification", num_labels=1))
    (answer,) = contents.predict(contents.spec(0.4, 0.4), [TEXT, ""]).answers
    assert answer.shares is None
    assert float(answer.texts[0]) != float(answer.texts[1])


def test_missing_input_is_asked_for(contents, tmp_path):
    with pytest.raises(AppError, match="There is no image yet"):
        contents.predict(contents.spec(0.4, 0.4), [None])
    assert contents.costs(contents.spec(0.4, 0.4), [None]) == contents.costs(contents.spec(0.4, 0.4))
    masked = Contents.open(checkpoint(tmp_path / "bert", "bert"))
    with pytest.raises(AppError, match=r"has no \[MASK\] to fill in"):
        masked.predict(masked.spec(0.4, 0.4), [TEXT])
    with pytest.raises(AppError, match="There is no text yet"):
        masked.predict(masked.spec(0.4, 0.4), [" "])


@pytest.mark.parametrize(
    ("name", "head", "processor", "reason"),
    [
        ("bert", "token-classification", True, "asks no model for token-classification"),
        ("vit", "image-classification", False, "has no image processor that can be read"),
        ("bert", "masked-lm", False, "has no tokenizer that can be read"),
    ],
)
def test_what_cannot_be_asked_says_so_and_shows_the_rest(tmp_path, name, head, processor, reason):
    contents = Contents.open(checkpoint(tmp_path / name, name, head, processor=processor))
    spec = contents.spec(0.4, 0.4)
    with pytest.raises(AppError, match=reason):
        contents.predict(spec, [])
    assert contents.costs(spec)[0][0] == "Parameters"
    assert contents.times(spec).gain > 0
    assert len(contents.maps) == 2


def test_a_processor_that_does_not_fit_is_found_out_at_once(tmp_path):
    folder = checkpoint(tmp_path / "dinov2", "dinov2", "image-classification")
    ViTImageProcessor(size={"height": 2, "width": 2}).save_pretrained(folder)
    (folder / "SHA256SUMS").unlink()
    contents = Contents.open(folder)
    assert contents.task is None
    assert "cannot ask Dinov2ForImageClassification" in contents.reason


# Examples


def test_examples_are_held_out_and_of_different_classes(vit):
    contents = Contents.open(vit, dataset="digits")
    assert len(contents.examples) == 6
    assert all(len(given) == 1 and isinstance(given[0], Image.Image) for given in contents.examples)
    assert contents.predict(contents.spec(0.4, 0.4), contents.examples[0]).answers


# Measured quality


def test_measured_widths_are_found_beside_and_by_name(vit, tmp_path):
    report = report_of(vit, tmp_path / "widths", [0.5, SubnetworkSpec(ffn=16)])
    assert Contents.open(vit).measured is None
    for options in ({"widths": tmp_path / "widths"}, {"places": [tmp_path, tmp_path / "widths"]}):
        contents = Contents.open(vit, **options)
        found = contents.measured
        assert [line[0] for line in found.body] == ["full", "50 %", "ffn 16"]
        assert found.caption == "Accuracy / macro F1, in percent, on 8 examples of pictures."
        assert found.line_of(contents.widths(contents.spec(1.0, 1.0))) == 0
        assert found.line_of(contents.widths(contents.spec(0.5, 0.5))) == 1
        assert found.line_of(contents.widths(contents.spec(0.3, 0.5))) is None
        accuracy = report.rows[1]["metrics"]["accuracy"]
        assert found.body[1][found.header.index("Plain slice")].startswith(f"{100 * accuracy:.2f} / ")


def test_measured_widths_are_read_from_the_card(tmp_path):
    folder = checkpoint(tmp_path / "vit", "vit")
    report = report_of(folder, tmp_path / "widths")
    report.add_to_card(folder)
    contents = Contents.open(folder)
    other = Contents.open(folder, widths=tmp_path / "widths").measured
    assert (contents.measured.header, contents.measured.body) == (other.header, other.body)
    assert contents.measured.line_of(contents.widths(contents.spec(0.5, 0.5))) == 1
    assert "on 8 examples of pictures. Accuracy" in contents.measured.caption


def test_results_of_another_model_are_not_shown(vit, tmp_path):
    other = checkpoint(tmp_path / "vit", "vit", num_labels=6)
    report_of(other, tmp_path / "widths", labels=6)
    model, _ = load_reordered(vit)
    assert find_measured(model, str(vit), vit, [tmp_path / "widths"]) is None
    with pytest.raises(AppError, match="is not this checkpoint"):
        find_measured(model, str(vit), vit, [], tmp_path / "widths")
    with pytest.raises(CheckpointError):
        find_measured(model, str(vit), vit, [], tmp_path)


# Saliency


def test_heat_maps_are_the_scores_in_order(vit, contents):
    reordering = Reordering.from_pretrained(vit)
    heads, neurons = heat_maps(reordering)
    assert (heads.cut, neurons.cut) == ("heads", "ffn")
    assert [line.name for line in heads.lines] == ["0", "1"]
    for line in heads.lines:
        scores = reordering.scores[line.group][0]
        assert list(line.origins) == reordering.orders[line.group][0].tolist()
        assert line.values == pytest.approx((scores[list(line.origins)] / scores.max()).tolist())
        assert line.values[0] == 1
    assert [len(line.values) for line in neurons.lines] == [20, 20]
    widths = contents.widths(contents.spec(0.5, 0.5))
    assert [kept_cells(line, widths) for line in (heads.lines[0], neurons.lines[0])] == [2, 8]


def test_heads_that_share_one_count_with_it_and_many_neurons_share_a_cell(tmp_path):
    folder = checkpoint(tmp_path / "llama", "llama", intermediate_size=50)
    heads, neurons = heat_maps(Reordering.from_pretrained(folder))
    assert [len(line.values) for line in heads.lines] == [2, 2]
    assert [(len(line.values), line.size, line.origins) for line in neurons.lines] == [(20, 50, None)] * 2


def test_a_picture_has_a_cell_for_each_and_fades_what_is_cut(contents):
    text = markup.maps(contents.maps, contents.widths(contents.spec(0.4, 0.4)), "l1")
    heads, neurons = text.split("<svg")[1:]
    assert (heads.count('class="cell"'), heads.count('class="cell cut"')) == (2, 4)
    assert (neurons.count('class="cell"'), neurons.count('class="cell cut"')) == (16, 24)
    assert markup.maps(contents.maps, {}, "l1").count("cut") == 2 * len("x") + text.count("Faded: cut")


# Markup and the command


def test_names_from_outside_stay_text():
    evil = "<img src=x onerror=alert(1)>"
    found = Comparison(evil, (Answer(evil, (evil, evil)), Answer(evil, ("1", "2"), (0.5, 9.0))))
    for text in (markup.comparison(found), markup.table([evil], [[evil]]), markup.heading(evil)):
        assert "<img" not in text
        assert "&lt;img" in text
    assert "width:100.0%" in markup.comparison(found)


def test_what_the_page_shows_when_something_is_moved(vit, tmp_path, picture):
    report_of(vit, tmp_path / "widths")
    contents = Contents.open(vit, widths=tmp_path / "widths")
    sliders = lambda apart, width, heads, neurons: (contents.spec(heads / 100, neurons / 100), None)  # noqa: E731
    shown = page._Handlers(contents, sliders)
    stays, costs, times, quality, answers, maps = shown.refresh(True, 50, 50, 50, picture)
    assert "2 of 3 heads and 8 of 20 neurons" in stays
    assert "Parameters" in costs
    assert times.count("measuring") == 2
    assert '<tr class="here"><td>50 %' in quality
    assert "Both say" in answers or "Full model: " in answers
    assert maps.count("<svg") == 2
    assert "× as fast" in shown.times(True, 50, 50, 50, picture)
    quality = shown.refresh(True, 50, 30, 50, None)[3]
    assert "hf-spp curve" in quality
    assert "--dataset pictures" in quality
    assert "width_report measures any spec" in quality
    assert "There is no image yet" in shown.refresh(True, 50, 30, 50, None)[4]


def test_a_missing_extra_says_what_to_install(monkeypatch, vit):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'Run `pip install "hf-spp[app]"`.' in refused("app", vit)


def test_bad_input_gives_one_line(tmp_path, vit):
    assert "holds no spp_orders.safetensors" in refused("app", tmp_path)
    assert "Invalid value for '--port'" in refused("app", vit, "--port", "0")
    folder = checkpoint(tmp_path / "bert", "bert")
    assert "'digits' holds images, and fill-mask of this model takes texts" in refused(
        "app", folder, "--dataset", "digits"
    )


def test_classes_of_a_pair_are_compared_by_name():
    compare = tasks._by_class(str)
    found = compare(torch.tensor([0.7, 0.3]), torch.tensor([0.2, 0.8]))
    assert found.summary == "Full model: 0. Slice: 1."
