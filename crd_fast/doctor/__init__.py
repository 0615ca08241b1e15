"""What this machine has, what training will use of it, what is missing and how to get it.

Only the standard library and rich are imported at the top: the doctor must be able to say that torch is
missing. Packages that load native code are imported, since that is how they break; of the others the version
is read.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crd_fast.doctor import machine, packages
from crd_fast.doctor.check import Check, attempt
from crd_fast.worlds import WORLDS

MARKS = {"ok": "green", "warning": "yellow", "missing": "red"}


def checks() -> list[Check]:
    """Everything training depends on, in the order of the table."""
    return [
        machine.python(),
        machine.system(),
        machine.processor(),
        machine.memory(),
        packages.torch(),
        *machine.gpus(),
        packages.triton(),
        packages.compiler(),
        *(packages.package(name) for name in ("diffusers", "transformers", "peft")),
        packages.bitsandbytes(),
        packages.flash_attention(),
        *(machine.builtin(world.name, world.folder) for world in WORLDS.values()),
        packages.kernels_library(),
        machine.write_access(),
        machine.disk(),
    ]


def choices() -> dict[str, str]:
    """What training will use here, by what it is used for. Needs torch."""
    import torch
    from crd_kernels import dispatch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    loss = dispatch.choose("auto", device)
    if loss == "cpu":
        compiled = packages.found_compiler()
        loss += " (compiled C++)" if compiled else " (tiles of torch operations: no C++ compiler)"
    eight_bit = attempt("bitsandbytes")[0] is not None
    return {
        "device": f"GPU 0, {torch.cuda.get_device_name(0)}"
        if gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "loss": loss,
        "optimizer": "adamw or adamw8bit, as the recipe says"
        if eight_bit
        else "adamw; adamw8bit needs bitsandbytes",
        "attention": "torch scaled_dot_product_attention",
    }


def render(console: Console) -> int:
    """Prints a table of `checks` and what will be used. Returns 0 if training can run here, else 2."""
    with console.status("looking at this machine"):
        found = checks()
        missing = [check.name for check in found if check.status == "missing"]
        used = {} if missing else choices()
    table = Table(title="crd-fast doctor", title_justify="left", title_style="bold")
    for column in ("", "what", "found", "note"):
        table.add_column(column, overflow="fold")
    for check in found:
        mark = Text(check.status, style=MARKS[check.status])
        table.add_row(mark, Text(check.name), Text(check.found), Text(check.note))
    console.print(table)
    if missing:
        console.print(Text(f"Training cannot run here yet. Missing: {', '.join(missing)}."))
        return 2
    console.print("Training can run here, and will use:", highlight=False)
    for purpose, choice in used.items():
        console.print(Text(f"  {purpose:<10}{choice}"))
    return 0
