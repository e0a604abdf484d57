"""The callback in the middle of training: schedules, checkpoints, adapters and copies."""

import base64
import copy
import json
import pickle
import zlib
from pathlib import Path

import pytest
import torch
from conftest import build_model, weights_of
from peft import LoraConfig, PeftModel, get_peft_model
from test_callback import EXAMPLES, losses, same_weights, trained, trainer_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from hf_spp import (
    CallbackError,
    FeedForwardPattern,
    IllegalAxisError,
    OptimizerError,
    Reordering,
    SPPCallback,
    SPPConfig,
    SPPConfigError,
    apply_spp,
    register_architecture,
)
from hf_spp._compat import accept_checkpoint_names
from hf_spp.orders_file import ORDERS_NAME
from hf_spp.stored_state import STATE_NAME, stored_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
SHUFFLE = SPPConfig(metric="random", seed=1)


def reordered_at(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "spp_moved_ffn" in entry]


def adapted_model(**settings):
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, target_modules=["q_proj", "v_proj", "fc1", "fc2"], modules_to_save=["classifier"], **settings
    )
    return get_peft_model(build_model("vit"), config)


@pytest.mark.parametrize(
    ("schedule", "changes", "steps"),
    [
        ({}, {}, [0]),
        ({"strategy": "steps", "every": 5}, {}, [5, 10]),
        ({"strategy": "epoch"}, {}, [6, 12]),
        ({"strategy": "epoch", "every": 2}, {}, [12]),
        ({"strategy": "evaluate"}, {}, [6, 12]),
        ({"strategy": "evaluate"}, {"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 12]),
        ({"strategy": "evaluate", "every": 2}, {"eval_strategy": "steps", "eval_steps": 4}, [8]),
        ({"strategy": "train_end"}, {}, [12]),
    ],
    ids=str,
)
def test_reorders_when_asked_and_trains_the_same_way(schedule, changes, steps, tmp_path):
    callback = SPPCallback(SHUFFLE, **schedule)
    trainer = trained(tmp_path / "spp", callback, **changes)
    plain = trained(tmp_path / "plain", **changes)
    assert reordered_at(trainer) == steps
    assert len(losses(trainer)) == 12
    assert losses(trainer) == pytest.approx(losses(plain), abs=2e-6)
    evaluated = [[e["eval_loss"] for e in one.state.log_history if "eval_loss" in e] for one in (trainer, plain)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=2e-6)
    assert Reordering.from_pretrained(tmp_path / "spp").digest == callback.reordering.digest
    callback.reordering.undo(trainer.model)
    expected = weights_of(plain.model)
    # A bias of the keys cancels in the softmax: its gradient is rounding noise, which Adam scales up to full steps.
    for name, tensor in weights_of(trainer.model).items():
        assert name.endswith("k_proj.bias") or torch.allclose(tensor, expected[name], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "sometimes"}, "strategy='sometimes' is unknown"),
        ({"strategy": "steps", "every": 0}, "no positive whole number"),
        ({"every": 3}, "which reorders once"),
        ({"strategy": "steps", "min_change": 2}, "no share from 0 to 1"),
        ({"min_change": 0.1}, "which reorders once"),
        ({"adapters": "both"}, "'original' or 'reordered'"),
    ],
    ids=str,
)
def test_settings_are_checked(settings, message):
    with pytest.raises(SPPConfigError, match=message):
        SPPCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"strategy": "steps", "every": 13}, {}, "never reorder in a run of 12 steps"),
        ({"strategy": "epoch", "every": 3}, {}, "never reorder in a run of 2 epochs"),
        ({"strategy": "evaluate"}, {"eval_strategy": "no"}, "the run has none"),
    ],
    ids=str,
)
def test_run_that_would_never_reorder_is_refused(settings, changes, message, tmp_path):
    with pytest.raises(CallbackError, match=message):
        trained(tmp_path, SPPCallback(**settings), **changes)


def test_hardly_moved_order_is_skipped_and_logged(tmp_path):
    trainer = trained(tmp_path, SPPCallback(strategy="steps", every=3, min_change=0.3))
    taus = {e["step"]: e["spp_kendall_tau"] for e in trainer.state.log_history if "spp_kendall_tau" in e}
    assert reordered_at(trainer) == [3]
    assert set(taus) == {6, 9, 12}
    assert all(0.9 < tau <= 1 for tau in taus.values())
    # A random order moves half of all pairs.
    shuffled = trained(tmp_path, SPPCallback(SHUFFLE, strategy="steps", every=3, min_change=0.3))
    assert reordered_at(shuffled) == [3, 6, 9, 12]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
