"""Training weights in bfloat16: gradients in float32, updates rounded at random so that small ones count.

Half of bfloat16's unit in the last place is 0.2 to 0.4 % of a weight; a smaller step that is rounded to the
nearest is lost every time. Rounded up with the probability of what is cut off, it is right on average.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch

from crd_fast.errors import UserError
from crd_fast.seeds import seed_table
from crd_fast.weights.paged import Repaging


def widen_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """From now on `.grad` is accumulated in float32: sums of many small ones would be lost in bfloat16.

    Raises UserError where torch is too old to do so; it would pass over the attribute in silence.
    """
    for parameter in parameters:
        if not hasattr(parameter, "grad_dtype"):
            raise UserError(
                f"model.dtype: bf16 needs a torch with Tensor.grad_dtype, got {torch.__version__}"
            )
        parameter.grad_dtype = torch.float32


def rounded(wide: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16, up or down so that the mean is `wide`. Overwrites `wide`, which must be finite.

    A number that bfloat16 holds stays as it is.
    """
    cut = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    bits = wide.view(torch.int32).add_(cut).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


class _Rounding(bnb.optim.optimizer.Optimizer2State):
    """One parameter after the other as float32, updated by bitsandbytes, and back.

    What is drawn is a function of seed, step and parameter, so that a resumed run draws the same.
    """

    seed: int

    @torch.no_grad()
    def update_step(self, group, p, gindex, pindex):
        wide = torch.nn.Parameter(p.detach().float())
        wide.grad, self.state[wide] = p.grad, self.state[p]  # the same dict
        super().update_step(group, wide, gindex, pindex)
        seed = seed_table(self.seed, self.state.pop(wide)["step"], gindex, pindex, count=1)
        generator = torch.Generator(p.device).manual_seed(int(seed))
        p.copy_(rounded(wide.detach(), generator))


class RoundedAdamW(_Rounding, bnb.optim.AdamW):
    pass


class RoundedAdamW8bit(_Rounding, bnb.optim.AdamW8bit):
    pass


class RoundedPagedAdamW8bit(_Rounding, Repaging, bnb.optim.PagedAdamW8bit):
    pass


ROUNDED: dict[str, type[_Rounding]] = {  # by the names of `train.optimizer`
    "adamw": RoundedAdamW,
    "adamw8bit": RoundedAdamW8bit,
    "paged_adamw8bit": RoundedPagedAdamW8bit,
}
