"""A micro-batch of the update."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from crd_fast.train.pairs import Pairs


@dataclass
class Chunk:
    """One micro-batch: what its forwards need and, once they have run, the frozen predictions.

    Not the embeddings of its prompts, which are larger than its latents: they are chosen at each forward.
    """

    pairs: Pairs
    x0: torch.Tensor
    noise: torch.Tensor
    x: torch.Tensor
    old: torch.Tensor | None = None
    ref_cond: torch.Tensor | None = None
    ref_uncond: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index) -> Chunk:
        def at(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[index]

        given = self.pairs[index], self.x0[index], self.noise[index], self.x[index]
        return Chunk(*given, at(self.old), at(self.ref_cond), at(self.ref_uncond))

    def forget(self) -> None:
        """What was predicted for it is not needed any more."""
        self.old = self.ref_cond = self.ref_uncond = None

    @staticmethod
    def joined(chunks: list[Chunk]) -> Chunk:
        """Where some have no reference, which is where no anchor has a weight, any finite one will do."""
        found = {}
        for name in (f.name for f in fields(Chunk) if f.name != "pairs"):
            values = [getattr(chunk, name) for chunk in chunks]
            some = next((value for value in values if value is not None), None)
            if some is not None:
                found[name] = torch.cat(
                    [
                        chunk.x.to(some.dtype) if value is None else value
                        for chunk, value in zip(chunks, values)
                    ]
                )
        return Chunk(Pairs.cat([chunk.pairs for chunk in chunks]), **found)

    def split(self, size: int) -> list[Chunk]:
        return [self[i : i + size] for i in range(0, len(self), size)]
