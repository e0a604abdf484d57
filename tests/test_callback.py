import copy
import json

import pytest
import torch
from conftest import build_model
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_spp import CallbackError, Reordering, SPPCallback, SPPConfig

EXAMPLES = [
    {"pixel_values": torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(i)), "labels": i % 5}
    for i in range(24)
]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(folder, *callbacks, model=None, **changes):
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return Trainer(
        build_model("vit") if model is None else model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:8],
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


def trained(folder, *callbacks, resume=None, **changes):
    trainer = trainer_of(folder, *callbacks, **changes)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    callback = SPPCallback()
    return trained(folder, callback, report_to="tensorboard"), callback, folder


def test_training_goes_the_same_way(finished, tmp_path):
    trainer, callback, _ = finished
    plain = trained(tmp_path)
    assert callback.reordering.changed
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    assert not same_weights(trainer.model, plain.model)
    undone = copy.deepcopy(trainer.model)
    callback.reordering.undo(undone)
    expected = plain.model.state_dict()
    # A bias of the keys cancels in the softmax: its gradient is rounding noise, which Adam scales up to full steps.
    names = [name for name in expected if not name.endswith("k_proj.bias")]
    assert max(float((undone.state_dict()[name] - expected[name]).abs().max()) for name in names) < 1e-5


def test_log_reaches_the_other_callbacks(finished):
    trainer, callback, folder = finished
    assert trainer.state.log_history[0]["spp_max_abs_diff"] == callback.reordering.max_abs_diff
    events = EventAccumulator(str(next((folder / "runs").iterdir())))
    events.Reload()
    assert events.Scalars("train/spp_moved_ffn")[0].value == callback.reordering.summary()["axes"]["ffn"]["moved"]


def test_every_checkpoint_holds_config_and_orders(finished):
    trainer, callback, folder = finished
    for checkpoint in (*folder.glob("checkpoint-*"), folder):
        stored = Reordering.from_pretrained(checkpoint)
        assert stored.digest == callback.reordering.digest
        assert SPPConfig.from_pretrained(checkpoint) == callback.reordering.config
    loaded = AutoModelForImageClassification.from_pretrained(folder / "checkpoint-12")
    assert same_weights(loaded, trainer.model)


def test_resumed_run_equals_the_uninterrupted_one(finished, tmp_path):
    trainer, callback, folder = finished
    resumed_callback = SPPCallback()
    resumed = trained(tmp_path, resumed_callback, resume=folder / "checkpoint-6")
    assert resumed_callback.reordering.digest == callback.reordering.digest
    assert same_weights(resumed.model, trainer.model)
    assert "spp_max_abs_diff" not in resumed.state.log_history[-1]


def test_partly_resumed_model_is_refused(finished, tmp_path):
    # Added after the Trainer was built, the callback cannot help it to load what from_pretrained would rename.
    trainer = trainer_of(tmp_path)
    trainer.add_callback(SPPCallback())
    with pytest.raises(CallbackError, match="does not hold the weights of its checkpoint"):
        trainer.train(resume_from_checkpoint=str(finished[2] / "checkpoint-6"))


def test_best_model_is_loaded_in_its_order(tmp_path):
    callback = SPPCallback()
    trainer = trained(
        tmp_path, callback, save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss"
    )
    best = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert same_weights(best, trainer.model)
    callback.reordering.undo(trainer.model)


@pytest.mark.parametrize("metric", ["activation", "taylor"])
def test_calibration_on_training_data_does_not_change_what_training_draws(metric, tmp_path):
    callback = SPPCallback(SPPConfig(metric=metric))
    trainer = trained(tmp_path / "spp", callback, num_train_epochs=1)
    plain = trained(tmp_path / "plain", num_train_epochs=1)
    assert callback.reordering.config.metric == metric
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)


