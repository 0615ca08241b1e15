"""The tables of the pages, from the studies': `python -m tools.study_tables [FOLDER]`.

`docs/studies/NAME` has what `crd-fast study NAME` wrote. With a folder that has studies by their names, their
results are taken in first: of a run that is in both, the folder's; runs that were made elsewhere stay. Then
the tables between `<!-- table: NAME TASK: column, column -->` and `<!-- end -->` in pages are those of
`docs/studies/NAME/table.md`, of the columns that are named and the arm. They say on which machines and at
which commits they were made.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from crd_fast.study.results import RAW, TABLE, write_records
from crd_fast.study.study import Study, cells, load_study

DOCS = Path(__file__).parent.parent / "docs"
STUDIES = DOCS / "studies"
MARKED = re.compile(r"(<!-- table: (\S+) ([^\s:]+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
MADE = re.compile(r"^(.*), (\d+) thread\(s\), commit (\w+)$", re.MULTILINE)


def table(study: str, task: str, columns: list[str]) -> str:
    """Markdown. KeyError where the study has no such task or column."""
    text = (STUDIES / study / TABLE).read_text(encoding="utf-8")
    tables = dict(re.findall(r"^(\S+), held out:\n\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[task].splitlines()]
    places = {name: place for place, name in enumerate(rows[0])}
    chosen = [places[name] for name in ("arm", *columns)]
    kept = "\n".join("| " + " | ".join(row[place] for place in chosen) + " |" for row in rows)
    machines: dict[tuple[str, str], list[str]] = {}
    for cpu, threads, commit in MADE.findall(text):
        machines.setdefault((cpu, threads), []).append(commit[:7])
    made = ""
    for (cpu, threads), commits in machines.items():
        several = ["s" if count > 1 else "" for count in (int(threads), len(commits))]
        made += f"{cpu}, {threads} thread{several[0]}, commit{several[1]} {', '.join(commits)}.\n"
    whole = f"[All columns](studies/{study}/{TABLE}). "
    return f"\n{kept}\n\n{whole}{made}\n"


def merged(study: Study, known: list[dict], new: list[dict]) -> list[dict]:
    """Records of both, in the study's order; a run that is in both is the new one."""
    order = {(cell.task, cell.arm, cell.seed): place for place, cell in enumerate(cells(study))}

    def run(record: dict) -> tuple[str, str, int]:
        return record["task"], record["arm"], record["seed"]

    again = {run(record) for record in new}
    kept = [record for record in known if run(record) not in again and run(record) in order]
    return sorted([*kept, *new], key=lambda record: order[run(record)])


def take_in(folder: Path) -> None:
    """The results of a study, into `docs/studies`."""
    target = STUDIES / folder.name
    target.mkdir(exist_ok=True)
    known, new = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        for path in (target / RAW, folder / RAW)
    )
    study = load_study(folder.name)
    write_records(study, merged(study, known, new), target)


def with_tables(page: str) -> str:
    return MARKED.sub(
        lambda found: found[1] + table(found[2], found[3], found[4].split(", ")) + found[5], page
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        for found in sorted(arguments.folder.glob(f"*/{RAW}")):
            take_in(found.parent)
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(path.name)


if __name__ == "__main__":
    main()
