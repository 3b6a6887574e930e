"""README and docs: links lead somewhere, commands are understood."""
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command of ours in a code block of a page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if "[" in line:  # a synopsis
                    continue
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "-m"] and words[2] != "pytest":
                    found.append((words[2], words[3:]))
                elif words and words[0] in ("python", "torchrun"):
                    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                    if script:
                        found.append((words[script][:-3].replace("/", "."), words[script + 1:]))
    return found


def targets(text: str) -> list[str]:
    """What the links and pictures of a page lead to, in Markdown and in HTML."""
    return [*re.findall(r"\]\(([^)#]+)\)", text),
            *re.findall(r'<(?:img|a)\b[^>]*?\b(?:src|href)="([^"#]+)', text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in targets(page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("module", "arguments"), commands(), ids=lambda v: v if isinstance(v, str) else None)
def test_commands_are_understood(module, arguments, monkeypatch):
    """By the command's own parser; what it then does has tests of its own."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    parse = getattr(importlib.import_module(module), "parse_args", None)
    if parse is None:
        pytest.skip("parses in its main function; run by its own tests")
    parse(arguments) if parse.__code__.co_argcount else parse()


def test_pictures_in_html_are_links():
    text = '[a](b.md) ![c](d.png) <img width="20" src="e.png"> <a href="f.md#g"><img\nsrc="h.png"></a>'
    assert targets(text) == ["b.md", "d.png", "e.png", "f.md", "h.png"]


def test_there_are_commands():
    assert {"train", "sample", "evaluate", "data.build", "weights.convert_sd15"} <= {m for m, _ in commands()}
