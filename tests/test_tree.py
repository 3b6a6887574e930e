"""`python -m apps.describe`: what it says about a model is what the model is."""
import pytest
from conftest import small_models

from moa import MultimodalPrompt, PromptConfig, add_moa
from apps import describe
from apps.describe import EXAMPLE, main


def test_tree_counts_what_there_is(world, capsys):
    main(["--weights", str(world)])
    lines = capsys.readouterr().out.splitlines()
    unet = add_moa(small_models()["unet"])
    blocks = list(unet.transformer_blocks())
    prompt = MultimodalPrompt(PromptConfig(16, 16, 32, 16))
    trained = sum(p.numel() for p in (*unet.parameters(), *prompt.parameters()) if p.requires_grad)
    assert f"{trained:,} trained parameters" in lines[-1]
    assert sum("attn1, self" in line for line in lines) == sum("attn2, cross" in line for line in lines) == 16
    found = lines[next(i for i, line in enumerate(lines) if "l = 7 " in line) + 2]
    assert "attn2, cross" in found and "router 16 -> 2" in found
    experts = sum(p.numel() for p in blocks[7].attn2.personalized.parameters())
    assert found.split()[-5:] == [f"{experts / 1e3:.2f}", "k"] * 2 + ["34"]


def test_explains_a_layer(world, capsys):
    prompt = "a woman and a man riding a bike"
    main(["--weights", str(world), "--explain", "10", "--prompt", prompt, "--subject", f"man={EXAMPLE}",
          "--subject", str(EXAMPLE)])
    out = " ".join(capsys.readouterr().out.split())
    assert "subject man=zoe.png in token 5 of 77 subject woman=zoe.png in token 2 of 77" in out
    assert "m = [f, its token of T] (1, 2, 32) Fig. 5" in out
    assert out.count("Z, a token per pixel (1, 16, 16) MixtureOfAttention") == 2  # 4 x 4 pixels, width 16
    assert "up_blocks.2.attentions.0.transformer_blocks.0.attn2" in out and "R_1 is 0." in out


def test_stable_diffusion_needs_no_weights(capsys):
    main(["--preset", "sd15"])
    out = capsys.readouterr().out
    assert "32 MoA layers in 16 transformer blocks" in out and "99,496,384 trained parameters" in out
    main(["--preset", "sd15", "--explain", "0"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Z, a token per pixel (1, 4096, 320)" in out and "R_1 is" not in out


@pytest.mark.parametrize(("flags", "said"), [
    (["--explain", "16"], "--explain must be in 0..15"),
    (["--explain", "0", "--subject", "nobody.png"], "nobody.png does not exist"),
    (["--moa", "none.safetensors"], "--moa none.safetensors does not exist"),
    (["--untrained", "--moa", "x"], "--preset and --untrained take no MoA file")])
def test_bad_input_is_one_line(world, capsys, flags, said):
    with pytest.raises(SystemExit, match="2"):
        main(["--weights", str(world), *flags])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_an_edit_of_add_moa_shows_without_a_file(world, capsys, monkeypatch):
    monkeypatch.setattr(describe, "add_moa", lambda unet: add_moa(unet, 32))
    main(["--weights", str(world)])
    assert "router 16 -> 32 -> 2" not in capsys.readouterr().out  # the file brings its own width
    main(["--weights", str(world), "--untrained"])
    assert "router 16 -> 32 -> 2" in capsys.readouterr().out