@pytest.mark.parametrize("step", [3, 6, 9])
def test_resumed_run_equals_the_uninterrupted_one(optim, step, tmp_path):
    schedule = {"strategy": "steps", "every": 2}
    callback = SPPCallback(SHUFFLE, **schedule)
    whole = trained(tmp_path / "whole", callback, optim=optim)
    later = SPPCallback(SHUFFLE, **schedule)
    resumed = trained(tmp_path / "resumed", later, optim=optim, resume=tmp_path / "whole" / f"checkpoint-{step}")
    assert same_weights(whole.model, resumed.model)
    assert later.reordering.digest == callback.reordering.digest
    later.reordering.undo(resumed.model)


@pytest.mark.parametrize("adapters", ["original", "reordered"])
def test_resumed_adapter_run_equals_the_uninterrupted_one(adapters, tmp_path):
    settings = {"strategy": "steps", "every": 2, "adapters": adapters}
    whole = trained(tmp_path / "whole", SPPCallback(SHUFFLE, **settings), model=adapted_model(use_dora=True))
    callback = SPPCallback(SHUFFLE, **settings)
    source = tmp_path / "whole" / "checkpoint-6"
    resumed = trained(tmp_path / "resumed", callback, model=adapted_model(use_dora=True), resume=source)
    assert same_weights(whole.model, resumed.model)
    # In one process, the base model is in order already.
    trainer = trained(tmp_path / "again", callback, model=resumed.model, resume=source)
    assert same_weights(whole.model, trainer.model)


@pytest.mark.parametrize("adapters", ["original", "reordered"])
def test_saved_adapter_fits_its_base(adapters, tmp_path):
    callback = SPPCallback(SHUFFLE, strategy="steps", every=4, adapters=adapters)
    trainer = trained(tmp_path, callback, model=adapted_model())
    trainer.save_model(tmp_path / "final")
    model = trainer.model.eval()
    inputs = {"pixel_values": torch.stack([example["pixel_values"] for example in EXAMPLES[:4]])}
    for folder in (tmp_path / "final", tmp_path / "checkpoint-12"):
        base = build_model("vit")
        if adapters == "reordered":
            Reordering.from_pretrained(folder).apply(base)
        loaded = PeftModel.from_pretrained(base, folder).eval()
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert (tmp_path / "final" / ORDERS_NAME).exists() == (adapters == "reordered")


def stored_in(checkpoint):
    return stored_state(json.loads((Path(checkpoint) / STATE_NAME).read_text())["stateful_callbacks"])


@pytest.mark.parametrize("adapters", ["original", "reordered"])
def test_best_adapter_is_loaded_in_its_order(adapters, tmp_path):
    settings = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    settings |= {"greater_is_better": True, "num_train_epochs": 3}
    callback = SPPCallback(SHUFFLE, strategy="epoch", adapters=adapters)
    trainer = trained(tmp_path / "spp", callback, model=adapted_model(), **settings)
    plain = trained(tmp_path / "plain", model=adapted_model(), **settings)
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-6")
    assert callback.reordering.digest == stored_in(best).reordering.digest
    callback.reordering.undo(trainer.model)
    expected = weights_of(plain.model)
    assert all(torch.allclose(one, expected[name], atol=1e-5) for name, one in weights_of(trainer.model).items())


def test_best_model_and_its_optimizer_train_on(tmp_path):
    settings = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    settings |= {"greater_is_better": True}
    runs = []
    for callbacks in ([SPPCallback(SHUFFLE, strategy="epoch")], []):
        model = build_model("vit")
        # Without it, Trainer leaves the layers of the best model unread.
        accept_checkpoint_names(model)
        trainer = trained(tmp_path / str(len(callbacks)), *callbacks, model=model, **settings)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=2e-6)


