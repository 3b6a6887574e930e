"""Imports point one way, and only at packages that requirements.txt names."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"models", "moa", "samplers", "training", "toyworld", "data", "weights", "apps", "bench",
           "examples"}
ROOMS = FOLDERS | {script.stem for script in ROOT.glob("*.py")}
# What a script does without where it is not installed.
OPTIONAL = {"toyworld/sheets.py": {"matplotlib"}, "data/annotate.py": {"transformers"},
            "ablate.py": {"matplotlib"},
            "apps/demo.py": {"gradio"}, "bench/face_scores.py": {"facenet_pytorch"},
            # What the benchmarks compare with, as the tests do.
            "bench/sampling.py": {"diffusers"}, "bench/fastcomposer.py": {"diffusers"}}
# Room -> what it must not import.
FORBIDDEN = {
    "models": ROOMS - {"models"},
    "samplers": ROOMS - {"samplers"},
    "moa": ROOMS - {"moa", "models"},
    "data": ROOMS - {"data", "models"},
    "weights": ROOMS - {"models", "samplers", "weights"},
    "training": {"toyworld", "train", "sample", "evaluate", "ablate", "apps", "bench"},
}
DISTRIBUTIONS = {"huggingface_hub": "open_clip_torch", "open_clip": "open_clip_torch", "PIL": "pillow",
                 "torchvision": "open_clip_torch"}


def sources() -> list[Path]:
    files = [f for folder in FOLDERS if (ROOT / folder).is_dir() for f in (ROOT / folder).rglob("*.py")]
    return sorted([*files, *ROOT.glob("*.py")])


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[:-node.level] if node.level else ()
            names.add(".".join([*above, *([node.module] if node.module else [])]))
    return names


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(), ids=name)
def test_imports_point_one_way(path):
    room = "a script" if path.name == "__main__.py" else path.relative_to(ROOT).parts[0]
    tops = {module.split(".")[0] for module in imported(path)}
    wrong = tops & FORBIDDEN.get(room, set())
    if path == ROOT / "weights" / "export_moa.py":
        wrong -= {"moa"}  # a MoA file is written in one place
    if path == ROOT / "data" / "annotate.py":
        wrong -= {"weights"}  # and a name on the hub is looked up in one
    assert not wrong, f"{name(path)} imports {', '.join(sorted(wrong))}"
    if room == "data":
        inner = {m for m in imported(path) if m.split(".")[0] == "models"}
        assert inner <= {"models.errors"}, f"{name(path)} imports {inner}"
    if room == "moa":
        inner = {m for m in imported(path) if m.split(".")[0] == "models"}
        assert inner <= {"models.attention"}, f"{name(path)} imports {inner}"
    if room in FORBIDDEN or room == "pipeline.py":
        assert not tops & ({"train", "sample", "evaluate", "apps", "bench", "training", "toyworld"} - {room})


@pytest.mark.parametrize("path", sources(), ids=name)
def test_third_party_packages_are_required(path):
    requirements = ROOT / "requirements.txt"
    if not requirements.exists():
        pytest.skip("requirements.txt does not exist yet")
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    named = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_")
             for line in lines if line and not line.startswith("-")}
    assert named == {"torch", "einops", "safetensors", "open_clip_torch", "numpy", "pillow", "tqdm"}
    tops = {module.split(".")[0] for module in imported(path)} - ROOMS - {"tests"} - sys.stdlib_module_names
    missing = {DISTRIBUTIONS.get(top, top) for top in tops} - named - OPTIONAL.get(name(path), set())
    assert not missing, f"{name(path)} imports {', '.join(sorted(missing))}"


def test_there_is_something_to_check():
    assert {"models/unet.py", "moa/mixture.py", "pipeline.py"} <= {name(path) for path in sources()}
    assert "models.attention" in imported(ROOT / "moa" / "mixture.py")


def test_commands_set_up_threads_before_torch():
    """Torch reads once how its threads wait for each other: when it is imported."""
    code = """
import importlib, os, sys
sys.modules["torch"] = None  # whoever imports it ends there
for name in sys.argv[1:]:
    os.environ.pop("OMP_WAIT_POLICY", None)
    for module in [module for module in sys.modules if module.startswith("models")]:
        del sys.modules[module]
    try:
        importlib.import_module(name)
    except (ImportError, SystemExit):
        print(name, os.environ.get("OMP_WAIT_POLICY"))
"""
    names = ["sample", "train", "evaluate", "ablate", "pipeline", "apps", "models"]
    found = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    assert [line.split() for line in found] == [[name, "PASSIVE"] for name in names]
