"""Compiles every Triton kernel for real GPUs on a machine without one, and reads the result off the binary.

    python -m tools.compile_kernels [--targets sm_80,sm_90,gfx942] [--ends] [--json FILE] [--dump DIR]

The package's own launchers run on CPU tensors while Triton is told of another GPU and stopped before the
launch: what is compiled is what would run there, specialisations included. Reported per kernel: registers,
spills, shared memory, occupancy estimated from them, and how wide the global loads and stores are.

Exit status 1 if anything spills or has atomics, whose order is not fixed, or if a pass over contiguous
latents does not load and store all of them with 128 bits a thread or more: 6 reads for `measure`, 5 reads and
1 write for `velocity_grad`, an element.
"""

import argparse
import json
import math
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import triton
from crd_kernels import launch
from crd_kernels.finish import triton as finishing
from crd_kernels.noise import triton as noise_kernels
from crd_kernels.problem import WEIGHTINGS, Kind, Latents, Numbers, Scalars
from crd_kernels.velocity import triton as velocity_kernels
from crd_kernels.velocity.stats import OUTCOME, ROWS
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tools import machine_code

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHAPE = (16, 64, 64)
LAUNCHES = 3  # of a loss and its gradient


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
    """One specialisation.

    layout: contiguous, sliced (channels of packed tokens), odd (63 elements), wide (offsets of 64 bits), or
    "N dimensions" of a sample that cannot be merged.
    """

    op: str  # loss, which is three launches | measure | center | interpolate
    dtype: str
    reference: str = "guided"  # guided | conditional | none
    noise: str = "given"  # given | seeded
    layout: str = "contiguous"
    method: str = "crd"
    settings: str = ""  # of the method: flags of `Kind` that are on, and AWM's weighting
    mask: str = ""  # "" | bool | float

    def latent(self):
        dtype = DTYPES[self.dtype]
        shape = {"sliced": (4096, 64), "odd": (63,)}.get(self.layout, SHAPE)
        strides = [(1 + self.layout.startswith("wide")) * step for step in torch.empty(shape).stride()]
        if self.layout.endswith("dimensions"):
            dims = int(self.layout.split()[-2])
            shape = tuple(range(3, 3 + dims))
            strides = torch.empty(shape[::-1]).permute(*range(dims - 1, -1, -1)).stride()
        if self.layout.startswith("wide"):  # so far apart that offsets inside a sample need 64 bits
            far = 2**31 // sum((n - 1) * step for n, step in zip(shape, strides)) + 1
            strides = [far * step for step in strides]
            memory = np.empty(2**31 * dtype.itemsize, np.uint16)  # never touched, so never there
            return torch.from_numpy(memory).view(dtype).as_strided((2, *shape), (64, *strides))
        if self.layout.endswith("dimensions"):
            return torch.empty_strided((2, *shape), (math.prod(shape), *strides), dtype=dtype)
        tensor = torch.empty(2, *shape, dtype=dtype)
        return torch.cat([tensor, tensor], -1)[..., : shape[-1]] if self.layout == "sliced" else tensor

    def kind(self):
        words = self.settings.split()
        flags = {word: True for word in words if word in Kind._fields}
        weighting = next((word for word in words if word in WEIGHTINGS), "uniform")
        old_term = self.method == "nft" or "old_term" in words
        return Kind(self.method, **flags | {"old_term": old_term, "weighting": weighting})

    def run(self):
        """Calls the launchers; compiles, does not launch."""
        x, kind = self.latent(), self.kind()
        scale = torch.zeros(2)
        seed = torch.zeros(2, dtype=torch.int64) if self.noise == "seeded" else None
        noise = x if seed is None else None
        if self.op == "interpolate":
            noise_kernels.interpolate(x, scale, noise, seed, x.dtype)
            return
        if self.op == "center":
            table = torch.zeros(ROWS, 100)
            many = Scalars(torch.zeros(100), torch.zeros(100, dtype=torch.int64), None, torch.zeros(100))
            finish = finishing.Finish(kind, 100, table.dtype, table.device)
            finish(table, torch.empty(OUTCOME, 100), finish.work(), many, Numbers())
            return
        mask = None
        if self.mask:
            mask = torch.ones(x.shape, dtype=torch.bool if self.mask == "bool" else torch.float32)
        latents = Latents(
            x,
            x if kind.method in ("crd", "nft", "dpo") or kind.off_policy or kind.old_term else None,
            None if self.reference == "none" else x,
            x if self.reference == "guided" else None,
            x,
            noise,
            seed,
            mask,
        )
        scalars = Scalars(
            scale,
            torch.zeros(2, dtype=torch.int64) if kind.method == "crd" else None,
            scale if kind.method in ("nft", "awm") else None,
        )
        run = velocity_kernels.Passes(latents, scalars, kind)
        if self.op == "measure":  # and the gradient of what a trainer has centered itself
            run.measure(latents, Numbers())
            run.gradient(latents, (scale, scale, scale if kind.old_term else None), Numbers())
            return
        table, loss = run.forward(latents, scalars, Numbers())
        run.backward(latents if kind.old_term else latents._replace(old=None), table, loss, Numbers())

    def passes(self, kernel):
        """Reads and writes of latents an element that the formula needs."""
        references = {"guided": 2, "conditional": 1, "none": 0}[self.reference]
        noise = 1 if self.noise == "given" else 0
        kind = self.kind()
        old = kind.method in ("crd", "nft", "dpo") or kind.off_policy or kind.old_term
        if kernel == "interpolate_kernel":
            return 1 + noise, 1
        if kernel == "measure_kernel":
            return 2 + old + references + noise, 0
        return 2 + references + noise + kind.old_term, 1


