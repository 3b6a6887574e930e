"""README and docs: links lead somewhere, commands are understood, edits fit the code."""
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


def commands(pages: list[Path] = PAGES) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command of ours in a code block of a page."""
    found = []
    for page in pages:
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


@pytest.mark.parametrize(("file", "before", "after"), edits(ROOT / "docs" / "edit.md"))
def test_edits_fit_the_code(file, before, after):
    code = (ROOT / file).read_text(encoding="utf-8")
    assert code.count(before) == 1 and before != after
    ruff = [sys.executable, "-m", "ruff", "check", "--quiet", "--select", "F821", "--stdin-filename", file,
            "-"]
    edited = code.replace(before, after)
    done = subprocess.run(ruff, input=edited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout  # it parses, and all names are known


def test_each_ablation_is_an_experiment():
    """And beside it what came out, if anything did."""
    from ablate import EXPERIMENTS
    text = (ROOT / "docs" / "edit.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\d+)\. .*: (`.*`)\n((?:(?!## ).*\n)*)", text, re.MULTILINE)
    assert [int(number) for number, *_ in sections] == list(range(1, 13))
    for _, names, section in sections:
        for name in re.findall("`(.*?)`", names):
            assert name in EXPERIMENTS and result(name) in section, f"{name}: {result(name)}"
    assert result("moa") in text and result("encoding/moa") in text


# Trained since the encoding of (t, l) was mended; `moa` beside it, too.
ENCODING = {"no-encoding": "encoding/no-encoding"}


def result(name: str) -> str:
    """An experiment's scores as docs/edit.md gives them, mean over its seeds."""
    found = ROOT.glob(f"docs/ablations/{ENCODING.get(name, name)}/seed-*/results.json")
    files = [json.loads(file.read_text()) for file in found]
    if not files:
        return "not run yet"
    means = [sum(scores[column]["mean"] for scores in files) / len(files)
             for column in ("identity", "locality", "prior_agreement")]
    return "identity {}, background change {}, agreement with the prior {}".format(*(
        f"{mean:.3f}".lstrip("0") for mean in means))


ABLATIONS = ROOT / "docs" / "ablations" / "README.md"


def test_the_table_of_ablations_is_that_of_the_results(tmp_path):
    from ablate import table
    results = shutil.copytree(ROOT / "docs" / "ablations", tmp_path / "results")
    for folder in (results, results / "encoding"):
        assert table(folder) in ABLATIONS.read_text(encoding="utf-8")


# How docs/results.md calls an experiment.
CALLED = {"one finetuned branch": "one-branch", "the same, people enter below t = 800": "one-branch-800",
          "the same, people enter below t = 600": "one-branch-600", "loss on the people alone": "people-only",
          "... and no router loss": "people-only-no-router-loss", "no router loss": "no-router-loss",
          "no object loss": "no-object-loss", "twice the training": "double", "no (t, l)": "no-encoding"}


def test_differences_of_the_results_are_those_of_the_table():
    def cells(line: str) -> list[str]:
        return [cell.strip(" *`") for cell in line.strip("|").split("|")]

    page = ABLATIONS.read_text(encoding="utf-8")
    table = {}
    for part in page.split("minus `moa`")[1:]:
        head, _, *lines = part.split("\n\n")[1].splitlines()
        table |= {cells(line)[0]: dict(zip(cells(head), cells(line), strict=True)) for line in lines}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = page.split("| | identity | background change |")[1].split("\n\n")[0].splitlines()[2:]
    for (called, name), row in zip(CALLED.items(), rows, strict=True):
        label, *differences = cells(row)
        assert label.startswith(called)
        columns = ("identity", "background change", "prior_agreement")
        assert differences == [table[name][column] for column in columns], label


def test_the_claim_that_matters_is_that_of_its_results():
    """The table of 256 cases, from the scores case by case."""
    import numpy as np
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("scenes", ["known scenes", "new scenes"])
@pytest.mark.parametrize("people", ["training's people", "new people"])
def test_generalization_is_that_of_the_results(people, scenes):
    from evaluate import cell
    results = json.loads((ROOT / "weights/toyworld/training/generalization.json").read_text())["groups"]
    group = f"{people}, {scenes}"
    cells = [cell(results[group][score]) for score in ("identity", "activity", "prior's activity")]
    assert f"| {' | '.join([group, *cells])} |" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


EVALUATION, FRESH = (json.loads((ROOT / f"weights/toyworld/training/{name}.json").read_text())
                     for name in ("evaluation", "evaluation_fresh"))


@pytest.mark.parametrize(("evaluation", "first"), [(EVALUATION, 0), (FRESH, 256)])
def test_the_evaluation_is_that_of_the_shipped_weights(evaluation, first):
    from evaluate import checksum
    sums = evaluation["run"]["sha256"]
    files = {name: {"judge": "classifier"}.get(name, name) + ".safetensors" for name in sums}
    assert {name: checksum(ROOT / "weights/toyworld" / file) for name, file in files.items()} == sums
    assert evaluation["cases"]["number"] == list(range(first, first + 256))


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_scores_are_those_of_the_evaluation(page):
    from evaluate import cell
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = {"place right": "context", "activity right": "activity", "identity:": "identity",
            "identity mix-up:": "mixup", "background change /": "locality"}
    if page != "README.md":
        rows |= {"agreement with": "prior_agreement", "variety": "variety", "IoU of": "router_iou"}
    for row, name in rows.items():
        cells = re.search(rf"^\| {row}.*\(.*", text, re.MULTILINE)[0].split("|")
        assert [text.strip() for text in cells[3:5]] == [cell(EVALUATION[name]), cell(FRESH[name])], name
        if f"prior_{name}" in EVALUATION:
            assert cells[2].split()[0] == f"{EVALUATION[f'prior_{name}']['mean']:.3f}", name


def test_every_score_is_explained():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    scores = {name for name, value in EVALUATION.items() if isinstance(value, dict) and "n" in value}
    assert len(scores) > 15 and all(f"`{name}`" in text for name in scores - {"prior_context"})


def test_activities_are_those_of_both_evaluations():
    """The table of the activities that fail, of 512 cases."""
    from toyworld.benchmark import case_scenes
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    named, right = ("waving", "standing", "shaking hands"), {}
    for each in (EVALUATION, FRESH):
        cases = each["cases"]
        for number, *both in zip(cases["number"], cases["prior_activity"], cases["activity"], strict=True):
            activity = case_scenes(number)[0].activity
            right.setdefault(activity if activity in named else "the ten others", []).append(both)
    for activity in (*named, "the ten others"):
        prior, moa = zip(*right[activity], strict=True)
        alone = [sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((prior, moa), (moa, prior))]
        shares = [f"{sum(values) / len(values):.2f}".removeprefix("0") for values in (prior, moa)]
        assert f"| {activity} | {len(moa)} | {' | '.join(shares)} | {alone[0]} | {alone[1]} |" in page


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