def test_works_with_mixed_precision_accumulation_and_activation_checkpointing(tmp_path):
    callback = SPPCallback()
    # The name since transformers 5.21; the old one warns there.
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    changes = {"bf16": True, "gradient_accumulation_steps": 2, checkpointing: True}
    trainer = trained(tmp_path / "spp", callback, **changes)
    plain = trained(tmp_path / "plain", **changes)
    # The proof runs in the weights' own float32, not in the autocast of training.
    assert callback.reordering.relative_diff < 1e-5
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.02)


def test_card_holds_the_evaluation(finished):
    trainer, callback, folder = finished
    card = ModelCard.load(folder / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    assert found == {"loss": last["eval_loss"], "accuracy": last["eval_accuracy"]}
    assert card.data.pipeline_tag == "image-classification"
    assert f"{callback.reordering.max_abs_diff:.1e}" in card.text


def test_later_evaluation_updates_the_card_and_keeps_the_rest(finished):
    trainer, _, folder = finished
    path = folder / "README.md"
    path.write_text(path.read_text() + "\nA line of the user.\n")
    trainer.evaluate(EXAMPLES[8:24])
    card = ModelCard.load(path)
    assert card.data.eval_results[0].metric_value == trainer.state.log_history[-1]["eval_loss"]
    assert card.text.count("## Evaluation") == 1
    assert "A line of the user." in card.text


def test_two_callbacks_are_refused(tmp_path):
    with pytest.raises(CallbackError, match="2 SPPCallbacks"):
        trained(tmp_path, SPPCallback(), SPPCallback())


@pytest.mark.parametrize("schedule", [{}, {"strategy": "steps", "every": 2}], ids=str)
def test_checkpoint_made_without_the_callback_is_resumed(schedule, tmp_path):
    whole = trained(tmp_path / "plain")
    callback = SPPCallback(**schedule)
    resumed = trained(tmp_path / "resumed", callback, resume=tmp_path / "plain" / "checkpoint-3")
    assert callback.reordering.changed
    assert losses(resumed)[-9:] == pytest.approx(losses(whole)[-9:], rel=1e-5)
    again = trained(tmp_path / "again", SPPCallback(**schedule), resume=tmp_path / "resumed" / "checkpoint-9")
    assert same_weights(again.model, resumed.model)


def test_damaged_state_is_refused(finished, tmp_path):
    source = finished[2] / "checkpoint-6"
    damaged = tmp_path / "checkpoint-6"
    damaged.mkdir()
    for file in source.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    state = json.loads((damaged / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["SPPCallback"]["attributes"]["stored"]
    for change in ({"orders": "AAAA"}, {"orders": 5}, {"evaluations": None}):
        state["stateful_callbacks"]["SPPCallback"]["attributes"]["stored"] = stored | change
        (damaged / "trainer_state.json").write_text(json.dumps(state))
        with pytest.raises(CallbackError, match="damaged"):
            trained(tmp_path / "out", SPPCallback(), resume=damaged)


def test_second_training_does_not_reorder_again(finished):
    trainer, callback, _ = finished
    digest = callback.reordering.digest
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert callback.reordering.digest == digest
    assert sum("spp_max_abs_diff" in entry for entry in trainer.state.log_history) == 0


def test_callback_of_an_earlier_run_reorders_a_fresh_model(tmp_path):
    """Otherwise a second model, as in a search over hyperparameters, would silently be trained as it is."""
    callback, models = SPPCallback(), [build_model("vit", seed=seed) for seed in (0, 1)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    digests = []
    for number, model in enumerate(models):
        trained(tmp_path / str(number), callback, model=model, max_steps=1, learning_rate=0.0)
        digests.append(callback.reordering.digest)
        callback.reordering.undo(model)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before[number].items())
    assert digests[0] != digests[1]


def test_resumed_model_is_not_reordered_by_a_later_training(finished, tmp_path):
    callback = SPPCallback()
    resumed = trained(tmp_path, callback, resume=finished[2] / "checkpoint-6")
    digest = callback.reordering.digest
    resumed.train()
    assert callback.reordering.digest == digest
    assert not any("spp_max_abs_diff" in entry for entry in resumed.state.log_history)
