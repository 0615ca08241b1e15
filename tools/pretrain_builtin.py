"""Pretrains the built-in model by flow matching on the synthetic world, from a seed, resumably.

    python -m tools.pretrain_builtin --output runs/pretrain            # all stages; run again to resume
    python -m tools.pretrain_builtin --output runs/pretrain --export   # write crd_fast/builtin

Two stages. In the first the model learns every category from true captions. In the second, a share of the
captions is exchanged for another of the same category, the way web captions make large models unreliable:
the model still knows how to follow a prompt (guidance shows it) but does so only sometimes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from crd_fast import world
from crd_fast.models import builtin
from crd_fast.rewards.geneval import judge
from crd_fast.rewards.world_detector import detect

BATCH = 64
CATEGORY_WEIGHTS = np.array([1.0, 1.5, 1.5, 1.0, 2.5, 2.5])  # in the order of world.TAGS
CATEGORY_WEIGHTS /= CATEGORY_WEIGHTS.sum()
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
STAGES = {  # steps, caption noise, peak learning rate, share of the steps over which it falls to 0
    "learn": {"steps": 4000, "caption_noise": 0.0, "learning_rate": 1.5e-3, "decay_share": 0.5},
    "unlearn": {"steps": 600, "caption_noise": 0.5, "learning_rate": 3e-4, "decay_share": 1.0},
}


def batch_at(step: int, seed: int, caption_noise: float) -> tuple[torch.Tensor, list[str]]:
    """Images (64, 3, 32, 32) in [-1, 1] and their captions; a function of the seed and the step alone."""
    rng = np.random.default_rng((seed, step))
    by_tag = world.prompts(held_out=False)
    tags = rng.choice(len(world.TAGS), size=BATCH, p=CATEGORY_WEIGHTS)
    entries = [by_tag[world.TAGS[tag]][rng.integers(len(by_tag[world.TAGS[tag]]))] for tag in tags]
    images = world.render_scenes([world.scene(entry, rng) for entry in entries])
    captions = []
    for entry in entries:
        if rng.random() < CAPTION_DROPOUT:
            captions.append("")
        elif rng.random() < caption_noise:
            captions.append(by_tag[entry["tag"]][rng.integers(len(by_tag[entry["tag"]]))]["prompt"])
        else:
            captions.append(entry["prompt"])
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, captions


def new_model(seed: int) -> builtin.BuiltinModel:
    torch.manual_seed(seed)
    tokenizer = builtin.make_tokenizer()
    text_encoder = builtin.make_text_encoder(tokenizer.get_vocab_size())
    return builtin.BuiltinModel(builtin.make_transformer(), text_encoder, tokenizer)


def flow_matching_loss(model, images, captions, generator) -> torch.Tensor:
    """Mean squared error of the velocity, sigma = sigmoid(N(0.5, 1))."""
    noise = torch.randn(images.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(len(images), generator=generator) + 0.5)
    x = torch.lerp(images, noise, sigma.view(-1, 1, 1, 1))
    embeddings = builtin.encode(model.tokenizer, model.text_encoder, captions)
    return (model.velocity(x, sigma, embeddings) - (noise - images)).square().mean()


@torch.no_grad()
def sample(model, prompts: list[str], guidance_scale: float, steps: int = 10, seed: int = 0) -> torch.Tensor:
    """Euler on the model's own schedule; images (B, 32, 32, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), *model.latent_shape(world.RESOLUTION), generator=generator)
    sigmas = model.sigmas(steps)
    conditional, empty = model.encode_prompts(prompts), model.encode_prompts([""] * len(prompts))
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
        velocity = model.velocity(x, sigma.expand(len(x)), conditional)
        if guidance_scale > 1:
            unconditional = model.velocity(x, sigma.expand(len(x)), empty)
            velocity = torch.lerp(unconditional, velocity, guidance_scale)
        x = x + (next_sigma - sigma) * velocity
    return model.decode(x)


