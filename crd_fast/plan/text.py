"""What a plan and a cost say, for people."""

from __future__ import annotations

from rich import box
from rich.table import Table

from crd_fast.plan.cost import Cost
from crd_fast.plan.gpus import GIB, names_with
from crd_fast.plan.planner import PARTS, Plan
from crd_fast.run.progress import duration


def table(plan: Plan, title: str) -> Table:
    """Peaks in GB (2^30 bytes) by phase and part."""
    parts = [part for part in PARTS if any(part in peak.parts for peak in plan.phases.values())]
    # no lines between: with all phases of a large model they would not fit into 80 columns
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    result.add_column("GB", no_wrap=True)
    for phase in plan.phases:
        result.add_column(phase, justify="right", no_wrap=True)
    for part in parts:
        sizes = (peak.parts.get(part, 0) for peak in plan.phases.values())
        result.add_row(part, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    result.add_section()
    result.add_row("peak", *(f"{peak.bytes / GIB:.2f}" for peak in plan.phases.values()), style="bold")
    return result


def summary(plan: Plan) -> str:
    """Forwards and FLOPs, a line each."""
    forwards = ", ".join(f"{name} {n:g}" for name, n in plan.forwards.items() if name != "rollout")
    total = sum(n for name, n in plan.forwards.items() if name != "rollout")
    flops = ", ".join(f"{name} {value / 1e15:.3g}" for name, value in plan.flops.items())
    host = f"host memory, pinned: {plan.host_bytes / GIB:.1f} GB\n" if plan.host_bytes else ""
    return (
        f"{host}parameters: {plan.parameters:,}, trained: {plan.trained:,}\n"
        f"micro-batches: {plan.micro_batch} in the update, {plan.rollout_micro_batch} in the rollout\n"
        f"forwards for each sample and timestep of the update: {total:g} ({forwards})\n"
        f"PFLOP an iteration: {sum(plan.flops.values()) / 1e15:.3g} ({flops})"
    )


def operations(flops: float) -> str:
    """Floating point operations in the unit that suits them."""
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= size:
            return f"{flops / size:.{3 if flops < 1000 * size else 4}g} {unit}"
    return f"{flops / 1e9:.3g} GFLOP"


def size_of(count: float) -> str:
    """Bytes in GB of 2^30 or MB of 2^20."""
    return f"{count / GIB:.1f} GB" if count >= GIB else f"{count / (1 << 20):.0f} MB"


def time_lines(cost: Cost) -> list[str]:
    """Seconds of an iteration and hours of the run on the card; what to say for them where none is named."""
    lines = []
    if cost.reward_seconds:
        seconds = duration(cost.reward_seconds * cost.pictures)
        lines.append(f"reward: {seconds} an iteration on one CPU thread, beside the rollout")
    if cost.evaluations:
        lines.append(
            f"evaluation: {cost.evaluated} pictures, {operations(cost.evaluation_flops)}, "
            f"{cost.evaluations} times in the run"
            + (f"; once {operations(cost.guided_base_flops)} with guidance" * bool(cost.guided_base_flops))
        )
    lines.append(f"the run: {cost.iterations} iterations, {operations(cost.flops)} with its evaluations")
    if cost.card is None:
        return lines
    return [*lines, *card_lines(cost)]


def card_lines(cost: Cost) -> list[str]:
    """An iteration and the run on the card."""
    assert cost.card is not None
    lines = [iteration_line(cost)]
    if cost.bound_hours is not None:
        run = f"the run on {cost.card.name}: at least {duration(3600 * cost.bound_hours)}"
        if cost.hours is not None and cost.hours_to_checkpoint is not None:
            run += f", about {duration(3600 * cost.hours)} by that assumption; first checkpoint after about "
            run += duration(3600 * cost.hours_to_checkpoint)
        lines.append(run)
    return lines


def iteration_line(cost: Cost) -> str:
    """An iteration on the card: FLOPs, the bound, the estimate and what it assumes."""
    assert cost.card is not None and cost.bound is not None
    line = (
        f"an iteration on {cost.card.name} ({cost.card.tflops:g} TFLOP/s in bfloat16): "
        f"{operations(sum(cost.plan.flops.values()))}, at least {duration(cost.bound)}"
    )
    if cost.iteration is None:
        return f"{line}; no estimate, as it computes in float32"
    return f"{line}, about {duration(cost.iteration)} at {cost.efficiency:.0%} of the peak, an assumption"


def name_a_card(memory: int) -> str:
    """What to say in place of hours where a size was given."""
    names = names_with(memory) or ["rtx-4090"]
    return f"hours: name the card in place of its size, like --gpu {' or --gpu '.join(names)}"


def space_lines(cost: Cost, encoders_on_host: bool) -> list[str]:
    parts = []
    for name, count in cost.disk.items():
        if name == "prompt cache" and cost.prompts is None:
            parts.append(f"{name} {size_of(cost.plan.sizes['prompt'])} a prompt (they cannot be read here)")
        elif name == "prompt cache":
            parts.append(f"{name} {size_of(count)} ({cost.prompts:,} prompts)")
        elif count:
            parts.append(f"{name} {size_of(count)}")
    host = size_of(cost.host_bytes(encoders_on_host))
    return [f"disk: {', '.join(parts)}", f"host memory beside the process: {host}"]
