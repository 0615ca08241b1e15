"""Which settings bring a recipe under a GPU's memory, cheapest first, and what is faster with room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crd_fast.config import Recipe, build_recipe
from crd_fast.errors import UserError
from crd_fast.models import check_builtin
from crd_fast.models.checkpointing import recomputed_blocks
from crd_fast.models.pipeline import encodes_on_gpu
from crd_fast.plan.gpus import GIB
from crd_fast.plan.planner import Plan, Planner
from crd_fast.train.micro_batch import AUTO_MICRO_BATCH
from crd_fast.worlds import WORLDS

# What a GPU holds beside our tensors: the driver's context, cuBLAS and cuDNN, fragments. A guess.
RESERVED = 3 * GIB // 4
# By what they cost: seconds, rounding of the moments, copies to the device, rounding of trained weights,
# another method, and of that, which alone has frozen weights, their rounding and many seconds.
SAVINGS = (
    "train.checkpointing=true",
    "train.optimizer=adamw8bit",
    "model.snapshots=host",
    "model.dtype=bf16",
    "model.method=lora",
    "model.quantization=int8",
    "model.quantization=nf4",
    "model.streaming=true",
)
OF_LORA = ("model.dtype=default", "model.snapshots=device")  # it has no other values of these

TILES = "model.vae_tiling=always"  # where only whole pictures do not fit


@dataclass
class Fit:
    """A recipe that was made to fit, or the nearest to it: overrides on top of it, and its plan."""

    overrides: list[str]
    plan: Plan
    memory: int

    @property
    def phase(self) -> str:
        """The phase that needs most on the GPU."""
        phases = {name: peak.bytes for name, peak in self.plan.phases.items()}
        if "encode" in phases and not self.encodes_on_gpu:
            del phases["encode"]
        return max(phases, key=lambda name: phases[name])

    @property
    def encodes_on_gpu(self) -> bool:
        """Text encoders that do not fit work on the host."""
        encode = self.plan.phases.get("encode")
        if encode is None:
            return True
        taken = RESERVED + encode.parts.get("rewards", 0)  # these are there before
        return encodes_on_gpu(encode.parts["text encoders"], self.memory - taken)

    @property
    def needed(self) -> int:
        """Bytes of GPU memory, with what the driver takes."""
        return self.plan.phases[self.phase].bytes + RESERVED

    @property
    def missing(self) -> int:
        return max(self.needed - self.memory, 0)


def fit(recipe: Recipe, memory: int, savings: tuple[str, ...] = SAVINGS) -> Iterator[Fit]:
    """The recipe at the micro-batches that fit, and on from there with one saving after the other.

    Ends with the first that fits, or with all savings. Micro-batches that the recipe names stay where they
    do, and are 1 where they do not.
    """
    overrides: list[str] = []
    for saving in ("", *savings):
        if saving:
            tried = _with(recipe, overrides, saving)
            changed = overridden(recipe, tried)
            if changed is None or changed == overridden(recipe, overrides):
                continue
            overrides = tried
        saved = overridden(recipe, overrides)
        assert saved is not None  # it was built before
        planner, settings = Planner(saved), overrides
        found = _largest(planner, memory)
        if found.missing and found.phase == "decode":  # tiles change pictures: no later saving keeps them
            tiled = overridden(recipe, [*overrides, TILES])
            if tiled is not None and tiled != saved:
                planner.decode_in_tiles(tiled)
                in_tiles = _largest(planner, memory)
                if in_tiles.needed < found.needed:  # small pictures are one tile
                    found, settings = in_tiles, [*overrides, TILES]
        found = _faster(planner, found, memory)
        anew = {o.partition("=")[0] for o in found.overrides}
        found.overrides = [o for o in settings if o.partition("=")[0] not in anew] + found.overrides
        yield found
        if not found.missing:
            return


def _with(recipe: Recipe, overrides: list[str], saving: str) -> list[str]:
    """The overrides with one more; of one setting the last value counts."""
    changes = [saving]
    if saving == "model.method=lora":
        overrides = [o for o in overrides if not o.startswith(("model.dtype=", "model.snapshots="))]
        changes += [change for change in OF_LORA if overridden(recipe, [change]) != recipe]
    key = saving.partition("=")[0]
    return [*(o for o in overrides if o.partition("=")[0] != key), *changes]


def _faster(planner: Planner, found: Fit, memory: int) -> Fit:
    """With as few checkpointed blocks as there is room for at the smallest micro-batches of whole groups.

    Larger micro-batches compute nothing less, and blocks that are not checkpointed do.
    """
    recipe = planner.recipe
    none = overridden(recipe, ["train.checkpointing=false"])
    if found.missing or recipe.train.checkpointing != 1 or none is None:
        return found
    if recipe.train.kept_graphs == "host":  # where all activations would go then
        return found
    without = Planner(none)
    other = _largest(without, memory)
    if not other.missing and sum(other.plan.flops.values()) < sum(found.plan.flops.values()):
        other.overrides.insert(0, "train.checkpointing=false")
        return other
    if found.plan.kept_graphs != "none":
        return found
    group, rollout = recipe.rollout.samples_per_prompt, found.plan.rollout_micro_batch
    update, whole = found.plan.micro_batch, found.plan
    if recipe.train.micro_batch == "auto" and update > group:
        update = group
        whole = planner.plan(update, rollout)
    blocks, peak = len(recomputed_blocks(without.network, 1)), whole.phases["update"].bytes
    each = (without.plan(update, rollout).phases["update"].bytes - peak) // max(blocks - 1, 1)
    kept = min(1 + (memory - RESERVED - peak) // max(each, 1), blocks - 1)
    for count in range(kept, 0, -1):
        override = f"train.checkpointing={1 - count / blocks:.2f}"
        fewer = overridden(
            recipe, [override, f"train.micro_batch={update}", f"rollout.micro_batch={rollout}"]
        )
        assert fewer is not None  # as without checkpointing
        plan = Planner(fewer).plan()
        sizes = [o for o in found.overrides if not o.startswith("train.micro_batch=")]
        if update != recipe.train.micro_batch:
            sizes.insert(0, f"train.micro_batch={update}")
        result = Fit([override, *sizes], plan, memory)
        if not result.missing:
            return result
    return found


def overridden(recipe: Recipe, overrides: list[str]) -> Recipe | None:
    """None if the overrides contradict the rest of the recipe."""
    try:
        changed = build_recipe(recipe.model_dump(), overrides)
        if changed.model.path in WORLDS:
            check_builtin(changed)
    except UserError:
        return None
    return changed


def _largest(planner: Planner, memory: int) -> Fit:
    """The largest micro-batches that fit, and if none does 1."""
    recipe = planner.recipe

    def at(update: int, rollout: int) -> Fit:
        return Fit([], planner.plan(update, rollout), memory)

    named = recipe.train.micro_batch, recipe.rollout.micro_batch
    if named[0] != "auto" and named[1] != "auto" and planner.live.total + RESERVED <= memory:
        found = at(named[0], named[1])
        if not found.missing:
            return _kept(planner, found, memory)
    one = at(1, 1)
    update = rollout = 1
    if not one.missing:
        two, room = at(2, 2), memory - RESERVED
        update = _affine(one.plan, two.plan, ("measure", "update"), room)
        rollout = _affine(one.plan, two.plan, ("rollout", "decode"), room)
    group = recipe.rollout.samples_per_prompt
    whole = max(AUTO_MICRO_BATCH // group * group, group)
    update = min(update, whole) // group * group if update >= group else update
    update = min(update, *(n for n in named[:1] if n != "auto"), whole)
    rollout = min(rollout, *(n for n in named[1:] if n != "auto"), AUTO_MICRO_BATCH)
    found = one if update == rollout == 1 else at(update, rollout)
    while found.missing and (update > 1 or rollout > 1):  # the estimate was too high
        if found.phase in ("rollout", "decode") and rollout > 1:
            rollout = rollout * 4 // 5 if rollout > 4 else rollout - 1
        else:
            update = update - group if update > group else max(update * 4 // 5, 1)
        found = at(update, rollout)
    if update != named[0]:
        found.overrides.append(f"train.micro_batch={update}")
    if rollout != named[1]:
        found.overrides.append(f"rollout.micro_batch={rollout}")
    return found if found.missing else _kept(planner, found, memory)


def _kept(planner: Planner, found: Fit, memory: int) -> Fit:
    """The graphs of a split group's micro-batches are kept where there is room: a forward less.

    On the host only where they are the inputs of checkpointed blocks, and not all activations.
    """
    train = planner.recipe.train
    if found.plan.rows.get("policy") and train.backward_fraction == 1 and train.kept_graphs == "none":
        for where in ("device", "host") if train.checkpointing == 1 else ("device",):
            plan = planner.plan(found.plan.micro_batch, found.plan.rollout_micro_batch, where)
            kept = Fit([*found.overrides, f"train.kept_graphs={where}"], plan, memory)
            if not kept.missing:
                return kept
    return found


def _affine(one: Plan, two: Plan, phases: tuple[str, ...], room: int) -> int:
    """The largest micro-batch by the straight line through the peaks at 1 and 2."""
    sizes = []
    for name in phases:
        first, second = one.phases[name].bytes, two.phases[name].bytes
        sizes.append(1 + (room - first) // max(second - first, 1))
    return max(min(sizes), 1)


def verdict(found: Fit) -> str:
    """One line: whether it fits, in which phase it needs most, and with which settings."""
    settings = " ".join(f"--set {override}" for override in found.overrides) or "as it is"
    fits = f"{found.missing / GIB:.1f} GB too much" if found.missing else "fits"
    note = "" if found.encodes_on_gpu else "; the text encoders do not fit and work on the host"
    return f"{found.needed / GIB:.1f} GB in {found.phase}, {fits}: {settings}{note}"


def for_training(recipe: Recipe, memory: int) -> Recipe:
    """The recipe at the micro-batches that fit. Raises UserError, one line, where none does."""
    tried = list(fit(recipe, memory))
    first, last = tried[0], tried[-1]
    if not first.missing:
        return build_recipe(recipe.model_dump(), first.overrides)
    settings = " ".join(f"--set {override}" for override in last.overrides)
    outcome = "nearest" if last.missing else "it fits"
    raise UserError(
        f"--gpu-memory {memory / GIB:g}GB: the plan needs {first.needed / GIB:.1f} GB at micro-batch 1 "
        f"(phase {first.phase}), {first.missing / GIB:.1f} GB too much; {outcome} with {settings}: "
        f"{last.needed / GIB:.1f} GB"
    )
