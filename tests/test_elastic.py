"""`ElasticTrainer`; as a script, one process of a training run: python tests/test_elastic.py SETTINGS.json"""

import contextlib
import copy
import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_inputs, build_model, same_bits, weights_of
from launching import _environment
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer, TrainingArguments

from hf_spp import (
    ElasticTrainer,
    SPPCallback,
    SPPConfig,
    SPPConfigError,
    SubnetworkError,
    SubnetworkSpec,
    apply_spp,
    extract_subnetwork,
    subnetwork_view,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
WIDTHS = [0.5, 0.25, 0.75]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout_rate": 0.0}
# The name since transformers 5.21; the old one warns there.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def ordered_model(name="vit", head=None, dtype=torch.float64, **changes):
    model = build_model(name, head, dtype, **changes)
    apply_spp(model)
    return model


def examples_of(model, count=24):
    inputs = build_inputs(model, count)
    if "labels" in inputs and inputs["labels"].shape == inputs.get("input_ids", torch.empty(0)).shape:
        # A different number of labels in each row.
        for row in range(count):
            inputs["labels"][row, : 1 + row % 4] = -100
    return [{name: values[i] for name, values in inputs.items()} for i in range(count)]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(folder, model=None, *, kind=ElasticTrainer, callbacks=None, loss=None, metrics=accuracy, **changes):
    model = ordered_model() if model is None else model
    names = ("sampled", "distillation", "temperature", "eval_widths")
    settings = {name: changes.pop(name) for name in names if name in changes}
    # A quarter of two key-value heads is one of them, as a half is.
    widths = changes.pop("widths", WIDTHS if model.config.model_type != "llama" else [0.5, 0.75])
    settings = {"widths": widths, **settings} if kind is ElasticTrainer else {}
    examples = changes.pop("examples", None)
    if examples is None:
        examples = examples_of(model)
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return kind(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=examples,
        eval_dataset=examples[:8],
        compute_metrics=metrics,
        compute_loss_func=loss,
        callbacks=callbacks,
        **settings,
    )


def trained(folder, model=None, *, resume=None, **changes):
    trainer = trainer_of(folder, model, **changes)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def training_logs(trainer):
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [{key: value for key, value in log.items() if key.startswith("loss")} for log in logs]


def batch_of(examples):
    return {name: torch.stack([torch.as_tensor(one[name]) for one in examples]) for name in examples[0]}


def largest_difference(first, second):
    return max(float((first[name] - second[name]).detach().abs().max()) for name in first)


def divergence(logits, target, temperature=1.0):
    """From its definition, per row."""
    p, q = (target / temperature).softmax(-1), (logits / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize(
    ("distillation", "temperature", "sampled"), [(1.0, 1.0, 1), (0.7, 2.0, 2), (0.0, 1.0, 0)], ids=str
)
def test_step_is_that_of_a_loop_by_hand(distillation, temperature, sampled, tmp_path):
    model = ordered_model()
    examples, expected = examples_of(model, 4), copy.deepcopy(model).train()
    settings = {"distillation": distillation, "temperature": temperature, "sampled": sampled}
    trainer = trained(tmp_path, model, examples=examples, max_steps=1, **settings)
    batch, drawn = batch_of(examples), trainer.drawn_widths(0)
    assert len(drawn) == 1 + sampled
    full = expected(**batch)
    losses = [full.loss]
    full.loss.backward()
    for name in drawn:
        with subnetwork_view(expected, trainer.widths[name]):
            outputs = expected(**batch)
            learnt = divergence(outputs.logits, full.logits.detach(), temperature).mean()
            losses.append(distillation * learnt + (1 - distillation) * outputs.loss)
            losses[-1].backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad / len(losses)
    assert largest_difference(weights_of(model), weights_of(expected)) <= 1e-10
    (log,) = training_logs(trainer)
    found = [log["loss_full"], *(log[f"loss_width_{name}"] for name in drawn)]
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    assert log["loss"] == pytest.approx(sum(found) / len(found), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("vit", None),
        ("llama", "causal-lm"),
        ("bert", "sequence-classification"),
        ("bert", "masked-lm"),
        ("t5", "seq2seq"),
    ],
)
def test_accumulated_halves_are_one_batch(name, head, tmp_path):
    """Also for BERT's classifier, whose own loss takes no account of how many batches there are."""
    models = [ordered_model(name, head, torch.float32, **NO_DROPOUT) for _ in range(2)]
    before = weights_of(models[0])
    for model, parts in zip(models, (1, 2), strict=True):
        changes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        changes |= {"distillation": 0.5, "max_steps": 3, "metrics": None, "train_sampling_strategy": "sequential"}
        trained(tmp_path / str(parts), model, **changes)
    first, second = map(weights_of, models)
    assert largest_difference(first, before) > 1e-3
    assert largest_difference(first, second) <= 2e-6


def test_causal_language_model_learns_where_labels_are(tmp_path):
    model = ordered_model("llama", "causal-lm", torch.float32)
    examples, expected = examples_of(model, 4), copy.deepcopy(model).train()
    options = {"widths": [0.5], "metrics": None, "distillation": 0.6}
    trained(tmp_path, model, examples=examples, max_steps=1, learning_rate=1.0, **options)
    batch = batch_of(examples)
    labels = batch.pop("labels")
    places = labels[:, 1:] != -100
    logits = expected(**batch, use_cache=False).logits[:, :-1][places]
    functional.cross_entropy(logits, labels[:, 1:][places]).backward()
    with subnetwork_view(expected, SubnetworkSpec.uniform(expected, 0.5)):
        small = expected(**batch, use_cache=False).logits[:, :-1][places]
        loss = 0.6 * divergence(small, logits.detach()).mean()
        (loss + 0.4 * functional.cross_entropy(small, labels[:, 1:][places])).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= parameter.grad / 2
    assert largest_difference(weights_of(model), weights_of(expected)) <= 1e-6


def test_batch_without_labels_counts_as_nothing(tmp_path):
    models = [ordered_model("llama", "causal-lm", torch.float32) for _ in range(2)]
    examples = examples_of(models[0], 4)
    blank = [{**one, "labels": torch.full_like(one["labels"], -100)} for one in examples]
    options = {"metrics": None, "max_steps": 1, "train_sampling_strategy": "sequential", "distillation": 0.5}
    trained(tmp_path / "1", models[0], examples=examples, **options)
    trained(tmp_path / "2", models[1], examples=[*blank, *examples], gradient_accumulation_steps=2, **options)
    assert largest_difference(*map(weights_of, models)) <= 1e-6


def test_drawn_widths_depend_on_seed_and_step_alone(tmp_path):
    widths = [0.25, 0.5, 0.75]
    model = ordered_model(hidden_size=32, num_attention_heads=8, intermediate_size=64)
    trainer = trainer_of(tmp_path, model, widths=[*widths, 0.375, 0.625])
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    drawn = [trainer.drawn_widths(step) for step in range(50)]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(2)
    torch.manual_seed(2)
    assert drawn == [trainer.drawn_widths(step) for step in range(50)]
    assert {names[0] for names in drawn} == {"0.375", "0.5", "0.625", "0.75"}
    assert all(len(names) == 2 and names[-1] == "0.25" for names in drawn)
    trainer.args.seed = 7
    assert drawn != [trainer.drawn_widths(step) for step in range(50)]
    trainer.sampled = 9
    assert trainer.drawn_widths(0) == ["0.75", "0.625", "0.5", "0.375", "0.25"]


@pytest.mark.parametrize(("name", "head"), [("vit", None), ("bert", "sequence-classification")])
def test_resumed_run_goes_on_as_the_uninterrupted_one(name, head, tmp_path):
    """With dropout, which draws on."""
    changes = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "optim": "adamw_torch"}
    changes |= {"learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    make = lambda: ordered_model(name, head, torch.float32, hidden_dropout_prob=0.2)  # noqa: E731
    whole = trained(tmp_path / "whole", make(), **changes)
    resumed = trained(tmp_path / "resumed", make(), resume=tmp_path / "whole" / "checkpoint-4", **changes)
    assert training_logs(resumed) == training_logs(whole)
    assert {key for log in training_logs(whole)[4:] for key in log} >= {"loss_width_0.5", "loss_width_0.75"}
    assert same_bits(resumed.model, whole.model.state_dict())


def test_runs_in_bfloat16(tmp_path):
    runs = [trained(tmp_path / str(bf16), ordered_model(dtype=torch.float32), bf16=bf16) for bf16 in (False, True)]
    plain, mixed = map(training_logs, runs)
    assert plain != mixed
    for one, other in zip(plain, mixed, strict=True):
        assert other == pytest.approx(one, rel=0.05, abs=0.02)
    metrics = trainer_of(tmp_path, ordered_model(dtype=torch.float32), bf16_full_eval=True).evaluate()
    assert metrics["eval_width_0.5_loss"] > 0


def test_activation_checkpointing_changes_nothing(tmp_path):
    """What is computed again in the backward pass has the width of the forward pass."""
    runs = [trained(tmp_path / str(value), **{CHECKPOINTING: value}) for value in (False, True)]
    assert training_logs(runs[0]) == training_logs(runs[1])
    assert largest_difference(*(weights_of(run.model) for run in runs)) <= 1e-12


def test_processes_are_synchronized_by_the_last_pass_alone(tmp_path, monkeypatch):
    trainer, passes, inside = trainer_of(tmp_path), [], []

    @contextlib.contextmanager
    def no_sync(model):
        inside.append(model)
        yield
        inside.pop()

    def backward(loss, **kwargs):
        passes.append(len(inside))
        loss.backward()

    monkeypatch.setattr(trainer.accelerator, "no_sync", no_sync)
    monkeypatch.setattr(trainer.accelerator, "backward", backward)
    trainer.train()
    assert passes == [1, 1, 0] * 6


def test_gradients_of_all_passes_are_scaled_alike(tmp_path):
    """As for float16."""
    gradients = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        trainer = trained(tmp_path, max_steps=1)
        trainer.accelerator.scaler = scaler
        trainer.training_step(trainer.model, batch_of(trainer.eval_dataset))
        gradients.append({name: one.grad / (1024 if scaler else 1) for name, one in trainer.model.named_parameters()})
    assert largest_difference(*gradients) <= 1e-12


def test_losses_of_widths_are_means_over_the_steps_that_trained_them(tmp_path):
    each = trained(tmp_path / "1")
    both = trained(tmp_path / "2", logging_steps=3)
    logs = training_logs(each)
    for number, log in enumerate(training_logs(both)):
        for key, value in log.items():
            values = [one[key] for one in logs[3 * number : 3 * number + 3] if key in one]
            assert value == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert any("loss_width_0.5" not in log for log in logs)
    # A second training begins anew.
    each.train()
    assert len(training_logs(each)) == 6


def test_evaluation_measures_every_width(tmp_path):
    trainer = trained(tmp_path)
    metrics = trainer.evaluate()
    batch = batch_of(trainer.eval_dataset)
    for name in ("0.25", "0.5", "0.75"):
        model = extract_subnetwork(trainer.model, trainer.widths[name]).eval()
        with torch.no_grad():
            outputs = model(**batch)
        assert metrics[f"eval_width_{name}_loss"] == pytest.approx(outputs.loss.item(), rel=1e-6)
        expected = (outputs.logits.argmax(-1) == batch["labels"]).double().mean().item()
        assert metrics[f"eval_width_{name}_accuracy"] == pytest.approx(expected)
    assert len({metrics[key] for key in metrics if key.endswith("_loss")}) == 4
    plain = trainer_of(tmp_path, copy.deepcopy(trainer.model), kind=Trainer).evaluate()
    assert plain["eval_loss"] == metrics["eval_loss"]
    assert not any("width" in key for key in trainer.predict(trainer.eval_dataset).metrics)


def test_progress_counts_every_width_from_zero(tmp_path, capfd):
    trainer = trainer_of(tmp_path, disable_tqdm=False, per_device_eval_batch_size=2)
    trainer.evaluate()
    counts = re.findall(r"(\d+)/(\d+) \[", capfd.readouterr().err)
    assert [done for done, total in counts].count("4") >= 4
    assert {total for _, total in counts} == {"4"}
    assert all(int(done) <= 4 for done, _ in counts)


def test_evaluated_widths_may_be_others(tmp_path):
    spec = SubnetworkSpec(ffn=4)
    trainer = trainer_of(tmp_path, eval_widths={"narrow": spec, "half": 0.5}, eval_strategy="steps", eval_steps=6)
    trainer.eval_dataset = {"first": trainer.eval_dataset[:4], "second": trainer.eval_dataset[4:]}
    trainer.train()
    found = [log for log in trainer.state.log_history if "eval_first_loss" in log]
    assert found[0]["eval_first_width_narrow_accuracy"] >= 0
    assert "eval_first_width_0.25_loss" not in found[0]
    metrics = trainer.evaluate()
    with subnetwork_view(trainer.model, spec), torch.no_grad():
        loss = trainer.model.eval()(**batch_of(trainer.eval_dataset["second"])).loss.item()
    assert metrics["eval_second_width_narrow_loss"] == pytest.approx(loss, rel=1e-6)
    assert "eval_width_narrow_loss" not in metrics


def test_metric_of_a_width_chooses_the_best_model(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "width_0.25_loss", "learning_rate": 0.5}
    trainer = trained(tmp_path, eval_widths=[0.25], **changes)
    found = {log["step"]: log["eval_width_0.25_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(found, key=found.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_width_0.25_loss"] == pytest.approx(found[best], rel=1e-6)


def test_result_is_one_ordinary_model(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert same_bits(loaded, trainer.model.state_dict())


def test_callback_puts_the_model_in_order_first(tmp_path):
    callback = SPPCallback(SPPConfig(metric="l1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = trained(tmp_path / "callback", build_model("vit", dtype=torch.float64), callbacks=[callback])
    assert callback.reordering.changed
    before = ordered_model()
    expected = trained(tmp_path / "before", before)
    for one, other in zip(training_logs(moved), training_logs(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    moved.evaluate()
    assert "width_0.5_accuracy" in (tmp_path / "callback" / "README.md").read_text()


def test_callback_may_reorder_in_the_middle(tmp_path):
    callback = SPPCallback(SPPConfig(metric="l1"), strategy="steps", every=2)
    trainer = trained(tmp_path, callbacks=[callback], learning_rate=0.5)
    assert sum("spp_moved_ffn" in log for log in trainer.state.log_history) == 3
    expected = extract_subnetwork(trainer.model, trainer.widths["0.5"]).eval()
    with torch.no_grad():
        loss = expected(**batch_of(trainer.eval_dataset)).loss.item()
    assert trainer.evaluate()["eval_width_0.5_loss"] == pytest.approx(loss, rel=1e-6)


def pattern_task(count, seed):
    """Images of one of five patterns each, under noise."""
    patterns = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    images = patterns[labels] + torch.randn(count, 3, 12, 12, generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def test_smallest_width_ends_better_than_with_plain_training(tmp_path):
    examples, unseen, found = pattern_task(512, 1), pattern_task(200, 2), {}
    changes = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": 100, "per_device_train_batch_size": 16}
    for kind in (Trainer, ElasticTrainer):
        model = ordered_model(dtype=torch.float32, hidden_size=32, num_attention_heads=4, intermediate_size=64)
        trained(tmp_path / kind.__name__, model, kind=kind, examples=examples, **changes)
        apply_spp(model)
        metrics = trainer_of(tmp_path, model, examples=examples, per_device_eval_batch_size=50).evaluate(unseen)
        found[kind] = [metrics["eval_accuracy"], metrics["eval_width_0.25_accuracy"]]
    # 0.99 and 0.475, and 1.0 and 0.96.
    assert min(found[Trainer][0], found[ElasticTrainer][0]) >= 0.95
    assert found[Trainer][1] <= 0.65
    assert found[ElasticTrainer][1] >= 0.85


class HiddenLoss:
    """A loss of the last hidden state, for models without a head."""

    def __call__(self, outputs, labels, num_items_in_batch=None):
        return outputs.last_hidden_state.square().mean()


def test_model_without_logits_learns_the_last_hidden_state(tmp_path):
    model = ordered_model("bert", "base", **NO_DROPOUT)
    examples, expected = examples_of(model, 4), copy.deepcopy(model).train()
    changes = {"loss": HiddenLoss(), "metrics": None, "widths": [0.5], "remove_unused_columns": False}
    trainer = trained(tmp_path, model, examples=examples, max_steps=1, **changes)
    batch = batch_of(examples)
    full = expected(**batch).last_hidden_state
    with subnetwork_view(expected, trainer.widths["0.5"]):
        small = expected(**batch).last_hidden_state
    places = batch["attention_mask"].bool()
    assert not places.all()
    (log,) = training_logs(trainer)
    assert log["loss_full"] == pytest.approx(full.square().mean().item(), rel=1e-6)
    assert log["loss_width_0.5"] == pytest.approx((small - full)[places].square().mean().item(), rel=1e-6)


def stand_in(problem_type=None, shifts=False, temperature=1.0):
    """What `distillation_loss` asks of a trainer."""
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(problem_type=problem_type)
    trainer = ElasticTrainer.__new__(ElasticTrainer)
    trainer.model, trainer._loss_shifts_labels, trainer.temperature = model, shifts, temperature
    return trainer


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_is_learnt_from_each_kind_of_output():
    out, aim = numbers(4, 6, 5, seed=1), numbers(4, 6, 5, seed=2)
    labels = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(3))
    labels[0] = labels[:, :2] = -100

    def learnt(out, aim, inputs, name="logits", **settings):
        return stand_in(**settings).distillation_loss({name: out}, {name: aim}, inputs).item()

    rows = divergence(out, aim)
    assert learnt(out, aim, {}) == pytest.approx(rows.mean().item())
    assert learnt(out, aim, {"labels": labels}) == pytest.approx(rows[labels != -100].mean().item())
    shifted = rows[:, :-1][labels[:, 1:] != -100].mean().item()
    assert learnt(out, aim, {"labels": labels}, shifts=True) == pytest.approx(shifted)
    aligned = {"labels": labels, "shift_labels": labels}
    assert learnt(out, aim, aligned, shifts=True) == pytest.approx(rows[labels != -100].mean().item())
    mask = (labels != -100).long()
    assert learnt(out, aim, {"attention_mask": mask}) == pytest.approx(rows[mask.bool()].mean().item())
    hot = divergence(out, aim, 3.0).mean().item()
    assert learnt(out, aim, {}, temperature=3.0) == pytest.approx(hot)
    assert learnt(out, aim, {"labels": torch.full((4, 6), -100)}) == 0.0

    squares = (out - aim).square().mean().item()
    assert learnt(out, aim, {"labels": aim}, problem_type="regression") == pytest.approx(squares)
    single = (out - aim)[..., :1].square().mean().item()
    assert learnt(out[..., :1], aim[..., :1], {"labels": labels}) == pytest.approx(single)
    p, q = (aim / 2).sigmoid(), (out / 2).sigmoid()
    binary = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().item()
    assert learnt(out, aim, {"labels": (aim > 0).double()}, temperature=2.0) == pytest.approx(binary)

    image, other = numbers(2, 5, 3, 3, seed=4), numbers(2, 5, 3, 3, seed=5)
    pixels = divergence(image.movedim(1, -1), other.movedim(1, -1)).mean().item()
    assert learnt(image, other, {"labels": torch.zeros(2, 9, 9, dtype=torch.int64)}) == pytest.approx(pixels)
    with pytest.raises(SubnetworkError, match="do not say which axis is that of classes"):
        learnt(image, other, {})
    with pytest.raises(SubnetworkError, match="Leave hidden out of the widths"):
        learnt(out[..., :3], aim, {}, "last_hidden_state")
    parts = {"start_logits": out[..., 0], "end_logits": out[..., 1]}
    aims = {"start_logits": aim[..., 0], "end_logits": aim[..., 1]}
    both = [divergence(parts[name], aims[name]).mean().item() for name in parts]
    assert stand_in().distillation_loss(parts, aims, {}).item() == pytest.approx(sum(both) / 2)


def test_question_answering_learns_both_ends(tmp_path):
    trainer = trained(tmp_path, ordered_model("bert", "question-answering"), metrics=None, max_steps=2)
    assert training_logs(trainer)[0]["loss_width_0.25"] > 0


def test_outputs_without_anything_to_learn_from_are_refused(tmp_path):
    model = ordered_model("vit", "masked-image")
    with pytest.raises(SubnetworkError, match="neither logits nor a last hidden state"):
        trained(tmp_path, model, metrics=None)
    trainer = trained(tmp_path, model, metrics=None, distillation=0.0, max_steps=1)
    assert training_logs(trainer)[0]["loss_width_0.25"] > 0


def test_widths_are_settled_in_order_of_size(tmp_path):
    model = ordered_model()
    specs = [SubnetworkSpec(ffn=0.5, heads=2, multiple_of=1), SubnetworkSpec(ffn=4), 0.25]
    trainer = trainer_of(tmp_path, model, widths=specs)
    found = {name: (spec.ffn, spec.heads) for name, spec in trainer.widths.items()}
    assert found == {"0.25": (8, 1), "spec1": (4, None), "spec0": (10, 2)}
    assert trainer.eval_widths == trainer.widths
    named = trainer_of(tmp_path, model, widths={"half": 0.5, "tiny": SubnetworkSpec(ffn=1, heads=1)}, eval_widths=[])
    assert list(named.widths) == ["tiny", "half"]
    assert not any("width" in key for key in named.evaluate())


def test_hidden_channels_may_be_cut(tmp_path):
    model = build_model("vit", dtype=torch.float64)
    apply_spp(model, SPPConfig(axes=("ffn", "heads", "hidden")))
    trainer = trained(tmp_path, model, widths={"thin": SubnetworkSpec(hidden=16, ffn=8)}, max_steps=2)
    assert training_logs(trainer)[1]["loss_width_thin"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, "widths is empty"),
        ({"widths": 0.5}, "is no list of widths"),
        ({"widths": [0.5, 1.0]}, "keeps all channels of ViTForImageClassification"),
        ({"widths": [SubnetworkSpec()]}, "keeps all channels of ViTForImageClassification"),
        ({"widths": [0.5, 2]}, "2 in widths is no width"),
        ({"widths": [0.5, "0.25"]}, "'0.25' in widths is no width"),
        ({"widths": [0.5, 0.52]}, "0.5 and 0.52 in widths keep the same channels"),
        ({"widths": {"full": 0.5}}, "widths has the name 'full'"),
        ({"eval_widths": [True]}, "True in eval_widths is no width"),
        ({"eval_widths": {"0.5": 0.25}}, "'0.5' is one spec in widths and another in eval_widths"),
        ({"sampled": -1}, "sampled=-1 is no count"),
        ({"distillation": 1.5}, "distillation=1.5 is no share"),
        ({"temperature": 0}, "temperature=0 is no temperature"),
    ],
    ids=str,
)
def test_settings_that_are_not_accepted(changes, message, tmp_path):
    with pytest.raises(SPPConfigError, match=message):
        trainer_of(tmp_path, **changes)


def test_models_and_set_ups_that_are_not_accepted(tmp_path, monkeypatch):
    with pytest.raises(SubnetworkError, match="ffn=21 is asked for"):
        trainer_of(tmp_path, widths=[SubnetworkSpec(ffn=21)])
    adapted = get_peft_model(build_model("vit"), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(SubnetworkError, match="holds adapters"):
        trainer_of(tmp_path, adapted, examples=examples_of(build_model("vit")))
    trainer = trainer_of(tmp_path)
    for attribute, message in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        with monkeypatch.context() as patch:
            original = Trainer.create_accelerator_and_postprocess

            def spread(self, attribute=attribute, original=original):
                original(self)
                setattr(self, attribute, True)

            patch.setattr(Trainer, "create_accelerator_and_postprocess", spread)
            with pytest.raises(SubnetworkError, match=message):
                trainer_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", 2)
        with pytest.raises(SubnetworkError, match="on 2 devices by DataParallel"):
            trainer_of(tmp_path)
    trainer.args.optim = "lomo"
    with pytest.raises(SPPConfigError, match="optim='lomo'"):
        trainer_of(tmp_path, optim="lomo")


def test_model_that_was_never_reordered_warns_once(tmp_path):
    with pytest.warns(UserWarning, match="was not reordered along all axes that are cut") as found:
        trainer = trainer_of(tmp_path, build_model("vit", dtype=torch.float64))
    assert [warning.filename for warning in found] == [__file__]
    # Another one would be an error.
    trainer.train()
    trainer.evaluate()


def run(folder, processes, **settings):
    """Train in some processes, and return the weights and the log."""
    folder.mkdir()
    file = folder / "settings.json"
    file.write_text(json.dumps({**settings, "folder": str(folder), "processes": processes}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, str(file)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(folder / "weights.pt"), json.loads((folder / "log.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("model", "head", "arguments"),
    [
        ("vit", None, {}),
        ("vit", None, {"gradient_accumulation_steps": 2, CHECKPOINTING: True}),
        ("llama", "causal-lm", {"gradient_accumulation_steps": 2}),
        ("bert", "sequence-classification", {}),
    ],
    ids=str,
)
def test_two_processes_train_as_one(model, head, arguments, tmp_path):
    settings = {"model": model, "head": head, "arguments": arguments}
    one, log = run(tmp_path / "one", 1, **settings)
    two, other = run(tmp_path / "two", 2, **settings)
    # Causal language models compute their loss in float32.
    exact = model != "llama"
    assert largest_difference(one, two) <= (1e-10 if exact else 1e-6)
    assert len(log) == len(other) == 3
    for first, second in zip(log, other, strict=True):
        assert second == pytest.approx(first, rel=1e-5)


def main(settings):
    """One process of a run that sees the same examples in every number of processes."""
    model = ordered_model(settings["model"], settings["head"], **NO_DROPOUT)
    arguments = settings["arguments"]
    parts = settings["processes"] * arguments.get("gradient_accumulation_steps", 1)
    options = {"train_sampling_strategy": "sequential", "metrics": None, "max_steps": 3, "distillation": 0.8}
    options |= {"per_device_train_batch_size": 8 // parts, "optim": "adamw_torch", "learning_rate": 1e-3}
    trainer = trained(settings["folder"], model, **options, **arguments)
    wrapped = isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert wrapped == (settings["processes"] > 1)
    assert isinstance(model, PreTrainedModel)
    if trainer.is_world_process_zero():
        torch.save(weights_of(model), Path(settings["folder"], "weights.pt"))
        Path(settings["folder"], "log.json").write_text(json.dumps(training_logs(trainer)))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    # Gloo's threads can abort a process while its interpreter is torn down (pytorch/pytorch#190489).
    sys.stdout.flush()
    os._exit(0)