def cases(every=True):
    """every: of the layouts that differ by their number of dimensions all, else the fewest and the most."""
    for dtype in DTYPES:
        yield Case("loss", dtype)
    yield Case("loss", "bf16", reference="conditional")
    yield Case("loss", "bf16", reference="none")
    yield Case("loss", "bf16", settings="adaptive_weighting reward_adaptive_kl tempered bce")
    yield Case("loss", "bf16", reference="none", method="nft", settings="adaptive_weighting")
    yield Case("loss", "fp64", reference="conditional", method="nft", settings="adaptive_weighting")
    yield Case("loss", "bf16", reference="none", method="flow_matching")
    yield Case("loss", "bf16", reference="none", method="dpo")
    yield Case("loss", "bf16", reference="none", method="reward", settings="adaptive_weighting")
    for weighting in WEIGHTINGS:
        yield Case("loss", "bf16", reference="none", method="awm", settings=f"off_policy clipped {weighting}")
    yield Case("loss", "bf16", reference="conditional", method="awm", settings="old_term")
    yield Case("loss", "bf16", noise="seeded")
    yield Case("loss", "fp64", noise="seeded")
    yield Case("loss", "bf16", mask="bool")
    yield Case("loss", "fp32", mask="float")
    dimensions = [f"{n} dimensions" for n in (range(2, 8) if every else (2, 7))]
    for layout in ("sliced", "odd", "wide", *dimensions, *(f"wide {n}" for n in dimensions)):
        yield Case("loss", "bf16", layout=layout)
    yield Case("loss", "fp32", layout="wide 5 dimensions")
    yield Case("loss", "bf16", layout="wide", method="nft", settings="adaptive_weighting")
    yield Case("measure", "bf16", method="measure", settings="adaptive_weighting old_term")
    yield Case("center", "fp32", settings="adaptive_weighting reward_adaptive_kl")
    yield Case("center", "fp32", settings="adaptive_weighting reward_adaptive_kl tempered bce")
    for dtype in DTYPES:
        yield Case("interpolate", dtype, reference="none")
    yield Case("interpolate", "bf16", reference="none", noise="seeded")
    yield Case("interpolate", "bf16", reference="none", layout="wide")


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
        if name != "finish_kernel":
            elements = launch.block(torch.float64 if case.dtype == "fp64" else torch.float32)
            size = elements / report["threads"] * DTYPES[case.dtype].itemsize
            report["wide_reads"] = machine_code.wide_bytes(report["loads"]) / size
            report["wide_writes"] = machine_code.wide_bytes(report["stores"]) / size
        report["launches"] = len(compiled)
        report["problems"] = problems(case, report)
        reports.append(report)
        if dump:
            machine_code.write(kernel, Path(dump) / target, f"{name} {label(report)}".replace(" ", "-"))
    return reports


def problems(case, report):
    found = []
    if report["spills"]:
        found.append(f"{report['spills']} spills")
    if report["atomics"]:
        found.append(f"{report['atomics']} atomics")
    if case.op == "loss" and report["launches"] != LAUNCHES:
        found.append(f"{report['launches']} launches instead of {LAUNCHES}")
    if case.layout == "contiguous" and not case.mask and "wide_reads" in report:
        reads, writes = case.passes(report["kernel"])
        if report["wide_reads"] != reads:
            found.append(f"{report['wide_reads']:g} of {reads} reads are 128 bits wide")
        if report["wide_writes"] != writes:
            found.append(f"{report['wide_writes']:g} of {writes} writes are 128 bits wide")
    return found


def label(report):
    names = ("op", "dtype", "reference", "noise", "layout", "method", "settings", "mask")
    return " ".join(report[name] for name in names if report[name])


def table_of(reports):
    table = Table(title=f"{reports[0]['target']}, triton {triton.__version__}")
    columns = (
        "kernel",
        "case",
        "launches",
        "threads",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "loads",
        "stores",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("kernel", "case") else "right")
    for r in reports:
        case = label(r)
        widths = [" ".join(f"{n}x{bits}" for bits, n in r[kind].items()) for kind in ("loads", "stores")]
        numbers = [
            r["launches"],
            r["threads"],
            r["registers"],
            r["spills"],
            r["shared"],
            f"{r['occupancy']:.0%}",
        ]
        table.add_row(r["kernel"], case, *map(str, numbers), *widths, style="red" if r["problems"] else None)
    return table


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, default all")
    parser.add_argument("--ends", action="store_true", help="of 2 to 7 dimensions of a sample, only 2 and 7")
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
        launch.target.cache_clear()
        reports = []
        for case in cases(every=not options.ends):
            reports += compile_case(case, target, options.dump)
        console.print(table_of(reports))
        everything += reports
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": everything}, indent=1))
    failed = [r for r in everything if r["problems"]]
    for r in failed:
        console.print(f"{r['target']} {r['kernel']} {label(r)}: {'; '.join(r['problems'])}", style="red")
    console.print(
        f"{len(everything)} kernels compiled for {len(targets)} targets, {len(failed)} with problems"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
