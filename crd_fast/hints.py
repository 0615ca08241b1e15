"""What settings of other trainers are called here."""

from __future__ import annotations

_PICTURES = (
    "rollout.prompts_per_iteration and rollout.samples_per_prompt say how many pictures an iteration has, "
    "train.micro_batch how many are in memory at once"
)
_STEPS = "train.iterations, each with train.steps_per_iteration optimizer steps"
_LOGS = "train.trackers, like [tensorboard, wandb]; metrics.jsonl is written anyway"
_LORA = "model.init_lora"
_SQUARE = "rollout.resolution and evaluate.resolution, a side in pixels or [height, width]"

# A name, in small letters with underscores: what serves here.
MEANINGS = {
    "lr": "train.learning_rate",
    "unet_lr": "train.learning_rate",
    "lr_scheduler": "nothing: train.learning_rate stays as it is",
    "lr_scheduler_type": "nothing: train.learning_rate stays as it is",
    "warmup_steps": "nothing: train.learning_rate stays as it is",
    "lr_warmup_steps": "nothing: train.learning_rate stays as it is",
    "batch_size": _PICTURES,
    "train_batch_size": _PICTURES,
    "per_device_train_batch_size": _PICTURES,
    "gradient_accumulation_steps": "nothing to set: gradients add up to the same at any train.micro_batch; "
    "train.steps_per_iteration says how many optimizer steps an iteration has",
    "max_steps": _STEPS,
    "max_train_steps": _STEPS,
    "num_train_steps": _STEPS,
    "steps": _STEPS,
    "epochs": _STEPS,
    "num_epochs": _STEPS,
    "num_train_epochs": _STEPS,
    "rank": "model.lora_rank",
    "r": "model.lora_rank",
    "lora_r": "model.lora_rank",
    "network_dim": "model.lora_rank",
    "alpha": "model.lora_alpha",
    "network_alpha": "model.lora_alpha",
    "target_modules": "model.lora_targets",
    "lora_target_modules": "model.lora_targets",
    "lora_path": _LORA,
    "init_lora": _LORA,
    "lora_weights": _LORA,
    "pretrained_model_name_or_path": "model.path",
    "model_name": "model.path",
    "model_id": "model.path",
    "load_in_4bit": "model.quantization: nf4",
    "load_in_8bit": "model.quantization: int8",
    "gradient_checkpointing": "train.checkpointing",
    "mixed_precision": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision: bf16",
    "report_to": _LOGS,
    "log_with": _LOGS,
    "logging_dir": _LOGS,
    "wandb": _LOGS,
    "output_dir": "`crd-fast train --output FOLDER`",
    "resume_from_checkpoint": "`crd-fast train --resume RUN`",
    "save_steps": "checkpoint.every, in iterations",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluate.every, in iterations",
    "num_generations": "rollout.samples_per_prompt",
    "group_size": "rollout.samples_per_prompt",
    "num_inference_steps": "rollout.steps, and evaluate.steps for evaluations",
    "cfg_scale": "rollout.guidance_scale, loss.guidance_scale of the anchor, evaluate.guidance_scale",
    "kl_coef": "loss.kl_beta",
    "resolution": _SQUARE,
    "height": _SQUARE,
    "width": _SQUARE,
    "size": _SQUARE,
    "dataset": "rollout.prompts",
    "prompt_file": "rollout.prompts",
    "reward": "rewards",
    "judges": "eval_rewards",
    "ema_decay": "snapshots.ema, with evaluate.weights: ema",
    "use_ema": "snapshots.ema, with evaluate.weights: ema",
}


def by_meaning(key: str, sections: dict[str, list[str]]) -> str:
    """`; here that is train.learning_rate` for `lr`; for a key of another section, which one; else nothing.

    sections: the keys of each.
    """
    name = key.lower().replace("-", "_")
    found = MEANINGS.get(name) or " or ".join(
        f"{section}.{name}" for section, keys in sections.items() if name in keys
    )
    if not found and name in sections:
        found = f"the section {name}"
    return f"; here that is {found}" if found else ""
