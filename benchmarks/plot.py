"""Draws the results of a benchmark run: python benchmarks/plot.py results.json [--out results.svg]

One panel per workload of the CRD loss, one bar per provider and phase, the copy-bandwidth floor as a line;
and a table of everything on stdout.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

PHASES = ("forward", "backward", "both")


def load(path):
    """(machine, rows): one dict a benchmark, its extra_info plus median seconds."""
    content = json.loads(Path(path).read_text())
    rows = [b["extra_info"] | {"seconds": b["stats"]["median"]} for b in content["benchmarks"]]
    return content["machine_info"]["crd"], rows


def print_table(rows):
    print("| op | shape | K | provider | phase | ms | of copy bandwidth | peak extra MB |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        if r["op"] == "import":
            continue
        extra = r.get("peak_extra_bytes")
        cells = [r["op"], r["shape"], r["samples"], r["provider"], r["phase"], f"{r['seconds'] * 1e3:.2f}"]
        cells += [f"{r['fraction_of_copy_bandwidth']:.0%}", "" if extra is None else f"{extra / 2**20:.1f}"]
        print("|", " | ".join(map(str, cells)), "|")
    for r in rows:
        if r["op"] == "import":
            print(f"\nimport of crd_kernels beyond torch's own: {r['seconds_beyond_torch']:.3f} s")


def draw(machine, rows, out):
    rows = [r for r in rows if r["op"] == "crd_loss"]
    workloads = sorted({(r["shape"], r["samples"]) for r in rows})
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    figure, axes = plt.subplots(1, len(workloads), figsize=(4.5 * len(workloads), 4), squeeze=False)
    for axis, workload in zip(axes[0], workloads):
        here = [r for r in rows if (r["shape"], r["samples"]) == workload]
        width = 0.8 / len(providers)
        for index, provider in enumerate(providers):
            times = {r["phase"]: r["seconds"] * 1e3 for r in here if r["provider"] == provider}
            places = [p + index * width for p in range(len(PHASES))]
            axis.bar(places, [times.get(phase, 0) for phase in PHASES], width, label=provider)
        for place, phase in enumerate(PHASES):
            r = next((r for r in here if r["phase"] == phase), None)
            if r:
                floor = r["seconds"] * r["fraction_of_copy_bandwidth"] * 1e3
                axis.hlines(floor, place - width / 2, place + 0.8 - width / 2, "black", linewidth=1)
        axis.set_yscale("log")
        axis.set_xticks([p + 0.4 - width / 2 for p in range(len(PHASES))], PHASES)
        axis.set_title(f"{workload[0]}, K {workload[1]}")
        axis.set_ylabel("ms (line: copy bandwidth)")
    axes[0][-1].legend(fontsize="small")
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    figure.suptitle(f"CRD loss, {where}, torch {machine['torch']}, commit {machine['commit'][:12]}")
    figure.tight_layout()
    figure.savefig(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file written by --benchmark-json")
    parser.add_argument("--out", type=Path, help="picture, default next to the results")
    options = parser.parse_args()
    machine, rows = load(options.results)
    print_table(rows)
    draw(machine, rows, options.out or options.results.with_suffix(".svg"))


if __name__ == "__main__":
    main()
