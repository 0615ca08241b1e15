"""torch.compile as a baseline that cannot silently be something else.

Dynamo gives a function up after a few shapes (`recompile_limit`, 8) and runs it eagerly from then on, with
one line in the log; and a function that has seen two shapes gets a graph of varying sizes. So every case
compiles afresh, and is refused unless it ran the one graph that was made for it.
"""

import torch
from torch._inductor.compile_fx import compile_fx

EXPECTED_GRAPHS = 1  # these formulas have no graph break, and one case has one shape
COMPILED_NODE = "CompiledFunctionBackward"  # the autograd node of what AOTAutograd compiled


class NotCompiled(AssertionError):
    """What was called a compiled baseline ran something else."""


class Compiled:
    """torch.compile of `function`, with nothing left of what was compiled before. `function` is what to call.

    Another `Compiled` made later ends this one's graph; `check` sees that too.
    """

    def __init__(self, function):
        torch._dynamo.reset()
        self.graphs = 0
        self.sizes = "fixed"
        self.function = torch.compile(function, backend=self._inductor)

    def _inductor(self, graph, example_inputs):
        self.graphs += 1
        if any(isinstance(value, torch.SymInt) for value in example_inputs):
            self.sizes = "varying"
        return compile_fx(graph, example_inputs)

    def check(self, loss):
        """Raises NotCompiled unless one graph of fixed sizes was compiled, and `loss` is what it computed.

        The count alone does not tell: a call that falls back compiles nothing, and the count stays.
        """
        made_by = type(loss.grad_fn).__name__
        if (self.graphs, self.sizes, made_by) != (EXPECTED_GRAPHS, "fixed", COMPILED_NODE):
            raise NotCompiled(
                f"torch.compile: expected {EXPECTED_GRAPHS} graph of fixed sizes and {COMPILED_NODE}, "
                f"got {self.graphs} of {self.sizes} sizes and {made_by}; no speed reported"
            )
