"""From three photographs to a picture, by small random models of the real classes."""
import importlib
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from skimage.data import astronaut, camera
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    SwinConfig,
)

import sample
from data import annotate, build
from test_docs import commands
from weights import export_diffusers

ROOT = Path(__file__).parents[1]
WORDS = ["<s>", "<pad>", "</s>", "<image>", "a", "man", "woman", "dog"]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> list[str]:
    """Flags: a BLIP-2 that says "man" again and again, and a Mask2Former that sees people only."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", pad_token="<pad>",
                                        eos_token="</s>", additional_special_tokens=["<image>"])
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    captioner = Blip2ForConditionalGeneration(Blip2Config(
        vision_config=small | {"image_size": 32, "patch_size": 16},
        qformer_config=small | {"vocab_size": len(WORDS), "encoder_hidden_size": 16},
        text_config=OPTConfig(vocab_size=len(WORDS), hidden_size=16, word_embed_proj_dim=16, ffn_dim=16,
                              num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
                              bos_token_id=0, pad_token_id=1, eos_token_id=2).to_dict(),
        num_query_tokens=2, image_token_index=3))
    decoder = captioner.language_model.model.decoder
    with torch.no_grad():  # the last hidden state is always this, and nearest to "man"
        decoder.final_layer_norm.weight.zero_()
        decoder.final_layer_norm.bias.copy_(torch.ones(16))
        decoder.embed_tokens.weight[WORDS.index("man")] = 1.0
    captioner.save_pretrained(folder / "blip2")
    Blip2Processor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer,
                   num_query_tokens=2).save_pretrained(folder / "blip2")
    segmenter = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1] * 4,
                                   num_heads=[1] * 4, window_size=4,
                                   out_features=[f"stage{i}" for i in range(1, 5)]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5,
        id2label={0: "person", 1: "dog"}, label2id={"person": 0, "dog": 1}))
    with torch.no_grad():
        segmenter.class_predictor.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    segmenter.save_pretrained(folder / "mask2former")
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, num_labels=2,
                              ignore_index=255).save_pretrained(folder / "mask2former")
    return ["--captioner", str(folder / "blip2"), "--segmenter", str(folder / "mask2former"),
            "--threshold", "0.2", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three people, photographed."""
    (tmp_path / "photos").mkdir()
    hopper = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    for name, picture, size in (("astronaut", Image.fromarray(astronaut()), (200, 120)),
                                ("camera", Image.fromarray(camera()), (120, 200)),
                                ("hopper", Image.open(hopper), (160, 160))):
        picture.resize(size).save(tmp_path / "photos" / f"{name}.jpg")
    return tmp_path / "photos"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        annotate.main([str(argument) for argument in arguments])
    return end.value.code


