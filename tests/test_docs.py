"""README and docs: links lead somewhere, commands are understood, edits fit the code."""
import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
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
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if kind:  # a program, an edit, an equation
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if "[" in line:  # a synopsis
                    continue
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "-m"] and words[2] != "pytest":
                    package = (ROOT / words[2] / "__main__.py").exists()
                    found.append((f"{words[2]}.__main__" if package else words[2], words[3:]))
                elif words and words[0] in ("python", "torchrun"):
                    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                    if script:
                        found.append((words[script][:-3].replace("/", "."), words[script + 1:]))
    return found


def edits(page: Path) -> list[tuple[str, str, str]]:
    """(file, lines before, lines after) of every edit in a page's diff blocks: a line `--- FILE`, then lines
    that stay, go (-) or come (+)."""
    found = []
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            file, *lines = part.splitlines()
            found.append((file, *("\n".join(line[1:] for line in lines if line[0] in kept)
                                  for kept in (" -", " +"))))
    return found


def anchors(page: Path) -> set[str]:
    """What # can lead to in a page, as GitHub makes it of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*?) *$", text, re.MULTILINE)}


def targets(text: str) -> list[str]:
    """What the links and pictures of a page lead to, in Markdown and in HTML."""
    return [*re.findall(r"\]\(([^)#]+)\)", text),
            *re.findall(r'<(?:img|a)\b[^>]*?\b(?:src|href)="([^"#]+)', text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in targets(page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


@pytest.mark.parametrize(("file", "before", "after"), edits(ROOT / "docs" / "ablate.md"))
def test_edits_fit_the_code(file, before, after):
    code = (ROOT / file).read_text(encoding="utf-8")
    assert code.count(before) == 1 and before != after
    ast.parse(code.replace(before, after))


def test_each_ablation_has_its_row():
    """And beside it what came out, if anything did."""
    from ablate import ROWS
    text = (ROOT / "docs" / "ablate.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\d+)\. .*: (`.*`)\n((?:(?!## ).*\n)*)", text, re.MULTILINE)
    assert [int(number) for number, *_ in sections] == list(range(1, 13))
    for _, names, section in sections:
        for name in re.findall("`(.*?)`", names):
            assert name in ROWS and result(name) in section, f"{name}: {result(name)}"
    assert result("moa") in text


def result(name: str) -> str:
    """A row's scores as docs/ablate.md gives them, mean over its seeds."""
    files = [json.loads(file.read_text()) for file in ROOT.glob(f"docs/ablations/{name}/seed-*/results.json")]
    if not files:
        return "not run yet"
    means = [sum(scores[column]["mean"] for scores in files) / len(files)
             for column in ("identity", "locality", "prior_agreement")]
    return "identity {}, locality {}, agreement with the prior {}".format(*(
        f"{mean:.3f}".lstrip("0") for mean in means))


