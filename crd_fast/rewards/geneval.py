"""GenEval's rules (Ghosh et al., arXiv 2310.11513), apart from any detector.

A detection is `{"label": str, "box": [x0, y0, x1, y1], "score": float, "color": str | None}`, y pointing
down; metadata is a line of the benchmark's own files: `tag`, `include`, optionally `exclude`, `prompt`.
The partial `score` is the one that trainers use as a dense reward on top of the benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from crd_fast.prompts.geneval_metadata import check_metadata

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # a class
POSITION_SHRINK = 0.1
RELATION_CUTOFF = 0.5


@dataclass(frozen=True)
class Judgement:
    """correct: GenEval's verdict. strict_correct: exact counts. clean: correct and nothing else is there.
    score: partial credit, mean of terms, at most 1 and possibly negative. reason: why not, "" if correct."""

    correct: bool
    strict_correct: bool
    clean: bool
    score: float
    reason: str


def judge(detections: Iterable[Mapping], metadata: Mapping) -> Judgement:
    """Judges what was detected in one image against what its prompt asks for.

    Raises ValueError naming the key if the metadata lacks `include` or a clause is malformed.
    """
    clauses = check_metadata(metadata)
    threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
    objects: dict[str, list[Mapping]] = {}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        found = objects.setdefault(detection["label"], [])
        if detection["score"] > threshold and len(found) < MAX_OBJECTS:
            found.append(detection)

    reasons = _benchmark_reasons(objects, clauses, metadata.get("exclude") or ())
    strict, score = _strict(objects, clauses)
    extra = sum(map(len, objects.values())) - sum(clause["count"] for clause in clauses)
    return Judgement(
        correct=not reasons,
        strict_correct=strict,
        clean=not reasons and extra == 0,
        score=score,
        reason="; ".join(reasons),
    )


def relations(box: Iterable[float], other: Iterable[float]) -> set[str]:
    """How `box` stands to `other`: a subset of the four relations, possibly empty."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box, other
    offset = ((ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2)
    sizes = (abs(ax1 - ax0) + abs(bx1 - bx0), abs(ay1 - ay0) + abs(by1 - by0))
    length = math.hypot(*offset)
    if length == 0:
        return set()
    dx, dy = (
        math.copysign(max(abs(o) - POSITION_SHRINK * size, 0.0), o) / length for o, size in zip(offset, sizes)
    )
    found = set()
    if dx < -RELATION_CUTOFF:
        found.add("left of")
    if dx > RELATION_CUTOFF:
        found.add("right of")
    if dy < -RELATION_CUTOFF:
        found.add("above")
    if dy > RELATION_CUTOFF:
        found.add("below")
    return found


def _benchmark_reasons(
    objects: Mapping[str, list], clauses: list[Mapping], exclude: Iterable[Mapping]
) -> list[str]:
    """Why the image is not correct; empty if it is."""
    reasons: list[str] = []
    matched: list[list | None] = []  # the objects each clause settled on, None where it failed
    for clause in clauses:
        label, count = clause["class"], clause["count"]
        found = objects.get(label, [])[:count]
        reason = None
        if len(found) < count:
            reason = f"expected at least {count} {label}, found {len(found)}"
        elif clause.get("color") is not None and _with_color(found, clause) < count:
            reason = f"expected {count} {clause['color']} {label}, found {_with_color(found, clause)}"
        elif clause.get("position") is not None:
            relation, k = clause["position"]
            target = matched[k]
            if target is None:
                reason = f"no {clauses[k]['class']} for {label} to be {relation}"
            elif any(relation not in relations(a["box"], b["box"]) for a in found for b in target):
                reason = f"expected {label} {relation} {clauses[k]['class']}"
        if reason is not None:
            reasons.append(reason)
        matched.append(found if reason is None else None)
    for clause in exclude:
        seen = len(objects.get(clause["class"], []))
        if seen >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}, found {seen}")
    return reasons


def _strict(objects: Mapping[str, list], clauses: list[Mapping]) -> tuple[bool, float]:
    """Exact counts over all objects, and the mean of the partial-credit terms."""
    correct = True
    terms: list[float] = []
    matched: list[list | None] = []
    for clause in clauses:
        label, count = clause["class"], clause["count"]
        found = objects.get(label, [])
        ok = len(found) == count
        terms.append(1 - abs(count - len(found)) / count)
        if not ok:
            if clause.get("color") is not None or clause.get("position") is not None:
                terms.append(0.0)
        else:
            if clause.get("color") is not None:
                right = _with_color(found, clause)
                terms.append(1 - abs(count - right) / count)
                ok = right == count
            if ok and clause.get("position") is not None:
                relation, k = clause["position"]
                target = matched[k]
                if target is None:
                    terms.append(0.0)
                    ok = False
                else:
                    ok = all(relation in relations(a["box"], b["box"]) for a in found for b in target)
                    # the rule that trainers use ends with a 1 even after a failed relation
                    terms.extend([1.0] if ok else [0.0, 1.0])
        correct = correct and ok
        matched.append(found if ok else None)
    return correct, sum(terms) / len(terms)


def _with_color(found: list[Mapping], clause: Mapping) -> int:
    return sum(detection.get("color") == clause["color"] for detection in found)
