"""What a loss returns: the loss, and what it left behind."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

from .velocity.stats import Stats


@dataclass(eq=False, repr=False)
class Output:
    """A loss and the table that it was made of, whose rows are the other tensors, made when asked for.

    A dataclass and a node of torch's trees, because data parallel wrappers look for the tensors of what a
    module returns: where they find none, nothing is trained.
    """

    loss: Tensor
    _table: Tensor  # (ROWS + OUTCOME, B)

    NAMES: ClassVar[tuple[str, ...]] = ()  # of the other tensors

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(
            cls,
            lambda output: ([output.loss, output._table], None),
            lambda tensors, _: cls(*tensors),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    @property
    def _stats(self) -> Stats:
        return Stats(self._table, 0)

    def __repr__(self) -> str:
        found = (f"{name}={getattr(self, name)!r}" for name in ("loss", *self.NAMES))
        return f"{type(self).__name__}({', '.join(found)})"
