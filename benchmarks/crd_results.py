"""Results that a stopped run leaves behind: JSON lines, one case each, and the table made of them.

    python -m benchmarks.crd_results FILE...     prints the tables of what compare_cpu, host_time or
                                                 compare_gpu wrote, complete or not

The first line says what was run, and on what machine and commit.
"""

import argparse
import json
import os
from pathlib import Path


class Results:
    """Writes one line a case, on the disk before the next case begins. `path` None keeps them in memory."""

    def __init__(self, path, about):
        self.path, self.about, self.rows = path, about, []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")
        self._append(about)

    def add(self, row):
        self.rows.append(row)
        self._append(row)

    def _append(self, line):
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def load(path):
    """(about, rows) of a file that may end in the middle of a line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not lines:
        raise ValueError(f"{path}: expected a line about the run, got an empty file")
    return lines[0], lines[1:]


def table(about, rows):
    """Markdown: what was run, on what, and a table with every column that any of the rows has."""
    machine = about["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    commit, *changes = machine["commit"].split("+")
    commit = "+".join([commit[:12], *changes])
    lines = [f"{about['what']}; {where}, torch {machine['torch']}, commit {commit}"]
    cells = [line for row in rows for line in KINDS[about["kind"]](row)]
    if cells:
        columns = list(max(cells, key=len))
        columns += [name for line in cells for name in line if name not in columns]
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(line.get(name, "") for name in columns) + " |" for line in cells]
    return "\n".join(lines)


def _case(row):
    return {"loss": row["loss"], "shape": row["shape"], "K": str(row["samples"])}


def _time(spread):
    seconds = spread["median"]
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _ratio(spread):
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _of_turns(row):
    """One line: ours against each baseline, and what of a copy's bandwidth ours reaches."""
    line = _case(row)
    if "error" in row:
        return [line | {"ours": row["error"]}]
    for name, turn in row["turns"].items():
        line.setdefault("ours", _time(turn["ours"]))
        if name == "copy":
            line["of copy bandwidth"] = f"{turn['ratio']['median']:.0%}"
        else:
            line |= {name: _time(turn["other"]), f"{name} / ours": _ratio(turn["ratio"])}
    return [line]


def _of_gpu(row):
    """A line for each provider; the ratio stands with the baseline."""
    lines = []
    for name, got in row["providers"].items():
        line = _case(row) | {"provider": name}
        if "error" in got:
            lines.append(line | {"cold": got["error"]})
            continue
        for mode, title in MODES.items():
            line[title] = _time(got[mode]) if mode in got else got["graph_error"]
        for mode, fraction in got["fraction_of_copy"].items():
            line[f"{MODES[mode]}, of copy bandwidth"] = f"{fraction:.0%}"
        for mode, spread in (row["ratio"] if name != "ours" else {}).items():
            line[f"{MODES[mode]} / ours"] = _ratio(spread)
        line["extra MB"] = f"{got['peak_extra_bytes'] / 2**20:.1f}"
        lines.append(line)
    return lines


# how a GPU is timed: crd_gpu_timer.py says what each means
MODES = {"cold": "cold", "hot": "hot", "graph_cold": "graph, cold", "graph_hot": "graph, hot"}
KINDS = {"turns": _of_turns, "gpu": _of_gpu}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args(arguments).files:
        if path.exists():
            print(table(*load(path)), end="\n\n")
        else:
            print(f"{path}: not written\n")


if __name__ == "__main__":
    main()
