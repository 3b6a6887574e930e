"""No tensor is left on the CPU where the models are on a GPU: see pretend_gpu.py, which needs none."""
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample
import toyworld

ROOT = Path(__file__).parents[1]
EXAMPLES, SHIPPED = ROOT / "examples", ROOT / "weights" / "toyworld"
ZOE, LEO, PROMPT = EXAMPLES / "zoe.png", EXAMPLES / "leo.png", "a woman standing on the beach"


def on_gpu(folder: Path, *commands: list) -> str:
    """Run scripts one after the other on the pretended GPU; what they print."""
    words = [str(word) for command in commands for word in (*command, "--")][:-1]
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "pretend_gpu.py"), *words], cwd=folder,
                          capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


SCRIPT = """
import torch
a, b = torch.ones(2).to("gpu:0"), torch.ones(2)
for code in ("a + b", "b[a.long()]", "torch.where(a > 0, a, b)", "torch.cat([a, b])", "a.mul_(b)"):
    try:
        eval(code)
    except RuntimeError as error:
        assert "expected all tensors on the same device" in str(error), error
    else:
        raise AssertionError(code)
c = a + b.to(a.device) + a[b.long()] + b.sum() + torch.ones(2, device=a.device) + a.copy_(b)
assert c.device == a.device and c.cpu().tolist() == [7, 7]
print("seen")
"""


def test_what_is_left_on_the_cpu_is_found(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    assert on_gpu(tmp_path, [tmp_path / "script.py"]) == "seen\n"


def test_drawing(tmp_path, monkeypatch):
    """The picture is the CPU's."""
    common = ["--prompt", PROMPT, "--steps", 2, "--seed", 1]
    style, control = SHIPPED / "crayons.safetensors", ["--controlnet", SHIPPED, "--control-image",
                                                       EXAMPLES / "waving.png"]
    styled = [*common, "--subject", ZOE, "--lora", style, *control]
    on_gpu(tmp_path, ["sample.py", *styled, "--output", "gpu.png"],
           ["sample.py", *common, "--subject", ZOE, "--sparse", 0.1, "--strength", 0.5, "--sampler", "ddim",
            "--dtype", "fp16", "--save-routing", "maps.png", "--output", "other.png"],
           ["apps/edit.py", "--image", EXAMPLES / "couple.png", "--mask", EXAMPLES / "couple_mask.png",
            "--source-prompt", "a person and a person", "--keep", 1, "--subject", f"2={LEO}", "--steps", 2],
           ["apps/morph.py", "--prompt", PROMPT, "--frames", 2, "--subjects", ZOE, LEO, "--seed", 0,
            "--steps", 2, "--interpolation", "spherical"],
           ["evaluate.py", "--output", "evaluation", "--count", 2, "--steps", 2])
    monkeypatch.chdir(tmp_path)
    sample.main([str(word) for word in (*styled, "--output", "cpu.png", "--device", "cpu")])
    ours, theirs = (np.array(Image.open(name)).astype(int) for name in ("gpu.png", "cpu.png"))
    assert np.abs(ours - theirs).max() <= 1


def test_training(tmp_path):
    """All stages, and SD1.5's preset: from a folder, with a cache, gone on with."""
    def stage(name: str, weights: str | None, *more, output: str | None = None) -> list:
        sizes = ["--samples", 8, "--batch-size", 4, "--steps", 2, "--log-every", 1,
                 *(["--samples-every", 0] if weights == "prior" and name != "moa" or more else [])]
        return ["tests/test_train.py", name, *sizes, *(["--weights", weights] if weights else []),
                "--output", output or name, *more]

    toyworld.main(["--output", str(tmp_path / "world"), "--count", "8", "--seed", "100"])
    data = ["--preset", "sd15", "--data", "world"]
    said = on_gpu(
        tmp_path, stage("vae", None), stage("clip", "vae"), stage("prior", "clip"), stage("moa", "prior"),
        stage("controlnet", "prior"), stage("lora", "prior"), stage("classifier", None),
        stage("moa", "prior", *data, "--accumulate", 2, output="streamed"),
        stage("moa", "prior", *data, "--cache", "cache", "--checkpoint-every", 1, output="cached"),
        stage("moa", "prior", *data, "--cache", "cache", "--resume", output="cached"))
    assert said.count("is trained, 2 steps") == 10
