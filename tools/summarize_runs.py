"""Sums up finished runs of one recipe as a result file and a table for documents.

    python -m tools.summarize_runs runs/seed-0 runs/seed-1 runs/seed-2 --out benchmarks/results/builtin.json

The JSON holds, for every run, its environment, recipe, first and last evaluation, the evaluations in between
and the seconds spent; the table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import yaml

from crd_fast.run.log import ENVIRONMENT, RECIPE
from crd_fast.run.metrics import read_metrics
from tools.builtin_card import markdown_table


def summarize(run: Path) -> dict:
    """What a run reached and on what."""
    records = read_metrics(run)
    evaluations = [
        {k.removeprefix("eval/"): v for k, v in r.items() if k == "iteration" or k.startswith("eval/")}
        for r in records
        if "eval/images" in r
    ]
    seconds = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("seconds_"):
                seconds[name] = seconds.get(name, 0.0) + value
    trained = [record for record in records if "reward_mean" in record]
    return {
        "run": run.name,
        "iterations": records[-1]["iteration"],
        "environment": json.loads((run / ENVIRONMENT).read_text()),
        "recipe": yaml.safe_load((run / RECIPE).read_text()),
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "peak_rss_bytes": max(record["peak_rss_bytes"] for record in trained),
        "implicit_reward_abs": [round(record["implicit_reward_abs"], 6) for record in trained],
        "reward_mean": [round(record["reward_mean"], 4) for record in trained],
        "evaluations": evaluations,
    }


def table(results: list[dict]) -> str:
    """Each category before and after: the mean over the runs."""
    rows = []
    names = [
        name for name in results[0]["evaluations"][0] if name not in ("iteration", "images", "reward_mean")
    ]
    for name in names:
        before = statistics.fmean(r["evaluations"][0][name] for r in results)
        after = [r["evaluations"][-1][name] for r in results]
        each = ", ".join(f"{value:.3f}" for value in after)
        mean = statistics.fmean(after)
        rows.append([name, f"{before:.3f}", f"{mean:.3f}", f"{mean - before:+.3f}", each])
    seconds = ", ".join(f"{r['seconds_total']:.0f}" for r in results)
    rows.append(["seconds", "", f"{statistics.fmean(r['seconds_total'] for r in results):.0f}", "", seconds])
    return markdown_table(["", "before", "after, mean", "change", "after, each run"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    results = [summarize(run) for run in options.runs]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
