"""What this machine can train, or the one thing to do before it can."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crd_fast.doctor.check import GIB, Check, attempt
from crd_fast.doctor.hub import GATED, has_token

# The models that recipes ship for, by the size of their transformers.
LARGEST_FIRST = (
    *("qwen-image", "flux.1-dev", "sd3.5-large", "z-image", "flux.2-klein-4b", "sd3.5-medium", "sana-1.6b"),
)
BUILTIN = "builtin"


@dataclass(frozen=True)
class Gpu:
    """What the recipes ask of a GPU. memory: bytes that the device shows."""

    name: str
    memory: int
    bfloat16: bool

    @property
    def gigabytes(self) -> int:
        """As it is sold: a device shows less, as some is the driver's or holds checksums."""
        return math.ceil(self.memory / GIB)


def gpu_here() -> Gpu | None:
    """The one that a run would use; None where there is none or it does not answer."""
    torch, _ = attempt("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    try:
        properties = torch.cuda.get_device_properties(0)
    except RuntimeError:
        return None
    return Gpu(properties.name, properties.total_memory, (properties.major, properties.minor) >= (8, 0))


def outlook(found: list[Check], gpu: Gpu | None) -> list[str]:
    """The last lines of the doctor: what can be trained and by which command, or the one thing to do.

    found: the checks; what is missing comes first, then a GPU that torch cannot use.
    """
    blocking = [check for check in found if check.status == "missing"]
    blocking += [check for check in found if check.name == "GPU" and check.status == "warning"]
    if blocking:
        return [f"One thing to do: {blocking[0].note}"]
    fitting = recipes_for(gpu.gigabytes) if gpu and gpu.bfloat16 else []
    if gpu is None or not fitting:
        return _builtin(gpu)
    best = fitting[0]
    lines = [
        f"You can train {best.model} at {best.size} x {best.size} on {gpu.name}: crd-fast train {best.name}"
    ]
    if any(part in best.path for part in GATED) and not has_token():
        page = f"https://huggingface.co/{best.path}"
        lines.append(f"One thing to do: accept the licence at {page}, then hf auth login")
    if len(fitting) > 1:
        also = ", ".join(f"{one.name} ({one.size} x {one.size})" for one in fitting[1:])
        lines.append(f"Also: {also}")
    return [*lines, f"What it takes, before anything is downloaded: crd-fast plan {best.name} --gpu CARD"]


@dataclass(frozen=True)
class Fitting:
    """A recipe that ships. path: of the pipeline on the hub; size: of its pictures, which are square."""

    model: str
    name: str
    path: str
    size: int


def recipes_for(gigabytes: int) -> list[Fitting]:
    """For each model the recipe for the largest card that has no more memory; the best recipe first.

    Without streamed blocks first, then larger pictures, then the larger model.
    """
    from crd_fast.config import load_recipe, recipes_by_model  # here: it works where pydantic is missing
    from crd_fast.sizes import height_width

    found, by_model = [], recipes_by_model()
    for model in LARGEST_FIRST:
        sizes = [size for size in by_model[model] if size <= gigabytes]
        if sizes:
            name = by_model[model][max(sizes)]
            recipe = load_recipe(name)
            one = Fitting(model, name, recipe.model.path, max(height_width(recipe.rollout.sizes[0])))
            found.append(((recipe.model.streaming, -one.size), one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _builtin(gpu: Gpu | None) -> list[str]:
    from crd_fast.config import load_recipe, recipes_by_model

    size = load_recipe(BUILTIN).rollout.resolution
    where = "the CPU" if gpu is None else gpu.name
    smallest = min(min(sizes) for sizes in recipes_by_model().values())
    wanted = f"a GPU of {smallest} GB or more"
    if gpu is not None and not gpu.bfloat16:
        wanted = "a GPU with bfloat16, which this one lacks"
    return [
        f"You can train {BUILTIN} at {size} x {size} on {where}, in minutes: crd-fast train",
        f"The other recipes want {wanted}: crd-fast recipes",
    ]
