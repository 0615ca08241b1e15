"""Lines of prompt files and their metadata: kept as they are, or refused in one line, before any work."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.prompts.geneval_metadata import RELATIONS
from crd_fast.prompts.source import read_prompts
from crd_fast.rewards import Rewards
from crd_fast.rewards.ocr import target_text
from crd_fast.rewards.world_geneval import WorldGenEval
from tests.fuzz.budget import answer, cases

BLANK = np.full((1, 32, 32, 3), 255, np.uint8)
WORDS = st.text(max_size=10) | st.sampled_from(
    [
        "a red circle",
        'a sign "CAT"',
        "circle",
        "square",
        "red",
        "",
        " ",
        "\ud800",
        "a\nb",
        '"',
        "„Hallo“",
        "\x00",
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=3,
)


def mostly(strategy):
    return st.integers(0, 11).flatmap(lambda number: strategy if number else ANYTHING)


CLAUSES = st.fixed_dictionaries(
    {"class": mostly(st.sampled_from(["circle", "square", "triangle"])), "count": mostly(st.integers(1, 3))},
    optional={
        "color": mostly(st.sampled_from(["red", "blue"])),
        "position": st.none()
        | st.none()
        | mostly(st.tuples(st.sampled_from(RELATIONS), mostly(st.integers(0, 1))).map(list)),
    },
)
ENTRIES = st.fixed_dictionaries(
    {
        "prompt": mostly(WORDS),
        "tag": mostly(st.sampled_from(["counting", "position", "colors"])),
        "include": mostly(st.lists(mostly(CLAUSES), min_size=1, max_size=2)),
    },
    optional={
        "exclude": mostly(st.lists(mostly(CLAUSES), max_size=2)),
        "image": ANYTHING,
    },
)
LINES = mostly(ENTRIES).map(json.dumps)


@pytest.fixture(scope="module")
def judge():
    return Rewards({"geneval": 1.0}, device="cpu")


def read(folder, name, content):
    path = Path(folder) / name
    path.write_bytes(content)
    return read_prompts(path)


@cases(60)
@given(lines=st.lists(st.tuples(LINES, st.integers(0, 9)), min_size=10, max_size=20))
def test_metadata_lines(tmp_path_factory, judge, lines):
    folder = tmp_path_factory.getbasetemp()
    for line, damage in lines:
        if damage == 0:  # cut off in the middle
            line = line[: len(line) // 2]
        found = answer("metadata lines", read, folder, "p.jsonl", line.encode("utf-8", "surrogatepass"))
        if found is None:
            continue
        [entry] = found
        assert json.dumps(entry) == json.dumps(json.loads(line))
        entry["prompt"].encode()  # as every tokenizer and file wants it
        text = answer("texts that are wanted", target_text, entry["prompt"])
        assert text is None or text.strip()
        if answer("metadata of GenEval", lambda entry=entry: judge.check([entry]) or True):
            [value] = judge.score(BLANK, [entry])["geneval"]
            assert 0 <= value <= 1
            WorldGenEval().report(BLANK, [entry["prompt"]], [entry])


PARTS = WORDS | st.sampled_from(
    ["prompt", "Prompt", "prompt,n", "a,b", 'a,"b', "prompt\tn", "a\tb", "[", "]", '"a"', "\ufeff"]
)
ENDS = st.sampled_from(["\n", "\r\n", ",", "\t", "\r"])
CONTENTS = st.tuples(st.lists(PARTS, max_size=6), ENDS).map(lambda both: both[1].join(both[0]))


@cases(300)
@given(
    content=CONTENTS,
    kind=st.sampled_from([".txt", ".csv", ".tsv", ".json", ".jsonl", ".TXT", "", ".xlsx"]),
    damage=st.binary(max_size=3),
    place=st.integers(0, 40),
)
def test_files(tmp_path_factory, content, kind, damage, place):
    data = content.encode("utf-8", "surrogatepass")
    data = data[:place] + damage + data[place:]
    found = answer("prompt files", read, tmp_path_factory.getbasetemp(), f"p{kind}", data)
    for entry in found or ():
        prompt = entry["prompt"]
        prompt.encode()
        assert kind.lower() not in (".csv", ".tsv", ".txt") or prompt.strip()
        assert not any(unicodedata.category(c) == "Cs" for c in prompt)
        assert kind.lower() != ".txt" or prompt in data.decode("utf-8-sig")
