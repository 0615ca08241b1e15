"""Prints the results of a benchmark run as a table: python benchmarks/table.py results.json"""

import json
import sys
from pathlib import Path


def load(path):
    """One dict a benchmark, its extra_info plus median seconds."""
    content = json.loads(Path(path).read_text())
    return [b["extra_info"] | {"seconds": b["stats"]["median"]} for b in content["benchmarks"]]


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


if __name__ == "__main__":
    print_table(load(sys.argv[1]))
