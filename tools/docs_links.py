"""A hook of mkdocs: files of the repository that pages name, outside docs/, are part of the site.

In the repository a page says `../benchmarks/results/ocr.json`; on the site that file is under `repository/`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")


def outside(page: Path) -> list[str]:
    """The files and folders that a page names outside docs/, from the root."""
    return [match.group(1) for match in OUTSIDE.finditer(page.read_text(encoding="utf-8"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in {name for page in Path(config.docs_dir).glob("*.md") for name in outside(page)}:
        path = ROOT / name
        found = [path] if path.is_file() else sorted(path.glob("*.*"))
        for file in found:
            # as text, so that a page of ours elsewhere is not rendered with links that lead nowhere
            where = f"repository/{file.relative_to(ROOT)}" + (".txt" if file.suffix == ".md" else "")
            files.append(File.generated(config, where, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    def rewritten(match: re.Match) -> str:
        name = match.group(1) + (".txt" if match.group(1).endswith(".md") else "")
        return f"](repository/{name})"

    return OUTSIDE.sub(rewritten, markdown)
