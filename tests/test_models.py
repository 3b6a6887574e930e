"""The base model against diffusers, transformers and open_clip; the tokenizer by its contract."""
import gzip
import time
import warnings
from random import Random

import pytest
import torch
from parity_full import (LIMIT, OUTPUTS, PARAMETERS, adopt, count, errors, pair, random, randomize,
                         relative_error)

from models.attention import CrossAttention, timestep_embedding
from models.clip_image import MEAN, STD, CLIPImageConfig, CLIPImageEncoder
from models.clip_text import BOS, EOS, CLIPTextConfig, CLIPTextEncoder, Tokenizer
from models.open_clip_import import open_clip
from models.unet import UNet, UNetConfig
from models.vae import LATENT_SCALE, AutoencoderKL, VAEConfig

SD_LIKE = UNetConfig(channels=(32, 64, 96, 96), context_dim=32)
OTHER = UNetConfig(channels=(24, 48, 72), layers=1, heads=6, context_dim=20, groups=8)
VAE_SD_LIKE = VAEConfig(channels=(32, 64, 96, 96))
VAE_OTHER = VAEConfig(latent_channels=5, channels=(16, 32, 48), layers=1, groups=8)


def agree(part, ours, theirs, *size, **more):
    """Both models compute the same."""
    found, expected = (OUTPUTS[part](model, ours.cfg, *size, **more) for model in (ours, theirs))
    for name, error in errors(found, expected).items():
        assert error < LIMIT, f"{name}: {error}"


# UNet

@pytest.fixture(scope="module")
def sd_like_unet():
    return pair("unet", SD_LIKE)


@pytest.mark.parametrize("size", [(16, 16), (9, 21)])
def test_unet_equals_diffusers(sd_like_unet, size):
    agree("unet", *sd_like_unet, *size)


@pytest.mark.parametrize("size", [(11, 6)])
def test_unet_of_other_sizes_equals_diffusers(size):
    agree("unet", *pair("unet", OTHER), *size, tokens=5)


