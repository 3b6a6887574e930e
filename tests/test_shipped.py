"""The weights that ship with the code, and every sample and evaluate command of the pages about them."""
import ast
import base64
import json
import re
import shlex
import sys
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import evaluate
import sample
import toyworld
from images import read_picture
from pipeline import Pipeline
from subjects import BoundSubject

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "weights" / "toyworld"


def documented(script: str) -> list[list[str]]:
    """The arguments of all commands of one script in three pages that need no other weights."""
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8")
                      for page in ("README.md", "docs/apps.md", "docs/convert.md"))
    blocks = re.findall(r"^```\w*\n(.*?)^```", pages, re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines
            if line.startswith(f"python {script} ") and "weights/sd15" not in line]


def test_weights_stay_small():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 32e6


@pytest.mark.parametrize("arguments", documented("sample.py"))
def test_documented_sample_command(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("examples", "weights"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    sample.main([*arguments, "--steps", "2"])
    assert list(tmp_path.rglob("*.png"))


def test_who_is_no_subject_of_the_small_world(tmp_path):
    """People whom it was not trained on are like those whom it was; a document and a landscape are not."""
    pipeline = Pipeline.load(SHIPPED, SHIPPED / "moa.safetensors")
    rng, people = np.random.default_rng(8), []
    for number in range(40):
        person = toyworld.sample_identity(rng, "test")
        people.append(Image.fromarray(toyworld.render_reference(person, 90_000 + number)))
    text, land = Image.new("RGB", (640, 480), "white"), Image.new("RGB", (640, 480), "skyblue")
    for row in range(20, 460, 20):
        ImageDraw.Draw(text).text((20, row), "Dear Sir or Madam, " * 5, "black")
    ImageDraw.Draw(land).polygon([(0, 480), (200, 200), (400, 300), (640, 250), (640, 480)], "darkgreen")
    for image, refused in (*((image, False) for image in people), (text, True), (land, True)):
        image.save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="docs/photos.md") if refused else nullcontext():
            pipeline.encode_photos([BoundSubject("man", 3, ["a.png"])], [[read_picture(tmp_path / "a.png")]])


def test_the_first_steps_show_what_their_cells_make(monkeypatch):
    """The notebook's, with two steps a picture: where a picture stands below a cell, the cell gives one."""
    load = Pipeline.load

    def load_swift(*files) -> Pipeline:
        pipeline = load(*files)
        pipeline.models.config["sampling"]["steps"] = 2
        return pipeline

    monkeypatch.setattr(Pipeline, "load", load_swift)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT / "docs")  # where Jupyter starts it
    names, notebook = {}, json.loads(Path("first_steps.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            if isinstance(last := tree.body[-1], ast.Expr):  # what the notebook shows
                shown = ast.Assign([ast.Name("shown", ast.Store())], last.value)
                tree.body[-1] = ast.fix_missing_locations(ast.copy_location(shown, last))
            exec(compile(tree, "cell", "exec"), names)
            value = names.pop("shown", None)
            pictures = [output["data"]["image/png"] for output in cell["outputs"]
                        if "image/png" in output.get("data", {})]
            assert isinstance(value, Image.Image) == bool(pictures)
            for picture in pictures:
                assert Image.open(BytesIO(base64.b64decode(picture))).size == value.size


def test_readme_evaluate_command(tmp_path, monkeypatch):
    (arguments,) = documented("evaluate.py")
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(ROOT / "weights")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--count", "2", "--steps", "2"])
    evaluate.main()
    results = json.loads(Path("runs/evaluation/results.json").read_text())
    assert {"identity", "context", "locality", "mixup", "router_iou", "prior_agreement"} <= results.keys()
    assert results["judge"]["identity"]["mean"] > 0.95


def test_a_subject_changes_the_person_and_not_the_place(tmp_path):
    """Swapped subjects, same four seeds: the pictures' edges change far less than their middle."""
    pictures = {}
    for name in ("ada", "zoe"):
        sample.main(["--subject", str(ROOT / "examples" / f"{name}.png"), "--prompt",
                     "a woman standing on the beach", "--num", "4", "--seed", "0", "--output",
                     str(tmp_path / name)])
        files = sorted((tmp_path / name).glob("0*.png"))
        assert len(files) == 4
        pictures[name] = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    change = np.abs(pictures["ada"] - pictures["zoe"]).mean(-1)
    middle, edge = change[:, 24:116, 40:88].mean(), change[:, :, :16].mean()
    assert middle > 10 and edge < middle / 4