def test_orders_lie_beside_whatever_is_saved(tmp_path):
    callback = SPPCallback(strategy="steps", every=6)
    trainer = trained(tmp_path / "out", callback)
    assert not (tmp_path / "out" / "checkpoint-3" / ORDERS_NAME).exists()
    trainer.save_model(tmp_path / "saved")
    trainer.model.save_pretrained(tmp_path / "by_hand")
    for folder in ("out/checkpoint-12", "saved", "by_hand"):
        assert Reordering.from_pretrained(tmp_path / folder).digest == callback.reordering.digest
    callback.reordering.undo(trainer.model)
    for folder in ("undone", "saved"):
        trainer.save_model(tmp_path / folder)
        assert not (tmp_path / folder / ORDERS_NAME).exists()
    # A copy knows nothing of the run, and saves as any model.
    copy.deepcopy(trainer.model).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / ORDERS_NAME).exists()


def test_orders_are_there_before_a_push(tmp_path, monkeypatch):
    seen = {}

    class Api:
        def upload_folder(self, folder_path, **kwargs):
            folder = tmp_path / "out" if "path_in_repo" not in kwargs else tmp_path / "out" / folder_path
            seen[kwargs.get("path_in_repo", ""), kwargs["commit_message"]] = Reordering.from_pretrained(folder).digest

    trainer = trainer_of(tmp_path / "out", SPPCallback(SHUFFLE, strategy="steps", every=3), save_steps=3)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: Api())
    trainer.args.push_to_hub, trainer.hub_model_id, trainer.push_in_progress = True, "me/model", None
    trainer.args.hub_strategy, trainer.args.hub_always_push = "all_checkpoints", True
    monkeypatch.setattr("transformers.trainer.PushInProgress", lambda jobs: None)
    trainer.train()
    assert len(seen) == 8
    for (place, message), digest in seen.items():
        step = message.split("step ")[1].split(",")[0]
        assert Reordering.from_pretrained(tmp_path / "out" / f"checkpoint-{step}").digest == digest, place


def test_state_restored_by_trainer_works_or_is_refused(tmp_path):
    schedule = {"strategy": "steps", "every": 2}
    whole = trained(tmp_path / "whole", SPPCallback(SHUFFLE, **schedule))
    # Trainer builds a new callback with the stored settings; those given here are not looked at.
    changes = {"restore_callback_states_from_checkpoint": True, "resume": tmp_path / "whole" / "checkpoint-6"}
    resumed = trained(tmp_path / "resumed", SPPCallback(strategy="train_end"), **changes)
    assert same_weights(whole.model, resumed.model)
    data = [{"pixel_values": torch.stack([one["pixel_values"] for one in EXAMPLES])}]
    trained(tmp_path / "data", SPPCallback(SPPConfig(metric="activation"), calibration=data))
    changes["resume"] = tmp_path / "data" / "checkpoint-6"
    with pytest.raises(CallbackError, match="without what it had been given: calibration"):
        trained(tmp_path / "never", SPPCallback(), **changes)


class Averaging(TrainerCallback):
    def __init__(self, averaged):
        self.averaged = averaged

    def on_step_end(self, args, state, control, model, **kwargs):
        self.averaged.update_parameters(model)


def test_registered_copies_move_along(tmp_path):
    runs = []
    for callback in (SPPCallback(SHUFFLE, strategy="steps", every=5), None):
        model = build_model("vit")
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        named = {name: one.detach().clone() for name, one in model.named_parameters()}
        listed = [one.detach().clone() for one in model.parameters()]
        callbacks = [Averaging(averaged)]
        if callback is not None:
            for one in (averaged, named, listed):
                callback.register_copy(one)
            callbacks.append(callback)
        trained(tmp_path / str(len(runs)), *callbacks, model=model)
        runs.append((averaged.module, named, listed))
    (averaged, named, listed), (expected, names, values) = runs
    reordered = copy.deepcopy(expected)
    order = Reordering.from_pretrained(tmp_path / "0")
    order.apply(reordered)
    for name, tensor in weights_of(averaged).items():
        assert name.endswith("k_proj.bias") or torch.allclose(tensor, weights_of(reordered)[name], atol=1e-5)
    original = build_model("vit")
    order.apply(original)
    for name, one, other in zip(names, listed, values, strict=True):
        assert torch.equal(named[name], weights_of(original)[name])
        assert torch.equal(one, named[name])
        assert torch.equal(other, names[name])


def test_copy_of_another_model_is_refused_before_training(tmp_path):
    for wrong, message in (
        (build_model("bert"), "is a BertForMaskedLM"),
        ({"nowhere.weight": torch.zeros(3)}, "'nowhere.weight'"),
        ([torch.zeros(3)], "a list of 1 tensors"),
    ):
        callback = SPPCallback()
        callback.register_copy(wrong)
        with pytest.raises(CallbackError, match=message):
            trained(tmp_path, callback)


