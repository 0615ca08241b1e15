"""The update of one iteration by this trainer and by the public one, taking turns.

    python -m benchmarks.compare_trainer CHECKOUT

CHECKOUT: of Flow-Factory, whose CRD trainer is compared (public_trainer.py). Equal math: one small Stable
Diffusion 3 of the real classes, fp32, with the same base and adapters, old and policy unlike; the same 4
prompts x 8 samples x timesteps, two by default, each with the forwards of old, of the policy and of the
guided reference, the loss, the backward pass; one step of AdamW; both with activation checkpointing or both
without. The public trainer centers over its micro-batch. At the group's size that is the same, and
gradients must agree to rounding before anything is timed. Below, it computes something else, at 1 no policy
gradient at all, by as many forwards as this trainer has where it keeps graphs. In the last cases this
trainer has `train.compile`, which the public one has no setting for. `bare` are these forwards and backward
passes of the network and nothing else: no loss, no noise.

CPU seconds. Two take turns (crd_turns.py); what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure_iteration, public_trainer
from crd_fast.config import build_recipe
from crd_fast.models import compile_blocks, load_model
from crd_fast.ranks import Ranks
from crd_fast.run.machine import cpu_name, git_commit
from crd_fast.seeds import seeded_noise
from crd_fast.train.forwards import doubled_velocity
from crd_fast.train.pairs import draw_pairs
from crd_fast.train.update import Updater
from crd_fast.weights.make import make_optimizer, make_weights

sys.path.insert(0, str(Path(__file__).parent))

from crd_turns import CLOCKS, Spread, ratio, stopwatch, take_turns

RESULT = Path(__file__).parent / "results" / "compare-trainer.json"
PROMPTS = measure_iteration.PROMPTS
CLOSE = 1e-4  # of the gradient's norm, in fp32
GROUP = 8
# checkpointing, micro-batch, rounds against bare forwards, ours compiled
CASES = [
    (False, GROUP, 5, False),
    (False, 2, 0, False),
    (False, 1, 0, False),
    (True, GROUP, 0, False),
    (True, 1, 0, False),
    (False, GROUP, 0, True),
    (False, 1, 0, True),
    (True, GROUP, 0, True),
]


class Case:
    """Both trainers at one micro-batch, on the same inputs."""

    def __init__(
        self, checkout: Path, root: Path, checkpointing: bool, micro_batch: int, steps: int, compiled: bool
    ):
        values = measure_iteration.recipe_of(root / "sd3").model_dump()
        values["rollout"]["steps"] = steps
        values["train"] |= {
            "micro_batch": micro_batch,
            "checkpointing": checkpointing,
            "kept_graphs": "none" if micro_batch == GROUP else "device",
            "steps_per_iteration": 1,
            "compile": compiled,
        }
        self.recipe = recipe = build_recipe(values)
        self.model = load_model(recipe, PROMPTS)
        self.weights: Any = make_weights(self.model, recipe)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it would go on uncompiled
            compile_blocks(self.model.transformer)
        self._scatter()
        self.ranks, self.optimizer = Ranks(), make_optimizer(recipe, self.weights.trained())
        self.updater = Updater(
            self.model,
            self.weights,
            recipe.loss,
            advantage_clip=recipe.advantage.clip,
            precision="fp32",
            micro_batch=micro_batch,
            kept_graphs=recipe.train.kept_graphs,
        )
        size, count = recipe.rollout.resolution, len(PROMPTS) * recipe.rollout.samples_per_prompt
        random = torch.Generator().manual_seed(1)
        self.latents = torch.randn(count, *self.model.latent_shape(size), generator=random)
        self.advantage_PK = torch.randn(len(PROMPTS), count // len(PROMPTS), generator=random).numpy()
        self.embeddings, self.empty = self.model.encode_prompts(PROMPTS), self.model.encode_prompts([""])
        self.sigmas, self.steps = self.model.sigmas(recipe.rollout.steps, size), recipe.training_steps()
        timesteps = [1000 * float(self.sigmas[step]) for step in self.steps]
        self.public = public_trainer.public_trainer(checkout, root / "sd3", recipe, timesteps, root)
        sets = {name: self._of(name) for name in ("policy", "old")}
        public_trainer.set_weights(self.public, **sets)
        advantage = torch.from_numpy(self.advantage_PK).flatten()
        self.samples = public_trainer.samples_of(self.latents, advantage, self.embeddings, self.empty)

    def _scatter(self) -> None:
        """Adapters as after some training: with an effect, and old unlike the policy."""
        random = torch.Generator().manual_seed(2)
        state = self.weights.state()
        for name, value in state.items():
            state[name] = 0.05 * torch.randn(value.shape, generator=random)
        self.weights.load_state(state)

    def _of(self, name: str) -> dict[str, torch.Tensor]:
        found = self.weights.state().items()
        return {key.partition("/")[2]: value for key, value in found if key.startswith(f"{name}/")}

    def pairs(self):
        strength = self.updater.objective.anchor_strength(self.advantage_PK)
        prompts = np.arange(len(PROMPTS))
        return draw_pairs(
            self.recipe,
            0,
            self.sigmas,
            prompts,
            advantage_PK=self.advantage_PK,
            anchor_strength_PK=strength,
        )

    def noise(self) -> torch.Tensor:
        """(N, T, C, h, w), as the updater draws it."""
        pairs, places = self.pairs(), {step: t for t, step in enumerate(self.steps)}
        noise = torch.empty(len(self.latents), len(self.steps), *self.latents.shape[1:])
        where = torch.tensor([places[step] for step in pairs.step.tolist()])
        noise[pairs.sample, where] = seeded_noise(pairs.seed, self.latents.shape[1:])
        return noise

    # -- what is compared --------------------------------------------------------------------------------

    def ours(self) -> None:
        self.updater.accumulate(self.pairs(), self.latents, self.embeddings, self.empty)
        self.weights.finish_gradients(self.ranks, self.recipe.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def theirs(self) -> None:
        self.public.optimize(self.samples)

    def bare(self) -> None:
        """The forwards and backward passes that the others have, micro-batch by micro-batch."""
        size = self.recipe.train.micro_batch
        everything = self.pairs()
        for start in range(0, len(everything), size):
            pairs = everything[start : start + size]
            x, sigma = self.latents[pairs.sample], pairs.sigma
            embeddings = {key: value[pairs.prompt] for key, value in self.embeddings.items()}
            with torch.no_grad():
                with self.weights.use("old"):
                    self.model.velocity(x, sigma, embeddings)
                with self.weights.use("reference"):
                    doubled_velocity(self.model, x, sigma, embeddings, self.empty)
            policy = self.model.velocity(x, sigma, embeddings)
            policy.backward(torch.ones_like(policy))
        self.optimizer.zero_grad(set_to_none=True)

    # -- whether it is what it is called -----------------------------------------------------------------

    def gradients(self, run, optimizer, parameters) -> torch.Tensor:
        """The gradient that an optimizer step is given, flat; the weights are as before afterwards."""
        found: list[torch.Tensor] = []
        before = [parameter.detach().clone() for parameter in parameters]

        def keep(*_) -> None:
            found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

        handle = optimizer.register_step_pre_hook(keep)
        run()
        handle.remove()
        for parameter, value in zip(parameters, before):
            parameter.data.copy_(value)
        assert len(found) == 1, f"expected one optimizer step, got {len(found)}"
        return found[0]

    def gradient_difference(self) -> tuple[float, float]:
        """Norm of the difference over that of ours, and the norm of theirs."""
        names = list(self._of("policy"))
        ours = self.gradients(self.ours, self.optimizer, self.weights.trained())
        own = dict(self.public.adapter.transformer.named_parameters())
        keys = [f"base_model.model.{name}".replace(".weight", ".default.weight") for name in names]
        with public_trainer.given_noise(self.noise(), self.recipe.train.micro_batch):
            theirs = self.gradients(self.theirs, self.public.optimizer.optimizer, [own[key] for key in keys])
        return float((theirs - ours).norm() / ours.norm()), float(theirs.norm())


def turns(runs: dict, rounds: int) -> dict:
    timed = take_turns(runs, rounds, stopwatch(CLOCKS["cpu"]))
    first, second = runs
    return {
        f"cpu_seconds_{first}": timed[first],
        f"cpu_seconds_{second}": timed[second],
        "median": {name: Spread.of(seconds).median for name, seconds in timed.items()},
        f"{first}_over_{second}": ratio(timed, first, second).as_dict(),
    }


def graphs() -> int:
    """That torch.compile has made, in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def measured(case: Case, rounds: int, rounds_bare: int) -> dict:
    train, before = case.recipe.train, graphs()
    difference, size = case.gradient_difference()
    if train.compile and graphs() == before:
        raise SystemExit("train.compile: no graph was compiled, nothing is timed")
    before = graphs()
    if train.micro_batch == GROUP and difference >= CLOSE:
        raise SystemExit(f"gradients differ by {difference:.2g} of their norm: nothing is timed")
    result = {
        "micro_batch": train.micro_batch,
        "checkpointing": train.checkpointing,
        "kept_graphs": train.kept_graphs,
        "compile": train.compile,
        "pairs": len(case.pairs()),
        "gradient_difference": difference,
        "public_gradient_norm": size,
        "turns": turns({"ours": case.ours, "public": case.theirs}, rounds),
    }
    if graphs() != before:
        raise SystemExit(f"train.compile: {graphs() - before} graphs were compiled while it was timed")
    if rounds_bare:
        result["floor"] = turns({"bare": case.bare, "ours": case.ours}, rounds_bare)
    return result


def commit_of(checkout: Path) -> str | None:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of Flow-Factory")
    parser.add_argument("--commit", help="of the checkout, where it is no git checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of the rollout, all of them trained")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    cases: list[dict] = []
    result = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "public_commit": options.commit or commit_of(options.checkout),
        "date": time.strftime("%Y-%m-%d"),
        "cases": cases,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        measure_iteration.pipeline(root / "sd3")
        for checkpointing, micro_batch, rounds_bare, compiled in CASES:
            case = Case(options.checkout, root, checkpointing, micro_batch, options.steps, compiled)
            cases.append(measured(case, options.rounds, rounds_bare))
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(cases[-1]), flush=True)


if __name__ == "__main__":
    main()