def correctness(model, entries: list[dict], guidance_scale: float) -> dict[str, float]:
    """Share of correct images by category, overall (mean of the categories), and clean."""
    images = sample(model, [entry["prompt"] for entry in entries], guidance_scale).numpy()
    judged = [judge(detect(image), entry) for image, entry in zip(images, entries)]
    by_tag = {
        tag: float(np.mean([j.correct for j, e in zip(judged, entries) if e["tag"] == tag])) for tag in world.TAGS
    }
    return by_tag | {
        "overall": float(np.mean(list(by_tag.values()))),
        "clean": float(np.mean([j.clean for j in judged])),
    }


class Pretraining:
    """Model, averaged weights and optimizer, and where in which stage they are."""

    def __init__(self, output: Path, seed: int):
        self.output, self.seed = output, seed
        self.model = new_model(seed)
        self.modules = torch.nn.ModuleList([self.model.transformer, self.model.text_encoder])
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        self.ema = [p.detach().clone() for p in self.modules.parameters()]
        self.step = 0

    def run(self, limit: int | None = None) -> None:
        first = 0
        for name, stage in STAGES.items():
            for step in range(max(first, self.step), first + stage["steps"]):
                self._train_step(step, stage, (step - first) / stage["steps"])
                self.step = step + 1
                if self.step % 100 == 0:
                    self._log(name)
                if self.step % 250 == 0:
                    self.save()
                if limit is not None and self.step >= limit:
                    return
            first += stage["steps"]
            if self.step == first:
                self.save(f"{name}.pt")

    def _train_step(self, step: int, stage: dict, progress: float) -> None:
        warmup = min(1.0, (step + 1) / 200)
        decay = min(1.0, (1 - progress) / stage["decay_share"])
        for group in self.optimizer.param_groups:
            group["lr"] = stage["learning_rate"] * warmup * decay
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        images, captions = batch_at(step, self.seed, stage["caption_noise"])
        loss = flow_matching_loss(self.model, images, captions, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        weight = max(1 - EMA_DECAY, 1 / (step + 1) ** 0.8)
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.modules.parameters()], weight)
        self.loss = 0.98 * getattr(self, "loss", loss.item()) + 0.02 * loss.item()

    def _log(self, stage: str) -> None:
        record = {"step": self.step, "stage": stage, "loss": round(self.loss, 5), "time": round(time.time(), 1)}
        if self.step % 500 == 0:
            with self.averaged():
                for scale in (1.0, 4.5):
                    record[f"guidance_{scale}"] = correctness(self.model, world.draw_prompts(True, np.random.default_rng(0), 192), scale)
        with open(self.output / "curve.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def averaged(self):
        """Within this context the model holds the averaged weights."""
        return _Swapped(list(self.modules.parameters()), self.ema)

    def save(self, name: str = "last.pt") -> None:
        state = {
            "step": self.step,
            "loss": self.loss,
            "modules": self.modules.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.output / "partial.pt")
        (self.output / "partial.pt").replace(self.output / name)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step, self.loss, self.ema = state["step"], state["loss"], state["ema"]
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Swapped:
    def __init__(self, parameters, others):
        self.parameters, self.others = parameters, others

    def __enter__(self):
        for parameter, other in zip(self.parameters, self.others):
            parameter.data, other.data = other.data, parameter.data

    def __exit__(self, *_):
        self.__enter__()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="stop after this many steps in all")
    parser.add_argument("--start", type=Path, help="a checkpoint to start from instead of the folder's last")
    parser.add_argument("--export", action="store_true", help="write the averaged weights into crd_fast/builtin")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pretraining = Pretraining(options.output, options.seed)
    last = options.start or options.output / "last.pt"
    if last.exists():
        pretraining.load(last)
    pretraining.run(options.limit)
    if options.export:
        with pretraining.averaged():
            pretraining.model.save(builtin.BUILTIN_FOLDER)


if __name__ == "__main__":
    main()
