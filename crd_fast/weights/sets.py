"""The four sets of weights of one network: policy, old, sampler, reference.

`policy` is trained; `old` and `sampler` are snapshots blended towards it; `reference` is the pretrained
network. With LoRA they are three adapters on one base, and no adapter. With full fine-tuning they are
three more copies of the weights. A recipe may ask for one more snapshot, `ema`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from crd_fast.errors import UserError

SNAPSHOTS = ("old", "sampler")


def blend(snapshot, policy, decay: float) -> None:
    """snapshot <- decay * snapshot + (1 - decay) * policy, tensor by tensor, in place."""
    if decay == 0.0:  # an exact copy, also where lerp would round
        torch._foreach_copy_(list(snapshot), list(policy))
    else:
        torch._foreach_lerp_(list(snapshot), list(policy), 1.0 - decay)


def equal(snapshot, policy) -> bool:
    """Whether two lists of tensors are equal. A snapshot in a wider dtype is what it rounds to.

    Fake tensors, of which every number is taken for 0, are not equal: a plan is of the usual step.
    """
    return all(
        bool((value.detach().to(parameter.device, parameter.dtype) == parameter.detach()).all())
        for value, parameter in zip(snapshot, policy, strict=True)
    )


def joined(sets: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of named sets, by `set/parameter`."""
    return {f"{name}/{key}": value.detach() for name, values in sets.items() for key, value in values.items()}


@torch.no_grad()
def load(sets: Mapping[str, Mapping[str, torch.Tensor]], state: dict[str, torch.Tensor]) -> None:
    """Copies `state`, as `joined` gave it, into the sets.

    Raises UserError, and copies nothing, where names or shapes differ.
    """
    own = joined(sets)
    if own.keys() != state.keys():
        name = sorted(own.keys() ^ state.keys())[0]
        which = "is wanted, and not in it" if name in own else "is in it, and not wanted"
        raise UserError(f"checkpoint: made with another model or other LoRA targets ({name} {which})")
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise UserError(
                f"checkpoint: {key}: expected shape {tuple(value.shape)}, got {tuple(state[key].shape)}"
            )
    for key, value in own.items():
        value.copy_(state[key])
