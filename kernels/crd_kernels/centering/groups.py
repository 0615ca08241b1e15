"""Sums over groups given by arbitrary integer ids: ragged, in any order, deterministic, no host sync.

One stable sort, then every group is a run of neighbours: O(B log B), and the sums are added in the samples'
order. NaN in one group stays in that group.
"""

import torch


class Groups:
    """The groups of `group`, (B,) integers. Values are (R, B): R rows at once."""

    def __init__(self, group: torch.Tensor):
        self.order = torch.argsort(group, stable=True)
        ids = group[self.order]
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[1:] = ids[1:] != ids[:-1]
        numbers = begins.cumsum(0) - 1  # of the sorted samples: 0, 1, ... in ascending order of ids
        places = torch.arange(len(group), device=group.device)
        ends = torch.searchsorted(numbers, places, right=True)  # as many groups as samples, the rest empty
        self.lengths = ends - torch.searchsorted(numbers, places)
        self.number = torch.empty_like(numbers).scatter_(0, self.order, numbers)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """out[:, i] = sum of values[:, j] over all j in i's group."""
        return self._reduce(values, "sum")

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """out[:, i] = max of values[:, j] over all j in i's group."""
        return self._reduce(values, "max")

    def means(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Means of values[:, j] over i's group, weighted by weights, (B,)."""
        sums = self.sum(torch.cat([weights * values, weights[None]]))
        return sums[:-1] / sums[-1]

    def softmax_weights(self, a: torch.Tensor, temperature: float) -> torch.Tensor:
        """exp((a_j - max_g a) / T) for T > 0, 1 at each group's largest entry."""
        return ((a - self.max(a[None])[0]) / temperature).exp()

    def selected_weights(self, a: torch.Tensor) -> torch.Tensor:
        """exp(a_j - max_g a) where a_j > 0 and else 0; 1 in a group without a positive entry."""
        top = self.max(a[None])[0]
        return torch.where(a > 0, (a - top).exp(), (~(top > 0)).to(a.dtype))

    def _reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        runs = values[:, self.order].T.contiguous()
        reduced = torch.segment_reduce(runs, how, lengths=self.lengths, axis=0, unsafe=True)
        return reduced.T[:, self.number]
