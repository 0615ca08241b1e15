"""metrics.jsonl: one object a line, one line an iteration, as runs write and everything else reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from crd_fast.errors import UserError

METRICS = "metrics.jsonl"
# how the names begin of what the clock and the machine decide: the rest is the same in a run that is repeated
MEASURED = ("seconds", "peak", "images_per_second", "tflops", "gpu_peak")
GPU_PEAK = "gpu_peak_bytes"  # of tensors, so far; with /PHASE, in a phase
GUIDED_BASE = "guided_base/"  # how the names begin of what the base with guidance got, in the first record
SCORED = "eval/scored/"  # how the names begin of the shares that rewards and judges scored
# In records of a run that went on with other prompts, or was evaluated otherwise: since which iteration.
TRAINED_ALIKE, EVALUATED_ALIKE = "trained_alike_since", "evaluated_alike_since"


def read_metrics(run: Path, left_out: list[int] | None = None) -> list[dict]:
    """The records of a run by iteration; [] where there are none. Of two with one iteration the later counts.

    A last line that was cut off by a kill is left out. Another line that is no record raises UserError, or
    where `left_out` is given is left out as well; that list gets the numbers of all such lines.
    """
    path = run / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records, bad = {}, []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["iteration"], int):
                raise TypeError
            records[record["iteration"]] = record
        except (ValueError, TypeError, KeyError):
            bad.append(number)
    if left_out is not None:
        left_out += bad
    elif bad and bad[0] < len(lines):
        raise UserError(f"{path} line {bad[0]}: not the record of an iteration")
    return [records[iteration] for iteration in sorted(records)]


def value_of(record: Mapping[str, float], name: str) -> float:
    """NaN where an evaluation has no such measure. The share that was scored is not said where it is 1."""
    return record.get(name, 1.0 if name.startswith(SCORED) else math.nan)


def comparable(records: Sequence[dict], key: str) -> list[dict]:
    """The records made under the same settings as the last. key: `TRAINED_ALIKE` or `EVALUATED_ALIKE`."""
    return [record for record in records if record.get(key, 0) == records[-1].get(key, 0)]