def test_from_photographs_to_a_picture(photos, models, world, monkeypatch):
    """Every command of docs/photos.md, on three photographs and a small checkpoint in diffusers' layout."""
    monkeypatch.chdir(photos.parent)
    photos.rename("PICTURES")
    Path("PICTURES/hopper.txt").write_text("a woman in a uniform\n")
    Path("ME").mkdir()
    shutil.copy("PICTURES/hopper.jpg", "ME/me.jpg")
    export_diffusers.main([str(world), "--output", "v1-5-pruned-emaonly.safetensors"])
    Path("clip-vit-large-patch14").mkdir()
    shutil.copy(world / "image_encoder.safetensors", "clip-vit-large-patch14/model.safetensors")
    small = {"data.annotate": models, "sample": ["--steps", "2"],
             "train": ["--steps", "2", "--batch-size", "2", "--accumulate", "1", "--samples-every", "0"]}
    given = commands([ROOT / "docs" / "photos.md"])
    assert [module for module, _ in given] == [
        "weights.convert_sd15", "data.annotate", "data.build", "train", "data.annotate", "sample",
        "weights.publish"]
    for module, arguments in [*given[:3], ("data.build", ["--check", "DATA"]), *given[3:]]:
        monkeypatch.setattr(sys, "argv", [module, *arguments, *small.get(module, [])])
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            assert not end.code, module

    assert Path("PICTURES/hopper.txt").read_text() == "a woman in a uniform\n"  # it was there
    assert Path("PICTURES/astronaut.txt").read_text().split()[:2] == ["man", "man"]
    mask = np.array(Image.open("PICTURES/camera_mask.png"))
    sizes = [(mask == number).sum() for number in range(1, mask.max() + 1)]
    assert mask.shape == (200, 120) and 1 <= len(sizes) <= 4 and all(sizes) and sizes == sorted(sizes)[::-1]
    assert np.array(Image.open("PICTURES/hopper_mask.png")).max() == 1  # one word in its caption
    assert Image.open("annotations.png").width > 100
    assert json.loads(Path("runs/mine/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert len(list(Path("sample").glob("00?.png"))) == 4
    assert Path("shared/README.md").exists() and Path("shared/moa.safetensors").exists()

    shutil.copy("ME/me.jpg", "plain.jpg")  # has no mask
    drawn = []
    for photo in ("ME/me.jpg", "plain.jpg"):
        sample.main(["--weights", "runs/mine", "--moa", str(world / "moa.safetensors"), "--subject", photo,
                     "--prompt", "a girl on the beach", "--output", "one.png", "--steps", "2", "--seed", "0"])
        drawn.append(np.array(Image.open("one.png")))
    assert (drawn[0] != drawn[1]).any()


def test_it_goes_on_where_it_was_stopped(photos, models, monkeypatch):
    asked = []
    monkeypatch.setattr(annotate, "masks", lambda todo, args: asked.append(todo) or iter(()))
    assert run(photos, *models) == 0
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in photos.glob("*.txt")}
    assert run(photos, *models) == 0 and len(before) == 3
    assert {path: path.stat().st_mtime_ns for path in photos.glob("*.txt")} == before
    assert len(list(photos.glob("*_mask.png"))) == 3
    monkeypatch.setattr(annotate, "load", None)  # nothing is left to do
    assert run(photos, *models) == 0


def test_a_mask_is_of_its_picture_alone(photos, models):
    """Whatever shape the others of a batch have."""
    found = []
    for size in (1, 3):
        assert run(photos, *models, "--batch-size", size) == 0
        masks = sorted(photos.glob("*_mask.png"))
        found.append([np.array(Image.open(mask)) for mask in masks])
        for mask in masks:
            mask.unlink()
    assert len(found[0]) == 3 and all((a != b).mean() < 0.01 for a, b in zip(*found, strict=True))


def test_processes_share_the_pictures(photos, models, monkeypatch):
    (photos / "broken.png").write_bytes(b"nothing")  # status 1 would make torchrun stop the others
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(photos, *models) == 0
    assert [path.name for path in photos.glob("*.txt")] == ["hopper.txt"]


def test_what_cannot_be_built_is_named_with_its_reason(photos, models, capsys):
    (photos / "astronaut.txt").write_text("a bowl of fruit")
    (photos / "camera.jpg").write_bytes(b"nothing")
    shutil.copy(photos / "hopper.jpg", photos / "old.jpg")
    (photos / "old.txt").write_bytes("a man in a café".encode("latin-1"))
    assert run(photos, *models, "--min-share", 1.1) == 1
    out = capsys.readouterr().out
    assert "astronaut.jpg: its caption names nobody: 'a bowl of fruit'" in out
    assert "camera.jpg" in out and "old.txt: not a text in UTF-8" in out
    assert "hopper.jpg: the largest person covers" in out
    assert not list(photos.glob("*_mask.png"))


@pytest.mark.parametrize(("arguments", "said"), [
    (["{photos}/astronaut.jpg"], "is not a folder"),
    (["{photos}/empty"], "holds no picture"),
    (["{photos}", "--captioner", "{photos}"], "photos: "),
    (["{photos}", "--captioner", "nothing"], "nothing does not exist"),
    (["{photos}", "--captioner", "me/nothing"], "the hub cannot be reached"),
])
def test_mistakes_are_one_line(photos, arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.chdir(tmp_path)
    (photos / "empty").mkdir()
    (photos / "empty" / "film.mp4").write_bytes(b"film")
    assert run(*(argument.format(photos=photos) for argument in arguments)) == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and said in error


def test_without_transformers_it_says_what_to_install(photos, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(photos) == 2
    assert "pip install -r requirements-data.txt" in capsys.readouterr().err


def test_masks_of_people_who_wrote_them_fit_the_builder(photos, models, capsys):
    """A mask of another size is the builder's to refuse, by name."""
    assert run(photos, *models) == 0
    Image.new("L", (3, 3), 1).save(photos / "astronaut_mask.png")
    with pytest.raises(SystemExit, match="1"):
        build.main([str(photos), "--output", str(photos.parent / "data")])
    out = capsys.readouterr().out
    assert "astronaut_mask.png" in out and "3 x 3" in out
    assert build.find_pictures(photos)[0] == sorted(photos.glob("*.jpg"))