def test_the_table_of_ablations_is_that_of_the_results(tmp_path):
    from ablate import table
    results = shutil.copytree(ROOT / "docs" / "ablations", tmp_path / "results")
    assert table(results) in (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")


# (row, column) of the differences in the text, in its order.
FOUND = [("no-encoding", "identity"), ("people-only-no-router-loss", "identity"), ("double", "identity"),
         ("double", "mixup"), ("one-branch-600", "identity"), ("one-branch", "locality"),
         ("one-branch-400", "locality"), ("no-object-loss", "identity"),
         ("no-object-loss", "prior_agreement"), ("every-second", "identity"),
         ("router-deep", "router_iou"), ("router-64", "router_iou")]
SUMMED_UP = [("one-branch", "prior_agreement"), ("one-branch-800", "prior_agreement"),
             ("people-only", "locality"), ("no-encoding", "identity")]


def test_differences_in_the_text_are_those_of_the_table():
    """The summary names no signs where its words do."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    head, _, *rows = page.split("The row minus `moa`")[1].split("\n\n")[1].splitlines()
    columns = [name.strip() for name in head.split("|")]
    table = {row[1].strip(" `"): dict(zip(columns, [cell.strip(" *") for cell in row], strict=True))
             for row in (row.split("|") for row in rows)}
    findings = page.split("What shows after 45,000 pictures")[1].split("![")[0]
    for text, places in ((findings, FOUND), (page.split("## The shipped weights")[0], SUMMED_UP)):
        said = re.findall(r"([+-]?)(\.\d{3}) ± (\.\d{3})", text)
        cells = [table[row][column] for row, column in places]
        assert [f"{sign or cell[0]}0{less} ± 0{error}" for (sign, less, error), cell
                in zip(said, cells, strict=True)] == cells


def test_the_claim_that_matters_is_that_of_its_results():
    """The table of 256 cases, from the scores case by case."""
    import numpy as np
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    cases = {name: {column: np.array(values, float) for column, values in json.loads(
        (ROOT / f"docs/ablations/{name}/seed-1/results_256.json").read_text())["cases"].items()}
        for name in ("moa", "one-branch", "one-branch-800", "one-branch-600")}
    means = [f"{cases['moa'][column].mean():.3f}".removeprefix("0")
             for column in ("identity", "prior_agreement", "locality")]
    assert "| MoA | {} |  | {} |  | {} | |".format(*means) in page
    for name, label in (("one-branch", "one branch"), ("one-branch-800", "one branch, people below t = 800"),
                        ("one-branch-600", "one branch, people below t = 600")):
        cells = []
        for column in ("identity", "prior_agreement", "locality"):
            values, less = cases[name][column], cases["moa"][column] - cases[name][column]
            error = 2 * less.std(ddof=1) / len(less) ** 0.5
            cells += [f"{values.mean():.3f}".removeprefix("0"), f"{less.mean():+.3f} ± {error:.3f}"]
        assert f"| {label} | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("table", ["groups", "scenes", "pairs", "covered"])
def test_generalization_is_that_of_the_results(table):
    from bench.generalization import markdown
    results = json.loads((ROOT / "weights/toyworld/training/generalization.json").read_text())
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    head, *rows = markdown(results[table]).splitlines()
    assert "\n".join([head.split(" | ", 1)[1], *rows]) in page  # the first cell says what is drawn


@pytest.mark.parametrize(("name", "seed", "column"), [
    ("unseen-pairs", 1, 1), ("unseen-pairs", 2, 2), ("moa", 1, 3), ("moa", 2, 4)])
def test_unseen_pairs_are_those_of_the_results(name, seed, column):
    from evaluate import cell
    results = json.loads((ROOT / f"docs/ablations/{name}/seed-{seed}/generalization.json").read_text())
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    table = page.split("| | never seen together, seed 1 |")[1].split("|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    groups = results["groups"]
    scores = [groups["training's people, known scenes"]["identity"],
              groups["new people, known scenes"]["identity"],
              groups["new people with a pair of `unseen-pairs`"]["identity"],
              *(pair["both right"] for pair in results["pairs"].values())]
    assert [row[column] for row in rows] == [cell(score) for score in scores]


EVALUATION, FRESH = (json.loads((ROOT / f"weights/toyworld/training/{name}.json").read_text())
                     for name in ("evaluation", "evaluation_fresh"))


@pytest.mark.parametrize(("evaluation", "first"), [(EVALUATION, 0), (FRESH, 256)])
def test_the_evaluation_is_that_of_the_shipped_weights(evaluation, first):
    from evaluate import checksum
    sums = evaluation["run"]["sha256"]
    assert {name: checksum(ROOT / "weights/toyworld" / f"{name}.safetensors") for name in sums} == sums
    assert evaluation["cases"]["number"] == list(range(first, first + 256))


def test_the_scores_are_those_of_the_evaluation():
    from evaluate import cell, markdown
    table = [line for line in markdown(EVALUATION).splitlines() if line.startswith("|")]
    assert len(table) > 20 and "\n".join(table) in (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row, name in {"place": "context", "activity": "activity", "identity:": "identity",
                      "identity mix-up": "mixup", "background change": "locality"}.items():
        cells = re.search(rf"^\| {row}.*", text, re.MULTILINE)[0].split("|")
        assert [text.strip() for text in cells[3:5]] == [cell(EVALUATION[name]), cell(FRESH[name])], name
        if f"prior_{name}" in EVALUATION:
            assert cells[2].split()[0] == f"{EVALUATION[f'prior_{name}']['mean']:.3f}", name


def test_activities_are_those_of_both_evaluations():
    """The table of the activities that fail, of 512 cases."""
    from evaluate import cast
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    named, right = ("waving", "standing", "shaking hands"), {}
    for each in (EVALUATION, FRESH):
        cases = each["cases"]
        for number, *both in zip(cases["number"], cases["prior_activity"], cases["activity"], strict=True):
            activity = cast(number)[0].activity
            right.setdefault(activity if activity in named else "the ten others", []).append(both)
    for activity in (*named, "the ten others"):
        prior, moa = zip(*right[activity], strict=True)
        alone = [sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((prior, moa), (moa, prior))]
        shares = [f"{sum(values) / len(values):.2f}".removeprefix("0") for values in (prior, moa)]
        assert f"| {activity} | {len(moa)} | {' | '.join(shares)} | {alone[0]} | {alone[1]} | " in page


def test_requirements_are_there():
    for page in PAGES:
        for file in re.findall(r"-r (\S*requirements\S*\.txt)", page.read_text(encoding="utf-8")):
            assert (ROOT / file).is_file(), f"{page.name}: {file}"


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
    wanted = {"train", "sample", "evaluate", "data.build", "apps.describe", "weights.convert_sd15"}
    assert wanted <= {module for module, _ in commands()}


def test_git_ignores_what_commands_write():
    flags = "--output", "--save-routing", "--animation", "--sheet", "--cache"
    written = {arguments[i + 1] for _, arguments in commands() for i, flag in enumerate(arguments)
               if flag in flags}
    written |= {f"{module.split('.')[-1]}.png" for module, arguments in commands()
                if module.startswith(("apps.", "sample")) and "--output" not in arguments}
    names = sorted(name for name in written if not name[0].isupper() and name[0] not in "/.")
    assert {"sample.png", "swap.png", "runs/vae", "handshake"} <= set(names)
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    result = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    assert result.stdout.splitlines() == names


def test_curves_of_no_run(tmp_path):
    for output, said in ((tmp_path / "a.png", "metrics.jsonl cannot be read: No such file or directory"),
                         (tmp_path / "a.txt", "must be a file whose name ends in .png")):
        result = subprocess.run([sys.executable, str(ROOT / "docs" / "curves.py"), str(tmp_path / "run"),
                                 "--output", str(output)], capture_output=True, text=True, check=False)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ") and said in result.stderr
