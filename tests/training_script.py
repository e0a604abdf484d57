"""One process of a training run with the stock `Trainer`, on CPU: python tests/training_script.py SETTINGS.json

`launching.run_training` writes the settings, starts every process and says what the settings mean.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import build_inputs, build_model
from launching import WORLD_SIZES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import hf_spp.training
from hf_spp import SPPCallback, SPPConfig

GLOBAL_BATCH = 8


class RecordingTrainer(Trainer):
    """The stock Trainer; it keeps the losses in their own dtype, because the log adds them up in float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorded: list[Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.recorded.append(loss.double())
        return loss

    def mean_losses(self) -> list[float]:
        """The loss of every step, over its batches and all ranks."""
        losses = torch.stack(self.recorded).view(-1, self.args.gradient_accumulation_steps).sum(1)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(losses)
        return (losses / self.args.world_size).tolist()


def main(settings: dict[str, Any]) -> None:
    trainer = build_trainer(settings)
    trainer.train(resume_from_checkpoint=settings["resume"])
    assert trainer.state.global_step == settings["steps"]
    result = {"losses": trainer.mean_losses(), **check_setup(trainer, settings["setup"])}
    if trainer.args.load_best_model_at_end:
        result["best"] = trainer.state.best_model_checkpoint
        result["best_loss"] = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        Path(settings["output_dir"], "result.json").write_text(json.dumps(result))


def build_trainer(settings: dict[str, Any], *callbacks: TrainerCallback) -> RecordingTrainer:
    """A Trainer in one of the set-ups, which sees the same batches in the same order in every one of them."""
    setup, seed, dtype = settings["setup"], settings["seed"], getattr(torch, settings["dtype"])
    assert dtype == torch.float32 or not setup.startswith("zero"), "DeepSpeed trains float32 copies of the weights"
    model = build_model(settings["model"], settings["head"], dtype, seed, **settings["changes"])
    freeze(model, settings["frozen"])
    examples = build_examples(model, settings["steps"] * GLOBAL_BATCH, seed)
    if settings["lora"] is not None:
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(**settings["lora"])).to(dtype)
    accumulation = settings["arguments"].get("gradient_accumulation_steps", 1)
    if settings["leave_behind"]:
        hf_spp.training.moves_along = lambda *_: {}
    if settings["callback"] is not None:
        options = dict(settings["callback"])
        callbacks = (*callbacks, SPPCallback(SPPConfig(**options.pop("config", {})), **options))
    arguments = {
        "max_steps": settings["steps"],
        "per_device_train_batch_size": GLOBAL_BATCH // (WORLD_SIZES[setup] * accumulation),
        "train_sampling_strategy": "sequential",
        "optim": settings["optim"],
        "learning_rate": 1e-3,
        "seed": seed,
        # Otherwise the loss of some models, BERT's among them, grows with the number of ranks.
        "average_tokens_across_devices": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **setup_arguments(setup, model),
        **settings["arguments"],
    }
    return RecordingTrainer(
        model,
        TrainingArguments(settings["output_dir"], **arguments),
        train_dataset=examples,
        eval_dataset=examples[:GLOBAL_BATCH],
        callbacks=list(callbacks),
    )


def freeze(model: nn.Module, pattern: str | None) -> None:
    names = [name for name, _ in model.named_parameters() if pattern and re.search(pattern, name)]
    assert names or not pattern, f"no parameter matches {pattern}"
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def build_examples(model: PreTrainedModel, count: int, seed: int) -> list[dict[str, Tensor]]:
    inputs = build_inputs(model, count, seed=seed)
    return [{name: values[i] for name, values in inputs.items()} for i in range(count)]


def setup_arguments(setup: str, model: nn.Module) -> dict[str, Any]:
    """TrainingArguments of a set-up; what Accelerate would not find out by itself on CPU is set here."""
    if setup in ("plain", "ddp"):
        return {}
    configured = {"accelerator_config": {"use_configured_state": True}}
    if setup == "fsdp2":
        # Accelerate shards only for the device types of a list that CPU is not in; otherwise it falls back to DDP.
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        # By default it shards a ViT's embeddings and then, once more, the patch embeddings inside of them, and fails.
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        layers = sorted({type(layer).__name__ for entries in lists for layer in entries})
        sharding = {"version": 2, "transformer_layer_cls_to_wrap": layers, "reshard_after_forward": True}
        return {**configured, "fsdp": True, "fsdp_config": sharding}
    import deepspeed

    # On CPU it would compile this one; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Without a backend's name Accelerate takes every process for the only one.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {**configured, "deepspeed": deepspeed_config(int(setup[-1]))}


def deepspeed_config(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # A parameter below the threshold stays whole; in a tiny model that would be every one.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        **dict.fromkeys(automatic, "auto"),
    }


def check_setup(trainer: Trainer, setup: str) -> dict[str, Any]:
    """Assert that a trained model was really sharded as its set-up says, and return the evidence."""
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    assert world_size == trainer.args.world_size == WORLD_SIZES[setup], f"{setup} ran in {world_size} processes"
    wrapped = trainer.model_wrapped
    evidence: dict[str, Any] = {"world_size": world_size, "wrapper": type(wrapped).__name__}
    if setup == "ddp":
        assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    elif setup == "fsdp2":
        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                # A forward outside of training leaves some weights whole.
                module.reshard()
        evidence["dtensor"] = all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
        assert evidence["dtensor"]
        held = sum(parameter.to_local().numel() for parameter in wrapped.parameters())
        assert held < sum(parameter.numel() for parameter in wrapped.parameters())
    elif setup.startswith("zero"):
        evidence["zero_stage"] = wrapped.zero_optimization_stage()
        assert evidence["zero_stage"] == int(setup[-1])
        if setup == "zero3":
            assert not any(parameter.ds_persist for parameter in wrapped.parameters())
            assert all(parameter.ds_tensor.numel() < parameter.ds_numel for parameter in wrapped.parameters())
    return evidence


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    # Gloo's threads can abort a process while its interpreter is torn down (pytorch/pytorch#190489).
    sys.stdout.flush()
    os._exit(0)
