"""Prompt files as people have them: what is read, and what is refused in one line."""

import pytest

from crd_fast.errors import UserError
from crd_fast.prompts.source import PromptSource, place_of, read_prompts

BOM = b"\xef\xbb\xbf"
CAT = {"prompt": "a red cat"}


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("bom.txt", BOM + b"a red cat\r\n\r\na dog\r\n", [CAT, {"prompt": "a dog"}]),
        ("LOUD.TXT", b"a red cat", [CAT]),
        ("bom.jsonl", BOM + b'{"prompt": "a red cat", "n": 1}\n', [CAT | {"n": 1}]),
        ("list.json", b'[{"prompt": "a red cat",\n "n": 1}, "a dog"]', [CAT | {"n": 1}, {"prompt": "a dog"}]),
        (
            "t.csv",
            BOM + b'prompt,category\r\n"a ""red"" cat, sitting",animals\r\n',
            [{"prompt": 'a "red" cat, sitting', "category": "animals"}],
        ),
        ("two-lines.csv", b'id,prompt\n7,"a red\ncat"\n', [{"id": "7", "prompt": "a red\ncat"}]),
        ("t.tsv", b"Prompt\tCategory\na red cat\tAnimals\n", [CAT | {"Category": "Animals"}]),
    ],
)
def test_what_is_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == expected
    assert PromptSource(str(tmp_path / name)).entries() == expected


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.xlsx", b"PK", "expected a name that ends in .txt, .jsonl, .json, .csv, .tsv"),
        ("p", b"a red cat", "expected a name that ends in .txt"),
        ("utf16.txt", "a red cat".encode("utf-16"), "line 1: expected UTF-8 text"),
        (
            "none.csv",
            b"text,category\na cat,animals\n",
            "line 1: expected columns that differ with one `prompt`",
        ),
        ("semicolons.csv", b"prompt;category\na cat;animals\n", "got 'prompt;category'"),
        ("twice.csv", b"prompt,Prompt\na,b\n", "line 1: expected columns that differ with one `prompt`"),
        ("bare.csv", b"prompt,category\na red cat, sitting,animals\n", "line 2: expected 2 fields, got 3"),
        ("gap.csv", b"prompt,category\n,animals\n", "line 2: expected a prompt, got none"),
        ("empty.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', "line 2: expected a prompt, got none"),
        ("empty.json", b'["a", ""]', "entry 2: expected a prompt, got none"),
        ("nul.txt", b"a red cat\n\0blurry\n", "line 2: expected text, got a NUL character"),
        ("nul.jsonl", b'{"prompt": "\\u0000blurry"}\n', "line 1: expected text, got a NUL character"),
        ("header.csv", b"prompt,category\n", "expected at least one prompt"),
        ("quote.tsv", b'prompt\n"open" on a door\n', "line 2: "),
        ("object.json", b'{"prompt": "a"}', "expected a list of prompts, got dict"),
        ("number.json", b"[3]", "entry 1: expected an object with a `prompt`, got 3"),
        ("deep.json", b"[" * 100_000, "not JSON"),
        (
            "same.jsonl",
            b'{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n',
            "line 2: expected keys that differ",
        ),
        ("same.json", b'[{"prompt": "a", "of": {"n": 1, "n": 2}}]', "got 'n' twice"),
        ("long.jsonl", b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
    ],
)
def test_what_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("promts.txt", "promts.txt: no such file, did you mean 'prompts.txt'?"),
        ("geneval-heldut", "geneval-heldut: no such file, did you mean 'geneval-heldout'?"),
        ("xyz", "no such file; lists that ship: builtin, builtin-ocr, geneval, ocr-words, builtin-heldout"),
        ("picture.png", "picture.png: no such file"),
    ],
)
def test_a_name_that_is_none(tmp_path, name, words):
    """The nearest of the files beside it, or of the lists that ship."""
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    with pytest.raises(UserError) as error:
        PromptSource(str(tmp_path / name))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name, content, where",
    [
        ("p.txt", "a dog\n\na red cat\n", "line 3"),
        ("p.jsonl", '{"prompt": "a dog"}\n{"prompt": "a red cat"}\n', "line 2"),
        ("away.jsonl", '{"prompt": "a dog", "negative_prompt": "a red cat"}\n', "line 1"),
        ("p.json", '["a dog", "a red cat"]', "entry 2"),
        ("p.csv", 'prompt\n"a\ndog"\na red cat\n', "line 4"),
    ],
)
def test_where_a_prompt_stands(tmp_path, name, content, where):
    path = tmp_path / name
    path.write_text(content)
    assert place_of("a red cat", ["geneval-heldout", str(path)]) == f"{path} {where}"
    assert place_of("a cat", ["geneval-heldout", str(path)]) == ""
