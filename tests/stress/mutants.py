"""Seed bugs that others have had, one at a time, and see whether the tests notice.

    python tests/stress/mutants.py
    python tests/stress/mutants.py --only 3

Each is a change of a few characters in a copy of the code; the test named with it runs on the copy and has to
fail. They are what many implementations of these models got wrong without an error. test_mutants.py does the
same with every run of the tests.

Exit status: 0 every bug was caught, 1 one was not.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What is wrong -> file, text that is there once, what takes its place, the test that should notice.
MUTANTS = {
    "the VAE's norms with eps 1e-5": (
        "models/vae.py", "VAE_EPS = 1e-6", "VAE_EPS = 1e-5",
        "models::test_norms_have_the_eps_of_the_public_models"),
    "the transformer's norm with eps 1e-5": (
        "models/attention.py", "dim, eps=1e-6)", "dim, eps=1e-5)",
        "models::test_norms_have_the_eps_of_the_public_models"),
    "GEGLU with the tanh GELU": (
        "models/attention.py", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")',
        "models::test_unet_equals_diffusers"),
    "CLIP's text encoder with the exact GELU": (
        "models/clip_text.py", "x * torch.sigmoid(1.702 * x)", "F.gelu(x)",
        "models::test_text_encoder_equals_transformers"),
    "prompts padded with zeros": (
        "models/clip_text.py", "ids + [EOS] *", "ids + [0] *", "models::test_padding_is_the_end_token"),
    "sines before cosines of the timestep": (
        "models/attention.py", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]",
        "models::test_timestep_embedding_is_cosines_then_sines"),
    "the VAE's encoder padded on all sides": (
        "models/vae.py", "Downsample(channels[i], symmetric=False)",
        "Downsample(channels[i], symmetric=True)", "models::test_vae_equals_diffusers"),
    "LDM's decoder levels not reversed": (
        "weights/names.py", "3 - int(match[1])", "int(match[1])", "convert::test_ldm_safetensors"),
    "LDM's norms and convolutions swapped": (
        "weights/names.py", r'(r"\.out_layers\.0\.", ".norm2.")', r'(r"\.out_layers\.0\.", ".conv2.")',
        "convert::test_ldm_safetensors"),
    "layers numbered from the last": (
        "moa/install.py", "    yield layer, \"self\", block.attn1",
        "    layer = 15 - layer\n        yield layer, \"self\", block.attn1",
        "moa::test_record_routing_has_all_layers_in_forward_order"),
    "the experts' weights swapped": (
        "moa/mixture.py", "r[..., :1] * self.prior", "r[..., 1:2] * self.prior",
        "moa::test_forced_away_from_the_prior_it_is_all_personalized"),
    "the router loss on the people": (
        "moa/loss.py", "((1 - mask) * (1 - routing)) ** 2", "(mask * (1 - routing)) ** 2",
        "moa::test_router_loss_by_hand"),
    "the object loss of the other sign": (
        "moa/loss.py", "outside - inside", "inside - outside", "moa::test_object_loss_by_hand"),
    "the object loss over absent subjects": (
        "moa/loss.py", "(balance.mean(1) * present)", "balance.mean(1)", "moa::test_object_loss_by_hand"),
    "the router loss over all layers": (
        "training/moa.py", "if key.layer in self.config.router_layers]", "]",
        "health::test_the_losses_see_their_layers_only"),
    "guidance from the wrong half": (
        "samplers/guidance.py", "uncond, cond = denoise", "cond, uncond = denoise",
        "samplers::test_guided_doubles_the_batch_and_extrapolates"),
    "alpha_bar from linear betas": (
        "samplers/schedule.py", "(first + (last - first) * t / (NUM_TIMESTEPS - 1)) ** 2",
        "(first ** 2 + (last ** 2 - first ** 2) * t / (NUM_TIMESTEPS - 1))",
        "samplers::test_alpha_bar_equals_diffusers"),
    "DDIM without the first timestep's offset": (
        "samplers/ddim.py", "ts[i + 1] if i + 1 < steps else 0", "ts[min(i + 1, steps - 1)]",
        "samplers::test_ddim_equals_diffusers"),
}


def copy_tree(root: Path) -> Path:
    """The code and its tests at a new place, without weights, which may be large."""
    return shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "runs", "*.safetensors", "*.ckpt"))


def catch(root: Path, file: str, old: str, new: str, test: str) -> bool:
    """Whether the test fails with the bug in the copy `root`, which is mended afterwards."""
    path, (module, name) = root / file, test.split("::")
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"error: {old!r} is {text.count(old)} times in {file}: mend MUTANTS")
    path.write_text(text.replace(old, new), encoding="utf-8")
    child = os.fork()
    if not child:
        run_test(root, f"tests/test_{module}.py::{name}")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.write_text(text, encoding="utf-8")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"error: the tests could not be run: {(root / 'log').read_text()[-2000:]}")
    return status == pytest.ExitCode.TESTS_FAILED


def run_test(root: Path, test: str) -> None:
    """Run a test in this process, and end it."""
    os.chdir(root)
    sys.path.insert(0, str(root))
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1000
    try:
        status = pytest.main(["-n0", "-x", "-q", "-p", "no:cacheprovider", test])
    finally:
        sys.stdout.flush()
        os._exit(status)


def import_libraries() -> None:
    """What takes seconds to import, once for all tests; nothing of the tree, whose copy each imports."""
    before = {*sys.modules}
    sys.path.insert(0, str(ROOT))
    from models.open_clip_import import mend_torchvision
    mend_torchvision()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    assert AutoencoderKL and UNet2DConditionModel and CLIPTextModel  # they are imported when they are named
    sys.path.remove(str(ROOT))
    for name in {*sys.modules} - before:
        if name.split(".")[0] == "models":
            del sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, metavar="N", help="this bug alone, counted from 1")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # of a file that has another text a moment later
    import_libraries()
    survived = 0
    print("bug | caught by | seconds", "---|---|---", sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        root = copy_tree(Path(temporary) / "copy")
        # A change that is no bug passes, so that a bug which no test notices would as well.
        file, old, _, test = MUTANTS["the object loss of the other sign"]
        if catch(root, file, old, f"({old})", test):
            sys.exit(f"error: {test} fails without a bug: {(root / 'log').read_text()[-2000:]}")
        for number, (name, change) in enumerate(MUTANTS.items(), 1):
            if args.only in (None, number):
                begin, caught = time.monotonic(), catch(root, *change)
                survived += not caught
                test = change[-1].split("::")[1]
                print(f"{name} | {test if caught else '**nothing**'} | {time.monotonic() - begin:.0f}",
                      flush=True)
    print(f"{1 if args.only else len(MUTANTS)} bugs, {survived} not caught")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
