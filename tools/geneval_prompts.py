"""GenEval prompts as a file, to train on and be measured by the benchmark's own.

    python -m tools.geneval_prompts train.jsonl --without evaluation_metadata.jsonl

Writes the generator's training prompts (`--heldout`: the others) in the benchmark's format, without those
whose objects, numbers and colours a prompt of the given file asks for, in whatever order or relation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from crd_fast.prompts import coco
from crd_fast.prompts.source import read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heldout", action="store_true")
    parser.add_argument("--without", type=Path, action="append", default=[], help="repeatable")
    arguments = parser.parse_args()
    taken = {
        content(entry) for path in arguments.without for entry in read_prompts(path) if "include" in entry
    }
    with arguments.out.open("x", encoding="utf-8") as file:
        for entries in coco.prompts(arguments.heldout).values():
            kept = [entry for entry in entries if content(entry) not in taken]
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
            print(f"{entries[0]['tag']}: {len(kept)} of {len(entries)}")


def content(entry: dict) -> tuple:
    asked = ((clause["class"], clause["count"], clause.get("color")) for clause in entry["include"])
    return entry["tag"], frozenset(asked)


if __name__ == "__main__":
    main()