class Compressed(torch.optim.SGD):
    """Keeps what 8-bit optimizers keep: states in blocks, with a scale for each."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["state1"] = torch.zeros(parameter.shape, dtype=torch.uint8)
                self.state[parameter]["absmax1"] = torch.ones(1 + parameter.numel() // 256)


def test_optimizer_that_cannot_move_is_refused_before_anything_is_touched(tmp_path):
    model = build_model("vit")
    trainer = trainer_of(tmp_path, SPPCallback(strategy="steps", every=2), model=model, max_steps=2)
    trainer.optimizer = Compressed(model.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match=r"Compressed's state1 of .* is torch\.uint8"):
        trainer.train()
    plain = trainer_of(tmp_path, model=build_model("vit"), max_steps=2)
    plain.optimizer = Compressed(plain.model.parameters(), lr=0.1)
    plain.train()
    assert same_weights(plain.model, model)


def test_projected_optimizer_is_refused_when_training_begins(tmp_path):
    model = build_model("vit")
    trainer = trainer_of(tmp_path, SPPCallback(strategy="epoch"), model=model)
    trainer.optimizer = torch.optim.SGD([{"params": list(model.parameters()), "rank": 8, "update_proj_gap": 5}], lr=0.1)
    with pytest.raises(OptimizerError, match="projected to a lower rank"):
        trainer.train()
    trainer.remove_callback(SPPCallback)
    trainer.add_callback(SPPCallback())
    trainer.train()


def test_the_same_callback_twice_is_refused(tmp_path):
    callback = SPPCallback()
    with pytest.raises(CallbackError, match="2 SPPCallbacks"):
        trainer_of(tmp_path, callback, callback)
    trainer = trainer_of(tmp_path, callback)
    trainer.add_callback(callback)
    with pytest.raises(CallbackError, match="2 SPPCallbacks"):
        trainer.train()


def test_stored_state_is_small(tmp_path):
    trained(tmp_path, SPPCallback(), max_steps=3)
    stored = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"]
    channels = sum(order.numel() for order in Reordering.from_pretrained(tmp_path).orders.values())
    size = (tmp_path / "checkpoint-3" / ORDERS_NAME).stat().st_size
    assert size < 6 * channels + 20_000
    assert len(stored["SPPCallback"]["attributes"]["stored"]["orders"]) < 8 * channels + 10_000


def hidden_adapter(**changes):
    """LoRA on the embeddings, which PEFT therefore saves beside the adapter."""
    torch.manual_seed(0)
    model = build_model("llama", tie_word_embeddings=False, **changes)
    return get_peft_model(model, LoraConfig(r=3, target_modules=["embed_tokens", "up_proj"]))


TOKENS = [{"input_ids": torch.arange(1, 9) + i, "labels": torch.arange(1, 9) + i} for i in range(24)]


def text_trainer(folder, model, *callbacks, **changes):
    trainer = trainer_of(folder, *callbacks, model=model, **changes)
    trainer.compute_metrics = None
    trainer.train_dataset, trainer.eval_dataset = TOKENS, TOKENS[:8]
    return trainer


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("adapters", ["original", "reordered"])
def test_embeddings_beside_an_adapter_are_loaded_in_their_order(adapters, tmp_path):
    config = SPPConfig(axes=("ffn", "vo", "hidden"), metric="random")
    settings = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    settings |= {"greater_is_better": True, "num_train_epochs": 3}
    callback = SPPCallback(config, strategy="epoch", adapters=adapters)
    trainer = text_trainer(tmp_path / "spp", hidden_adapter(), callback, **settings)
    trainer.train()
    plain = text_trainer(tmp_path / "plain", hidden_adapter(), **settings)
    plain.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    expected, found = (one.model.eval()(**inputs).logits for one in (plain, trainer))
    assert torch.allclose(found, expected, atol=1e-5)
    runs = []
    for source in (None, str(tmp_path / "spp" / "checkpoint-12")):
        callback = SPPCallback(config, strategy="epoch", adapters=adapters)
        run = text_trainer(tmp_path / str(len(runs)), hidden_adapter(), callback, num_train_epochs=3)
        run.train(resume_from_checkpoint=source)
        runs.append(run.model)
    assert same_weights(*runs)


def test_old_orders_never_stay_beside_other_weights(tmp_path):
    trained(tmp_path / "out", SPPCallback(SHUFFLE))
    assert (tmp_path / "out" / "checkpoint-3" / ORDERS_NAME).exists()
    # The next run writes into the same folder, and has not reordered yet at step 3.
    trained(tmp_path / "out", SPPCallback(SHUFFLE, strategy="steps", every=5), adam_beta1=0.8)
    assert not (tmp_path / "out" / "checkpoint-3" / ORDERS_NAME).exists()
    settings = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trained(tmp_path / "out", SPPCallback(SHUFFLE), **settings)
    callback = SPPCallback(SHUFFLE, strategy="steps", every=8)
    trainer = trained(tmp_path / "out", callback, greater_is_better=True, **settings)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    assert callback.reordering is None


def test_partly_loaded_best_model_is_refused(tmp_path):
    """Trainer leaves layers unread whose names differ in files; only the callback helps it, and not with model_init."""
    settings = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    settings |= {"greater_is_better": True}
    trainer = trainer_of(tmp_path, **settings)
    trainer.add_callback(SPPCallback(SHUFFLE, strategy="epoch"))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert same_weights(trainer.model, type(trainer.model).from_pretrained(best))


def test_undo_without_the_optimizer_is_made_good_when_training_goes_on(tmp_path):
    runs = []
    for callback in (SPPCallback(SHUFFLE), None):
        trainer = trained(tmp_path / str(len(runs)), *filter(None, [callback]))
        if callback is not None:
            callback.reordering.undo(trainer.model)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=2e-6)


def test_models_reordered_before_save_adapters_for_the_public_base(tmp_path):
    base = build_model("vit")
    apply_spp(base, SPPConfig(metric="random", seed=9))
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "fc1"]))
    trainer = trained(tmp_path / "out", SPPCallback(SHUFFLE), model=model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(trainer.model)))
    for number, one in enumerate((trainer.model, copied)):
        one.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(build_model("vit"), tmp_path / str(number)).eval()
        inputs = {"pixel_values": torch.stack([example["pixel_values"] for example in EXAMPLES[:4]])}
        assert torch.allclose(loaded(**inputs).logits, one.eval()(**inputs).logits, atol=1e-5)
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert Reordering.from_pretrained(tmp_path / "merged").digest


def test_users_undo_in_the_middle_is_followed(tmp_path):
    class Undo(TrainerCallback):
        def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
            if state.global_step == 5:
                callback.reordering.undo(model, optimizer)

    callback = SPPCallback(SHUFFLE, strategy="steps", every=4)
    trainer = trained(tmp_path / "spp", callback, Undo())
    plain = trained(tmp_path / "plain")
    assert losses(trainer) == pytest.approx(losses(plain), abs=2e-6)
    callback.reordering.undo(trainer.model)
    for name, tensor in weights_of(trainer.model).items():
        assert name.endswith("k_proj.bias") or torch.allclose(tensor, weights_of(plain.model)[name], atol=1e-5)


def test_subclass_finds_its_state_and_stretches_without_the_callback_are_seen(tmp_path):
    class Renamed(SPPCallback):
        pass

    trained(tmp_path / "first", SPPCallback(SHUFFLE), max_steps=3)
    first = stored_in(tmp_path / "first" / "checkpoint-3").reordering.digest
    renamed = Renamed(SHUFFLE)
    trained(tmp_path / "second", renamed, resume=tmp_path / "first" / "checkpoint-3", max_steps=6)
    assert renamed.reordering.digest == first
    model = build_model("vit")
    accept_checkpoint_names(model)
    trained(tmp_path / "without", model=model, resume=tmp_path / "first" / "checkpoint-3", max_steps=6)
    again = SPPCallback(SHUFFLE)
    trained(tmp_path / "third", again, resume=tmp_path / "without" / "checkpoint-6", max_steps=9)
    assert again.reordering.digest == first


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"strategy": "epoch"}, {"max_steps": 4}, "never reorder in a run of 0 epochs"),
        ({"strategy": "epoch"}, {"num_train_epochs": 0.5}, "never reorder in a run of 0 epochs"),
        ({"strategy": "epoch", "every": 2}, {"num_train_epochs": 1.5}, "never reorder in a run of 1 epochs"),
    ],
    ids=str,
)
def test_runs_too_short_for_their_epochs_are_refused(settings, changes, message, tmp_path):
    with pytest.raises(CallbackError, match=message):
        trained(tmp_path, SPPCallback(**settings), **changes)


def test_evaluation_at_the_end_of_a_broken_epoch_is_preceded(tmp_path):
    trainer = trained(tmp_path, SPPCallback(SHUFFLE, strategy="evaluate"), max_steps=9)
    assert reordered_at(trainer) == [6, 9]


def test_what_cannot_be_is_refused_before_training(tmp_path):
    with pytest.raises(IllegalAxisError, match="may not move"):
        trained(tmp_path, SPPCallback(SPPConfig(axes=("experts",)), strategy="train_end"))
    with pytest.raises(SPPConfigError, match="an SPPConfig is needed"):
        SPPCallback("l1")
    with pytest.raises(SPPConfigError, match="can be read once"):
        SPPCallback(SPPConfig(metric="taylor"), strategy="epoch", calibration=iter([]))
    with pytest.raises(CallbackError, match="was registered as a copy"):
        SPPCallback().register_copy(iter([]))
    callback = SPPCallback()
    callback.register_copy([torch.zeros(3)] * 9)
    with pytest.raises(CallbackError, match="a list of 9 tensors"):
        trained(tmp_path, callback)


def test_adapter_with_a_new_head_resumes_in_a_fresh_process(tmp_path):
    """The head that the trained one replaces is drawn anew, and no checkpoint holds it."""
    runs = []
    for seed, source in ((0, None), (1, str(tmp_path / "0" / "checkpoint-6"))):
        model = build_model("vit")
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.weight, std=0.02 * (1 + seed))
        torch.manual_seed(0)
        settings = LoraConfig(r=3, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
        callback = SPPCallback(SHUFFLE, strategy="steps", every=4)
        trainer = trained(tmp_path / str(seed), callback, model=get_peft_model(model, settings), resume=source)
        runs.append({name: one for name, one in weights_of(trainer.model).items() if "original_module" not in name})
    assert all(torch.equal(one, runs[1][name]) for name, one in runs[0].items())


def test_model_without_token_embeddings_saves_its_adapter(tmp_path):
    model = build_model("vit")
    model.get_input_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError)
    settings = LoraConfig(r=3, target_modules=["q_proj", "fc1"])
    trained(tmp_path, SPPCallback(SHUFFLE), model=get_peft_model(model, settings), max_steps=3)
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


def test_packed_state_that_would_fill_the_memory_is_refused(tmp_path):
    trained(tmp_path, SPPCallback(), max_steps=3)
    path = tmp_path / "checkpoint-3" / STATE_NAME
    state = json.loads(path.read_text())
    stored = state["stateful_callbacks"]["SPPCallback"]["attributes"]["stored"]
    stored["orders"] = base64.b64encode(zlib.compress(b"0" * 100_000_000)).decode()
    path.write_text(json.dumps(state))
    with pytest.raises(CallbackError, match="is damaged"):
        trained(tmp_path / "out", SPPCallback(), resume=path.parent)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_count_of_evaluations_is_resumed(step, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2}
    whole = trained(tmp_path / "whole", SPPCallback(SHUFFLE, strategy="evaluate", every=3), **settings)
    callback = SPPCallback(SHUFFLE, strategy="evaluate", every=3)
    source = tmp_path / "whole" / f"checkpoint-{step}"
    resumed = trained(tmp_path / "resumed", callback, resume=source, **settings)
    assert reordered_at(whole) == reordered_at(resumed) == [6, 12]
    assert same_weights(whole.model, resumed.model)


class Block(nn.Module):
    """A module of one's own, which Trainer saves by its state dict."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Linear(6, 20), nn.Linear(20, 5)

    def forward(self, x, labels):
        logits = self.narrow(self.widen(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_registered_module_of_ones_own_is_trained(tmp_path):
    register_architecture(Block, FeedForwardPattern(("widen",), "narrow"))
    torch.manual_seed(0)
    examples = [{"x": torch.randn(6), "labels": i % 5} for i in range(24)]
    inputs = {"x": torch.randn(2, 6), "labels": torch.tensor([0, 1])}
    runs = []
    for callbacks in ([SPPCallback(SHUFFLE, strategy="steps", every=4, example_inputs=inputs)], []):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path / str(len(callbacks)), *callbacks, model=Block(), eval_strategy="no")
        trainer.train_dataset = examples
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=2e-6)
    assert (tmp_path / "1" / "checkpoint-12" / ORDERS_NAME).is_file()
