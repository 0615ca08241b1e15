"""bitsandbytes' paged optimizer, paged after a resume too.

Its moments are in memory that the driver moves between host and device. What is loaded would be put on the
device as ordinary tensors, and a run that fitted before it was stopped would not fit after it.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch

MOMENTS = ("state1", "state2")


class Repaging(bnb.optim.optimizer.Optimizer2State):
    """Loads moments into paged memory, whole ones never being on the device."""

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict, move_to_device: bool = True) -> None:
        super().load_state_dict(state_dict, move_to_device=False)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if name in MOMENTS:
                    state[name] = self.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
                elif isinstance(value, torch.Tensor) and move_to_device:
                    state[name] = value.to(parameter.device)


class PagedAdamW8bit(Repaging, bnb.optim.PagedAdamW8bit):
    pass
