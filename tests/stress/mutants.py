"""Seed bugs that others have had, one at a time, and see whether the tests notice.

    python tests/stress/mutants.py
    python tests/stress/mutants.py --only 3

Each is a change of a few characters in a copy of the code; the tests named with it run on the copy until one
fails. They are what many implementations of these models got wrong without an error.

Exit status: 0 every bug was caught, 1 one was not.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What is wrong -> file, text that is there once, what takes its place, the tests that should notice.
MUTANTS = {
    "the VAE's norms with eps 1e-5": ("models/vae.py", "VAE_EPS = 1e-6", "VAE_EPS = 1e-5", "models"),
    "the transformer's norm with eps 1e-5": ("models/attention.py", "dim, eps=1e-6)", "dim, eps=1e-5)",
                                             "models"),
    "GEGLU with the tanh GELU": ("models/attention.py", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")',
                                 "models"),
    "CLIP's text encoder with the exact GELU": ("models/clip_text.py", "x * torch.sigmoid(1.702 * x)",
                                                "F.gelu(x)", "models"),
    "prompts padded with zeros": ("models/clip_text.py", "ids + [EOS] *", "ids + [0] *", "models"),
    "sines before cosines of the timestep": ("models/attention.py", "[angles.cos(), angles.sin()]",
                                             "[angles.sin(), angles.cos()]", "models"),
    "the VAE's encoder padded on all sides": ("models/vae.py", "Downsample(channels[i], symmetric=False)",
                                              "Downsample(channels[i], symmetric=True)", "models"),
    "LDM's decoder levels not reversed": ("weights/parts.py", "3 - int(match[1])", "int(match[1])",
                                          "convert"),
    "LDM's norms and convolutions swapped": ("weights/parts.py", r'(r"\.out_layers\.0\.", ".norm2.")',
                                             r'(r"\.out_layers\.0\.", ".conv2.")', "convert"),
    "layers numbered from the last": ("moa/install.py", "    yield layer, \"self\", block.attn1",
                                      "    layer = 15 - layer\n        yield layer, \"self\", block.attn1",
                                      "moa"),
    "the experts' weights swapped": ("moa/mixture.py", "r[..., :1] * self.prior", "r[..., 1:] * self.prior",
                                     "moa"),
    "the router loss on the people": ("moa/loss.py", "((1 - mask) * (1 - routing)) ** 2",
                                      "(mask * (1 - routing)) ** 2", "moa"),
    "the object loss of the other sign": ("moa/loss.py", "outside - inside", "inside - outside", "moa"),
    "the object loss over absent subjects": ("moa/loss.py", "(balance.mean(1) * present)", "balance.mean(1)",
                                             "moa"),
    "the router loss over all layers": ("stages/moa.py", "if key.layer in self.config.router_layers and",
                                        "if", "health train"),
    "guidance from the wrong half": ("samplers/guidance.py", "uncond, cond = eps", "cond, uncond = eps",
                                     "samplers"),
    "alpha_bar from linear betas": ("samplers/schedule.py",
                                    "(first + (last - first) * t / (NUM_TIMESTEPS - 1)) ** 2",
                                    "(first ** 2 + (last ** 2 - first ** 2) * t / (NUM_TIMESTEPS - 1))",
                                    "samplers"),
    "DDIM without the first timestep's offset": ("samplers/ddim.py", "ts[i + 1] if i + 1 < steps else 0",
                                                 "ts[min(i + 1, steps - 1)]", "samplers"),
}


def catch(root: Path, file: str, old: str, new: str, tests: str) -> tuple[str | None, float]:
    """The test that fails with the bug in the copy `root`, or None; and the seconds that it took."""
    path, begin = root / file, time.monotonic()
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"error: {old!r} is {text.count(old)} times in {file}: mend MUTANTS")
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider",
                               *(f"tests/test_{name}.py" for name in tests.split())], cwd=root,
                              capture_output=True, text=True, timeout=1800, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1) or "error" in done.stdout.splitlines()[-1]:
        raise SystemExit(f"error: the tests could not be run: {done.stdout[-2000:]}{done.stderr[-1000:]}")
    failed = re.search(r"FAILED (\S+)", done.stdout)
    return None if done.returncode == 0 else failed[1].split("::")[-1].split("[")[0], time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, metavar="N", help="this bug alone, counted from 1")
    args = parser.parse_args()
    survived = 0
    print("bug | caught by | seconds", "---|---|---", sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        root = Path(temporary) / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".cache", "runs", "__pycache__"))
        for number, (name, change) in enumerate(MUTANTS.items(), 1):
            if args.only in (None, number):
                test, seconds = catch(root, *change)
                survived += test is None
                print(f"{name} | {test or '**nothing**'} | {seconds:.0f}", flush=True)
    print(f"{1 if args.only else len(MUTANTS)} bugs, {survived} not caught")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
