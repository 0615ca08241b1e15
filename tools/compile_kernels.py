"""Compiles every Triton kernel for real GPUs on a machine without one, and reads the result off the binary.

    python -m tools.compile_kernels [--targets sm_80,sm_90,gfx942] [--json FILE] [--dump DIR]

The package's own launchers run on CPU tensors while Triton is told of another GPU and stopped before the
launch: what is compiled is what would run there, specialisations included. Reported per kernel: registers,
spills, shared memory, occupancy estimated from them, and how wide the global loads and stores are.

Exit status 1 if anything spills or has atomics, whose order is not fixed, or if a pass over contiguous
latents does not load and store all of them with 128 bits a thread or more: 6 reads for `measure`, 5 reads and
1 write for `velocity_grad`, an element.
"""

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from crd_kernels import launch
from crd_kernels.noise import triton as noise_kernels
from crd_kernels.velocity import triton as velocity_kernels
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tools import machine_code

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHAPE = (16, 64, 64)


class CompileOnly:
    """Stands in for Triton's driver: names a target, has no device."""

    def __init__(self, name):
        self.name = name

    def get_current_target(self):
        if self.name.startswith("sm_"):
            return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.name, 64)

    def get_current_device(self):
        return self.name  # Triton keeps compiled kernels per device

    def get_current_stream(self, device=None):
        return 0


@dataclass(frozen=True)
class Case:
    """One specialisation: `layout` is contiguous, sliced (channels of packed tokens) or odd (63 elements)."""

    op: str  # measure | velocity_grad | interpolate
    dtype: str
    reference: str = "guided"  # guided | conditional | none
    noise: str = "given"  # given | seeded
    layout: str = "contiguous"
    loss: str = "crd"  # crd | nft, which mixes policy and old and has a third term in its gradient

    def latent(self):
        shape = {"contiguous": SHAPE, "sliced": (4096, 64), "odd": (63,)}[self.layout]
        tensor = torch.empty(2, *shape, dtype=DTYPES[self.dtype])
        return torch.cat([tensor, tensor], -1)[..., : shape[-1]] if self.layout == "sliced" else tensor

    def run(self):
        """Calls the launcher; compiles, does not launch."""
        x = self.latent()
        cond = None if self.reference == "none" else x
        uncond = x if self.reference == "guided" else None
        noise, seed = (x, None) if self.noise == "given" else (None, torch.zeros(2, dtype=torch.int64))
        scale = torch.zeros(2)
        old, c3, mix = (x, scale, 0.5) if self.loss == "nft" else (None, None, 0.0)
        if self.op == "measure":
            velocity_kernels.measure(x, x, cond, uncond, x, noise, seed, 4.5, True, mix)
        elif self.op == "velocity_grad":
            velocity_kernels.velocity_grad(x, old, cond, uncond, x, noise, seed, scale, scale, c3, 4.5)
        else:
            noise_kernels.interpolate(x, scale, noise, seed, x.dtype)

    def passes(self):
        """Reads and writes an element that the formula needs."""
        references = {"guided": 2, "conditional": 1, "none": 0}[self.reference]
        noise = 1 if self.noise == "given" else 0
        if self.op == "interpolate":
            return 1 + noise, 1
        if self.op == "measure":
            return 3 + references + noise, 0
        return 2 + references + noise + (self.loss == "nft"), 1


def cases():
    for op in ("measure", "velocity_grad"):
        for dtype in DTYPES:
            yield Case(op, dtype)
        yield Case(op, "bf16", reference="conditional")
        yield Case(op, "bf16", reference="none")
        yield Case(op, "bf16", reference="none", loss="nft")
        yield Case(op, "bf16", noise="seeded")
        yield Case(op, "bf16", layout="sliced")
        yield Case(op, "bf16", layout="odd")
    for dtype in DTYPES:
        yield Case("interpolate", dtype, reference="none")
    yield Case("interpolate", "bf16", reference="none", noise="seeded")


def compile_case(case, target, dump=None):
    """One report (a dict) per kernel that the case launches."""
    compiled = []
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self.__name__, original(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    try:
        case.run()
    finally:
        JITFunction.run = original

    reports = []
    for name, kernel in compiled:
        report = machine_code.inspect(kernel, target)
        report = {"kernel": name, "target": target, **asdict(case), **report}
        if not name.startswith("summarize"):
            elements = launch.block(torch.float64 if case.dtype == "fp64" else torch.float32)
            size = elements / report["threads"] * DTYPES[case.dtype].itemsize
            report["wide_reads"] = machine_code.wide_bytes(report["loads"]) / size
            report["wide_writes"] = machine_code.wide_bytes(report["stores"]) / size
        report["problems"] = problems(case, report)
        reports.append(report)
        if dump:
            label = "-".join([name, *[str(v) for v in asdict(case).values()][1:]])
            machine_code.write(kernel, Path(dump) / target, label)
    return reports


def problems(case, report):
    found = []
    if report["spills"]:
        found.append(f"{report['spills']} spills")
    if report["atomics"]:
        found.append(f"{report['atomics']} atomics")
    if case.layout == "contiguous" and "wide_reads" in report:
        reads, writes = case.passes()
        if report["wide_reads"] != reads:
            found.append(f"{report['wide_reads']:g} of {reads} reads are 128 bits wide")
        if report["wide_writes"] != writes:
            found.append(f"{report['wide_writes']:g} of {writes} writes are 128 bits wide")
    return found


def table_of(reports):
    table = Table(title=f"{reports[0]['target']}, triton {triton.__version__}")
    columns = ("kernel", "case", "threads", "registers", "spills", "shared", "occupancy", "loads", "stores")
    for column in columns:
        table.add_column(column, justify="left" if column in ("kernel", "case") else "right")
    for r in reports:
        case = " ".join((r["dtype"], r["reference"], r["noise"], r["layout"], r["loss"]))
        widths = [" ".join(f"{n}x{bits}" for bits, n in r[kind].items()) for kind in ("loads", "stores")]
        numbers = [r["threads"], r["registers"], r["spills"], r["shared"], f"{r['occupancy']:.0%}"]
        table.add_row(r["kernel"], case, *map(str, numbers), *widths, style="red" if r["problems"] else None)
    return table


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, default all")
    parser.add_argument("--json", type=Path, help="write every report to this file")
    parser.add_argument("--dump", type=Path, help="write PTX or assembly, and binaries, to this folder")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets: expected some of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

    console, everything = Console(width=170), []
    for target in targets:
        driver.set_active(CompileOnly(target))
        launch.warp_size.cache_clear()
        reports = []
        for case in cases():
            reports += compile_case(case, target, options.dump)
        console.print(table_of(reports))
        everything += reports
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": everything}, indent=1))
    failed = [r for r in everything if r["problems"]]
    for r in failed:
        names = (r["target"], r["kernel"], r["dtype"], r["reference"], r["noise"], r["layout"], r["loss"])
        console.print(f"{' '.join(names)}: {'; '.join(r['problems'])}", style="red")
    console.print(
        f"{len(everything)} kernels compiled for {len(targets)} targets, {len(failed)} with problems"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
