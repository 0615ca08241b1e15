"""A real run of what a plan predicts, with its live bytes counted."""

import pytest
import torch

from crd_fast.config import build_recipe
from crd_fast.models import load_model
from crd_fast.plan.cuda_autocast import cuda_autocast
from crd_fast.plan.live_bytes import LiveBytes, tensors_of
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.pairs import Pairs
from crd_fast.train.rollout import Sampling, generate
from crd_fast.train.update import Updater
from crd_fast.weights.make import make_optimizer, make_weights
from tests.models.conftest import own_cache, tiny  # noqa: F401

GROUP, PROMPTS, TOKENS = 6, 2, 24
PROMPT = "a red circle left of a blue square"  # tiny tokenizers read letters: it fills all tokens


@pytest.fixture
def recipe():
    def build(path, *overrides):
        values = {
            "model": {"path": str(path), "lora_rank": 4},
            "rollout": {"prompts_per_iteration": PROMPTS, "samples_per_prompt": GROUP, "steps": 3},
            "train": {"optimizer": "adamw"},
        }
        if str(path) != "builtin":
            values["model"]["text_length"] = TOKENS
            values["rollout"]["resolution"] = 64
        return build_recipe(values, overrides)

    return build


def pairs_of(groups):
    """Pairs of one timestep, whose samples are all of one prompt."""
    count = groups * GROUP
    prompt = torch.zeros(count, dtype=torch.int64)
    return Pairs.plain(
        sample=torch.arange(count),
        prompt=prompt,
        sigma=torch.full((count,), 0.5),
        seed=torch.arange(count),
        group=torch.arange(groups).repeat_interleave(GROUP),
        advantage=torch.linspace(-1, 1, count),
        anchor=torch.ones(count),
    )


class Real:
    """The recipe's model, weights and optimizer on real tensors, the optimizer with a step behind it."""

    def __init__(self, recipe):
        self.recipe, self.live = recipe, LiveBytes()
        self.model = load_model(recipe, [PROMPT])
        self.live.move(tensors_of(self.model.transformer), "base weights")
        self.live.release(self.model.streaming.host_tensors() if self.model.streaming else [])
        with self.live:
            self.weights = make_weights(self.model, recipe)
            if recipe.model.snapshots == "host":  # as if there were a device
                self.live.ignore(self.weights.host_tensors())
            trained = self.weights.trained()
            optimizer = make_optimizer(recipe, trained)
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            trained[0].add_(0.01)  # while the policy is equal to old, old is not run
        self.optimizer = optimizer
        self.embeddings = self.model.encode_prompts([PROMPT] * 2)
        self.empty = {key: value[:1] for key, value in self.embeddings.items()}
        self.live.add(self.embeddings)

    def generate(self, micro_batch):
        count = GROUP * PROMPTS
        with self.weights.use("sampler"):
            return generate(
                self.model,
                self.embeddings,
                torch.zeros(count, dtype=torch.int64),
                torch.arange(count),
                Sampling.of(self.recipe, self.recipe.rollout, self.empty, MicroBatch(micro_batch)),
            )

    def update(self, latents, micro_batch):
        """Two groups: the second finds the gradients of the first."""
        pairs = pairs_of(2)
        updater = Updater(
            self.model,
            self.weights,
            self.recipe.loss,
            advantage_clip=5.0,
            precision=self.recipe.train.precision,
            micro_batch=micro_batch,
            backward_fraction=self.recipe.train.backward_fraction,
            kept_graphs=self.recipe.train.kept_graphs,
            one_pass=self.recipe.model.streaming,
        )
        updater.accumulate(pairs, latents, self.embeddings, self.empty)

    def peaks(self, micro_batch):
        """Bytes of rollout and update, under the rules of the GPU that a plan is for."""
        with cuda_autocast(), self.live, self.live.in_phase("rollout"):
            latents = self.generate(micro_batch)
        with cuda_autocast(), self.live, self.live.in_phase("update"):
            self.update(latents, micro_batch)
        self.optimizer.zero_grad(set_to_none=True)
        found = {name: self.live.peaks.pop(name).bytes for name in ("rollout", "update")}
        return found
