"""What this machine has, what training will use of it, what is missing and how to get it.

Only the standard library and rich are imported at the top: the doctor must be able to say that torch is
missing. Packages that load native code are imported, since that is how they break; of the others the version
is read.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from crd_fast.doctor import hub, machine, packages
from crd_fast.doctor.check import Check, attempt
from crd_fast.doctor.outlook import gpu_here, outlook
from crd_fast.worlds import WORLDS

MARKS = {"ok": "green", "warning": "yellow", "missing": "red"}


def checks() -> list[Check]:
    """Everything training depends on, in the order of the table."""
    return [
        machine.python(),
        machine.system(),
        machine.processor(),
        machine.memory(),
        packages.itself(),
        packages.torch(),
        *machine.gpus(),
        *machine.driver(),
        packages.triton(),
        packages.compiler(),
        *(packages.package(name) for name in ("diffusers", "transformers", "peft")),
        packages.bitsandbytes(),
        packages.flash_attention(),
        *(packages.extra(name) for name in packages.EXTRAS),
        *(machine.builtin(world.name, world.folder) for world in WORLDS.values()),
        packages.kernels_library(),
        machine.write_access(),
        machine.disk(),
        hub.cache(),
        hub.login(),
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
        loss += " (compiled C++)" if compiled else " (torch operations: no C++ compiler)"
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


def render(console: Console, model: str | None = None) -> int:
    """Prints `checks`, what will be used and what can be trained. Returns 0 if training can run, else 2.

    model: whose access at the hub is looked at as well; of that one, then.
    """
    with console.status("looking at this machine"):
        found = checks()
        missing = [check.name for check in found if check.status == "missing"]
        found += [] if model is None else [hub.access(model)]
        withheld = not missing and any(check.status == "missing" for check in found)
        used = {} if missing else choices()
        last = outlook(found, gpu_here())

    def say(*parts: str | tuple[str, str]) -> None:
        """A line as it is, not broken where the terminal ends: commands in it can be copied."""
        console.print(Text.assemble(*parts), soft_wrap=True)

    say(("crd-fast doctor", "bold"))
    for check in found:
        start = f"{check.name:<18} {check.found}"
        fits = len(start) + len(check.note) + 10 <= console.width
        say(
            (f"{check.status:<8}", MARKS[check.status]),
            start,
            f"; {check.note}" if check.note and fits else "",
        )
        if check.note and not fits:
            say(f"{'':<27}{check.note}")
    if missing:
        say(f"Training cannot run here yet. Missing: {', '.join(missing)}.")
    else:
        say(f"Training can run here{f', but not of {model} yet' if withheld else ''}, and will use:")
        for purpose, choice in used.items():
            say(f"  {purpose:<10}{choice}")
    for line in last:
        say((line, "bold" if line is last[0] else ""))
    return 2 if missing or withheld else 0