def test_unet_has_the_686_keys_of_sd15(sd_like_unet):
    ours, theirs = sd_like_unet
    assert len(ours.state_dict()) == 686
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_transformer_blocks_come_in_forward_order(sd_like_unet):
    unet, order = sd_like_unet[0], []
    blocks = list(unet.transformer_blocks())
    hooks = [block.register_forward_hook(lambda *_, i=i: order.append(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        unet(random(1, 4, 8, 8), torch.tensor([5]), random(1, 77, 32))
    for hook in hooks:
        hook.remove()
    assert order == list(range(16))
    assert blocks[6] is unet.mid_block.attentions[0].transformer_blocks[0]


def test_unet_batch_is_independent(sd_like_unet):
    unet = sd_like_unet[0]
    x, t, context = random(3, 4, 8, 8), torch.tensor([1, 500, 999]), random(3, 77, 32)
    with torch.no_grad():
        whole, alone = unet(x, t, context), unet(x[1:2], t[1:2], context[1:2])
    assert relative_error(whole[1:2], alone) < LIMIT


@pytest.mark.parametrize("part, cfg", [("unet", SD_LIKE), ("vae", VAE_SD_LIKE),
                                       ("text_encoder", CLIPTextConfig(dim=32, layers=1, heads=4))])
def test_norms_have_the_eps_of_the_public_models(part, cfg):
    """Activations of random weights are too large to tell 1e-5 from 1e-6, real ones are not."""
    ours, theirs = ({name.removeprefix("text_model."): module.eps for name, module in model.named_modules()
                     if hasattr(module, "eps")} for model in pair(part, cfg))
    assert ours
    assert ours == theirs


def test_timestep_embedding_is_cosines_then_sines():
    from diffusers.models.embeddings import get_timestep_embedding
    t = torch.tensor([0, 1, 500, 999])
    theirs = get_timestep_embedding(t, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(timestep_embedding(t, 32), theirs, atol=1e-6)
    assert (timestep_embedding(t[:1], 32)[0] == torch.tensor([1.0] * 16 + [0.0] * 16)).all()


def test_attention_needs_a_divisible_width():
    with pytest.raises(ValueError, match="30 is not divisible by 8"):
        CrossAttention(30, 8, 8)


# VAE

@pytest.mark.parametrize("cfg, size", [
    (VAE_SD_LIKE, (64, 64)), (VAE_SD_LIKE, (40, 72)), (VAE_OTHER, (36, 20))])
def test_vae_equals_diffusers(cfg, size):
    agree("vae", *pair("vae", cfg), *size)


def test_vae_has_the_248_keys_of_sd15():
    ours, theirs = pair("vae", VAE_SD_LIKE)
    assert len(ours.state_dict()) == 248
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_vae_clamps_the_log_variance():
    vae = randomize(AutoencoderKL(VAE_OTHER))
    with torch.no_grad():
        vae.quant_conv.bias[5:] = torch.tensor([-1e3, 1e3, 0, 0, 0])
        logvar = vae.posterior(random(1, 3, 8, 8))[1]
    assert (logvar[:, 0] == -30).all() and (logvar[:, 1] == 20).all()


def test_vae_names_a_size_that_does_not_fit():
    assert VAE_SD_LIKE.factor == 8
    with torch.device("meta"):
        vae = AutoencoderKL(VAE_SD_LIKE)
        with pytest.raises(ValueError, match=r"\(60, 64\) must be a multiple of 8"):
            vae.encode(torch.zeros(1, 3, 60, 64))


@torch.no_grad()
def test_normalize_latents_keeps_the_pictures():
    vae = randomize(AutoencoderKL(VAE_OTHER)).eval()
    image = random(8, 3, 16, 16).tanh()
    mean, logvar = vae.posterior(image)
    before = vae.decode(vae.encode(image))
    vae.normalize_latents(mean.mean((0, 2, 3)), mean.std((0, 2, 3)))
    latents = vae.encode(image)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert relative_error(vae.decode(latents), before) < 1e-4
    gain = 1 / (LATENT_SCALE * mean.std((0, 2, 3)))
    spread = vae.posterior(image)[1] - 2 * gain.log()[:, None, None]  # the noise is scaled along
    assert torch.allclose(spread, logvar, atol=1e-4)


# Text encoder

@pytest.mark.parametrize("cfg", [CLIPTextConfig(dim=32, layers=3, heads=4),
                                 CLIPTextConfig(dim=48, layers=2, heads=2, length=20)])
def test_text_encoder_equals_transformers(cfg):
    agree("text_encoder", *pair("text_encoder", cfg))


def test_kept_tokens_give_the_same_hidden_states():
    words = ["a man and a woman, dancing", "", "woman"]
    full = randomize(CLIPTextEncoder(CLIPTextConfig(dim=32, layers=2, heads=4))).eval()
    kept = tuple(sorted({BOS, EOS, *Tokenizer(full.cfg).encode(" ".join(words))}))
    cfg = CLIPTextConfig(dim=32, layers=2, heads=4, kept_tokens=kept)
    state, name = full.state_dict(), "text_model.embeddings.token_embedding.weight"
    small = adopt(CLIPTextEncoder, cfg, {**state, name: state[name][list(kept)]})
    tokens = Tokenizer(cfg)(words)
    assert small.state_dict()[name].shape == (len(kept), 32) == (9 - 1, 32)
    with torch.no_grad():
        assert torch.equal(small(tokens), full(tokens))
        for outside in (0, 1000, 49405):
            with pytest.raises(ValueError, match="not among the kept tokens"):
                small(torch.tensor([[BOS, outside]]))


# Image encoder

@pytest.mark.parametrize("cfg", [
    CLIPImageConfig(image_size=32, patch_size=8, dim=64, layers=2, heads=4, output_dim=24),
    CLIPImageConfig(image_size=42, patch_size=14, dim=96, layers=1, heads=2, output_dim=40)])
def test_image_encoder_equals_transformers(cfg):
    agree("image_encoder", *pair("image_encoder", cfg))


def test_image_encoder_is_that_of_vit_l_14_quickgelu():
    config = open_clip().get_model_config("ViT-L-14-quickgelu")
    assert config["quick_gelu"]
    with torch.device("meta"):
        theirs = open_clip().model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], quick_gelu=True)
        ours = CLIPImageEncoder(CLIPImageConfig()).visual
    assert ({k: v.shape for k, v in ours.state_dict().items()}
            == {k: v.shape for k, v in theirs.state_dict().items()})
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("size", [(90, 60), (50, 121), (20, 30)])
def test_preprocess_equals_open_clip(size):
    import numpy as np
    from PIL import Image
    encoder = CLIPImageEncoder(CLIPImageConfig(image_size=48, patch_size=16, dim=32, layers=1, heads=2,
                                               output_dim=8))
    noise = torch.nn.functional.interpolate(random(1, 3, 9, 9).sigmoid(), size, mode="bilinear")
    pixels = (noise * 255).round().to(torch.uint8)
    ours = encoder.preprocess(pixels / 255)
    transform = open_clip().image_transform(48, is_train=False, mean=MEAN, std=STD)
    theirs = transform(Image.fromarray(np.ascontiguousarray(pixels[0].permute(1, 2, 0))))[None]
    assert ours.shape == theirs.shape == (1, 3, 48, 48)
    assert (ours - theirs).abs().max() < 0.03  # they round to 1/255 on the way, 0.015 here


# Sizes

@pytest.mark.parametrize("part, cls, cfg, tensors", [
    ("unet", UNet, UNetConfig(), 686), ("vae", AutoencoderKL, VAEConfig(), 248),
    ("text_encoder", CLIPTextEncoder, CLIPTextConfig(), 196),
    ("image_encoder", CLIPImageEncoder, CLIPImageConfig(), 295 + 1)])
def test_parameter_counts_of_sd15(part, cls, cfg, tensors):
    with torch.device("meta"):
        module = cls(cfg)
    assert count(module) == PARAMETERS[part]
    assert len(module.state_dict()) == tensors


# Tokenizer

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(CLIPTextConfig())


@pytest.fixture(scope="module")
def reference():
    """transformers' tokenizer from the merges that open_clip ships."""
    from transformers import CLIPTokenizer
    ours = open_clip().tokenizer.SimpleTokenizer()
    vocabulary = dict(ours.encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    with gzip.open(open_clip().tokenizer.default_bpe()) as file:
        merges = [tuple(m.split()) for m in file.read().decode().split("\n")[1:49152 - 256 - 2 + 1]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize("text", [
    "", "   ", "a man and a woman", "A MAN,  two  Dogs!", "it's they're we'll I'd", "3.14159 in 2024",
    "café naïve Ångström", "男の人と女の人", "a 👩‍🚀 on the moon 🌝", "tab\tand\nnewline",
    "supercalifragilistic", "x" * 300, "photo of (a man:1.3), 8k --v 5", "word " * 100])
@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_tokens_equal_transformers(tokenizer, reference, text):
    theirs = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
    tokens = tokenizer([text])
    assert tokens.dtype == torch.int64 and tokens.shape == (1, 77)
    assert tokens[0].tolist() == theirs


def test_padding_is_the_end_token(tokenizer):
    assert tokenizer([""]).tolist() == [[BOS] + [EOS] * 76]
    assert tokenizer(["a man", "man"]).tolist() == [[BOS, 320, 786] + [EOS] * 74, [BOS, 786] + [EOS] * 75]


def test_too_long_a_prompt_names_what_is_lost(tokenizer):
    with pytest.warns(UserWarning, match="longer than 75 tokens; lost: 'a purple elephant'"):
        tokens = tokenizer(["dog " * 75 + "a purple elephant"])
    assert tokens.tolist() == [[BOS] + [1929] * 75 + [EOS]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["dog " * 75])


@pytest.mark.parametrize("special", [
    "<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>", "<END_OF_TEXT>",
    "&lt;end_of_text&gt;", "&amp;lt;start_of_text&amp;gt;", "<|END_OF_TEXT|>"])
def test_text_does_not_inject_special_tokens(tokenizer, special):
    for text in (special, f"a {special} man", f"{special}{special}man"):
        ids = tokenizer.encode(text)
        assert max(ids, default=0) < BOS
        row = tokenizer([text])[0].tolist()
        assert row == [BOS, *ids] + [EOS] * (76 - len(ids))


@pytest.mark.parametrize("text", [
    "".join(Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=40_000)), "x" * 200_000, "a " * 100_000,
    "&lt;" * 50_000, "!?" * 100_000, " " * 10**6], ids=range(6))
@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_no_text_takes_long(tokenizer, text):
    start = time.process_time()
    assert tokenizer([text]).shape == (1, 77)
    assert time.process_time() - start < 3


SMALL_WORLD = "a man woman dog and , . dancing"


@pytest.fixture(scope="module")
def small_tokenizer(tokenizer):
    kept = {BOS, EOS, *tokenizer.encode(SMALL_WORLD)}
    return Tokenizer(CLIPTextConfig(kept_tokens=tuple(sorted(kept)), words=tuple(SMALL_WORLD.split())))


def test_unknown_words_are_named_and_dropped(small_tokenizer, tokenizer):
    message = r"do not know the words: purple, womn \(perhaps woman\)\. config\.json lists"
    with pytest.warns(UserWarning, match=message):
        tokens = small_tokenizer(["A purple man and a womn, purple."])
    assert torch.equal(tokens, tokenizer(["a man and a , ."]))
    assert small_tokenizer.unknown_words("a man, dancing.") == []
    assert small_tokenizer.unknown_words("a man... and!? a MANX") == ["manx"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_tokenizer(["a man and a woman, dancing.", ""])


@pytest.mark.parametrize("text", ["a man...", "a man!?", "a man., dog", "man's", "&lt;man&gt;",
                                  "<end_of_text>", "a m\u00e4n", "\ud55c", "man\x00"])
@pytest.mark.filterwarnings("ignore:these weights do not know")
def test_no_text_reaches_a_token_without_an_embedding(small_tokenizer, text):
    assert small_tokenizer.kept_tokens.issuperset(small_tokenizer([text])[0].tolist())


@pytest.mark.parametrize("text, word, positions", [
    ("a man and a woman", "man", [2]), ("a man and a woman", "woman", [5]),  # inside another word
    ("a man, a man and a Man!", "man", [2, 5, 8]),  # repeated, case, punctuation
    ("a man, a man and a Man!", "MAN", [2, 5, 8]), ("(man)", "man", [2]), ("man's dog", "man", [1]),
    ("a young man runs", "young man", [3]), ("a manatee", "man", []), ("man2 man_ man", "man", []),
    ("a man", "dog", []), ("", "man", []), ("a man", "", []), ("a.c", "a.c", [3]), ("abc", "a.c", []),
    ("a <end_of_text> man", "man", [2]), ("a man", "(", [])])
def test_word_positions(tokenizer, text, word, positions):
    if text.startswith("man2"):
        positions = [len(tokenizer.encode(text))]  # only the last one stands alone
    assert tokenizer.word_positions(text, word) == positions


def test_position_of_a_word_of_several_tokens_is_its_last(tokenizer):
    word = "supercalifragilistic"
    tokens = tokenizer.encode(word)
    assert len(tokens) > 2
    text = f"a {word} man"
    assert tokenizer.word_positions(text, word) == [1 + len(tokens)]
    assert tokenizer([text])[0, 1 + len(tokens)] == tokens[-1]
    assert tokenizer.word_positions(text, "man") == [2 + len(tokens)]


def test_positions_that_were_cut_off_are_left_out(tokenizer):
    assert tokenizer.word_positions("dog " * 74 + "man", "man") == [75]
    assert tokenizer.word_positions("man " + "dog " * 74 + "man", "man") == [1]


def test_unknown_words_have_no_position(small_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the tokenizer has warned once already
        assert small_tokenizer.word_positions("a zebra and a man", "zebra") == []
        assert small_tokenizer.word_positions("a zebra and a man", "man") == [4]
