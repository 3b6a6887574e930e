"""bench/faces.py: the paper's protocol. What is scored is worked out by hand, the networks are stand-ins;
facenet-pytorch's own detector is asked where it is installed, as .ci/run does."""
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

from bench import face_scores, table3
from bench import faces as faces_script
from bench.face_scores import Networks, identity_score, match_greedily
from models.load import read_tensors
from images import read_settings, save_png
from pipeline import Pipeline

SMALL = ["--max-prompts", "1", "--max-images", "1", "--steps", "1"]


# --- the scores ---


def test_faces_are_matched_greedily():
    """.9 is taken first and leaves .1, although .8 and .7 would be better together."""
    similarity = torch.tensor([[.9, .8], [.7, .1]])
    assert match_greedily(similarity) == pytest.approx([.9, .1])
    assert match_greedily(torch.tensor([[-.5, -.2], [-.9, -.8]])) == pytest.approx([-.2, -.9])
    assert similarity[0, 0] == torch.tensor(.9)  # it works on a copy


def faces(*angles: float | None) -> torch.Tensor:
    """Faces whose embeddings lie at these angles, in degrees; None is black."""
    values = torch.tensor([0. if angle is None else angle for angle in angles])
    return values[:, None, None, None].expand(-1, 3, 160, 160)


def embed(faces: torch.Tensor) -> torch.Tensor:
    """A face (3, 160, 160) of one value, an angle -> (2,) of length 1."""
    angles = torch.deg2rad(faces[:, 0, 0, 0])
    return torch.stack([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize(("found", "references", "score"), [
    (None, [30], 0.0),  # no face
    ([30], [30], 1.0), ([90], [30], 0.5), ([170], [30], 0.0),  # the last is below zero
    ([90, 30], [30], 0.5),  # the largest face counts, not the most similar
    ([30, 90], [90, 30], 1.0), ([30, 30], [30, 90], 0.5),  # twice the same person
    ([30], [30, 60], 0.5),  # the other one's place is black, at 0 degrees: cos 60
    ([30], [30, 100], 0.0), ([30, 90, 60], [60, 30], 3 ** 0.5 / 2)])
def test_identity_score(found, references, score):
    known = embed(faces(*references))
    assert identity_score(faces(*found) if found else None, known, embed) == pytest.approx(score, abs=1e-6)


def test_boxes_that_overlap_are_left_out():
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 8], [20, 20, 30, 30]])
    scores, group = torch.tensor([.5, .9, .8, .1]), torch.zeros(4, dtype=torch.int64)

    def kept(threshold: float, group=group) -> list[int]:
        return face_scores.batched_nms(boxes, scores, group, threshold).tolist()

    assert kept(.49) == [1, 3] and kept(.62) == [1, 0, 3]  # of the second the third has 5/8, the first 1/2,
    assert kept(.79) == [1, 2, 3] and kept(.81) == [1, 2, 0, 3]  # of the third the first 4/5
    assert kept(.1, torch.tensor([0, 1, 0, 0])) == [1, 2, 3]
    assert face_scores.batched_nms(boxes[:0], scores[:0], group[:0], .5).tolist() == []


# --- the networks' files ---


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A small CLIP of transformers with random values, and its folder."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = CLIPModel(CLIPConfig(projection_dim=32, text_config={**sizes, "eos_token_id": 49407},
                                 vision_config={**sizes, "patch_size": 8, "image_size": 32})).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder


def test_clip_in_all_layouts(clips, tmp_path):
    model, folder = clips
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    prompt = "a man wearing a red hat"
    state = face_scores.read_clip(folder)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "open_clip.safetensors")
    torch.save({"state_dict": state}, tmp_path / "open_clip.pt")
    positions = {f"{half}_model.embeddings.position_ids": torch.arange(17) for half in ("text", "vision")}
    save_file({**read_tensors(folder / "model.safetensors"), **positions}, tmp_path / "old.safetensors")
    from models.open_clip_import import open_clip
    tokens = open_clip().tokenizer.SimpleTokenizer()(prompt)
    with torch.no_grad():
        pixels = face_scores.preprocess(face_scores.to_picture([picture]) / 2 + 0.5, 32)
        image = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        text = model.text_projection(model.text_model(tokens).pooler_output)[0]
    for path in (folder, folder / "model.safetensors", tmp_path / "open_clip.safetensors",
                 tmp_path / "open_clip.pt", tmp_path / "old.safetensors"):
        with pytest.warns(UserWarning, match="is not CLIP ViT-L/14"):
            see, read, as_paper = face_scores.load_clip(path, torch.device("cpu"))
        assert not as_paper
        for found, expected in ((see(picture), image), (read(prompt), text)):
            assert (found - expected / expected.norm()).norm() < 2e-5
        assert torch.equal(read("a man  wearing a red hat"), read(prompt))  # FastComposer's has two spaces
    networks = Networks(None, None, see, read, {})
    assert face_scores.prompt_score(networks, picture, prompt) == pytest.approx(
        float(torch.cosine_similarity(image, text, dim=0)), abs=1e-5)


class Network(nn.Sequential):
    """Stands for FaceNet, whose file has a classifier besides."""

    def __init__(self, people: int = 8631):
        super().__init__(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.logits = nn.Linear(3, people)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_facenet_file(tmp_path, capsys):
    path, network = tmp_path / "vggface2.pt", nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = Network().state_dict()
    for kept in (state, {k: v for k, v in state.items() if "num_batches" not in k}):
        torch.save(kept, path)
        network.load_state_dict(face_scores.read_facenet(path, network))
        assert torch.equal(network[0].weight, state["0.weight"])
    torch.save(Network(10575).state_dict(), path)
    with pytest.raises(ValueError, match="trained on 10575 people, the protocol's on vggface2's 8631"):
        face_scores.read_facenet(path, network)
    torch.save(nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(ValueError, match="InceptionResnetV1: 6 missing .0.bias, .* 2 unexpected"):
        face_scores.read_facenet(path, network)
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ValueError, match="--facenet: .* could run code"):
        face_scores.read_facenet(path, network)
    assert "run" not in capsys.readouterr().out.split()


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: path.mkdir(), "has no model.safetensors"),
    (lambda path: path.write_text("<html>"), "--clip: .* is a web page"),
    (lambda path: save_file({"visual.proj": torch.zeros(2, 2)}, path), "is not a whole .*no visual.conv1")])
def test_refuses_what_is_no_clip(tmp_path, make, words):
    make(tmp_path / "clip")
    with pytest.raises(ValueError, match=words):
        face_scores.load_clip(tmp_path / "clip", torch.device("cpu"))


def test_says_how_to_install_facenet(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ValueError, match="pip install --no-deps facenet-pytorch==2.6.0"):
        face_scores.load_faces(tmp_path / "vggface2.pt", torch.device("cpu"))


def draw_face(canvas: ImageDraw.ImageDraw, x: int, y: int, size: int) -> None:
    """A face plain enough to be drawn and good enough to be found."""
    def box(left, top, right, bottom):
        return [x + left * size, y + top * size, x + right * size, y + bottom * size]

    canvas.ellipse(box(.22, .10, .78, .80), (60, 40, 25))
    canvas.ellipse(box(.28, .18, .72, .86), (224, 178, 146))
    for middle in (.40, .60):
        canvas.ellipse(box(middle - .055, .445, middle + .055, .50), "white")
        canvas.ellipse(box(middle - .025, .445, middle + .025, .497), (50, 40, 35))
        canvas.rectangle(box(middle - .06, .395, middle + .06, .41), (60, 40, 25))
    canvas.polygon([x + .50 * size, y + .48 * size, x + .465 * size, y + .61 * size, x + .535 * size,
                    y + .61 * size], (197, 156, 128))
    canvas.ellipse(box(.42, .675, .58, .73), (170, 80, 80))


def portrait(size: int = 256) -> Image.Image:
    picture = Image.new("RGB", (300, 300), (150, 170, 190))
    draw_face(ImageDraw.Draw(picture), 20, 20, size)
    return picture


def test_the_real_detector(tmp_path):
    """MTCNN's own weights, a FaceNet of random ones: who is found, in which order, and who is not."""
    facenet = pytest.importorskip("facenet_pytorch")
    torch.save(facenet.InceptionResnetV1().state_dict(), tmp_path / "vggface2.pt")
    detect, embed = face_scores.load_faces(tmp_path / "vggface2.pt", torch.device("cpu"))
    two = Image.new("RGB", (512, 300), (150, 170, 190))
    canvas = ImageDraw.Draw(two)
    draw_face(canvas, 20, 20, 180)
    draw_face(canvas, 240, 20, 256)
    found = detect(two)
    assert found.shape == (2, 3, 160, 160)
    alone = detect(two.crop((240, 0, 512, 300)))
    assert alone.shape[0] == 1 and (found[0] - alone[0]).abs().mean() < 0.2 < found.std()  # the larger one
    assert torch.allclose(embed(found).norm(dim=1), torch.ones(2))
    assert identity_score(found, embed(alone[:1]), embed) > 0.9
    for nobody in (Image.new("RGB", (64, 64)), Image.new("RGB", (16, 16))):
        assert detect(nobody) is None


# --- the command ---


def test_the_protocol():
    """Counts of facts that are fixed, and what an example of each reads like."""
    assert len(table3.SUBJECTS) == 15 and sorted(table3.SUBJECTS.values()).count("man") == 6
    assert {kind: len(prompts) for kind, prompts in table3.SINGLE.items()} == {
        "accessory": 10, "style": 10, "action": 10, "context": 10}
    assert {kind: len(prompts) for kind, prompts in table3.MULTI.items()} == {
        "style": 7, "action": 8, "context": 6}
    people = [faces_script.Person(name, noun, Path(name)) for name, noun in table3.SUBJECTS.items()]
    for flags, count, prompts in (
            ([], 2400, {0: "a man wearing a red hat", 40: "a painting of a man in the style of Banksy",
                        2399: "a woman on top of a purple rug in a forest"}),
            (["--multi"], 8820, {0: "a painting of a man and a man together in the style of Banksy",
                                 28: "a photo of a man and a man gardening in the backyard together"})):
        args = faces_script.parse_args(["--subjects", "s", "--output", "o", *flags])
        cases = faces_script.plan(args, people)
        assert len(cases) == count == len({case.picture for case in cases})
        assert [case.seed for case in cases] == list(range(42, 42 + count))
        assert {k: cases[k].prompt for k in prompts} == prompts
        args.max_subjects, args.max_prompts, args.max_images = 3, 2, 1
        few = faces_script.plan(args, people)
        assert set(few) < set(cases) and len(few) == 3 * 2 * len(table3.MULTI if flags else table3.SINGLE)
        some = faces_script.plan(args, [None, *people[1:]])  # one photo is missing: the same seeds
        assert set(some) < set(cases) and (args.steps, args.guidance_scale) == (50, 5.0)


def test_what_is_not_as_in_the_protocol_is_named():
    needed = ["--subjects", "s", "--output", "o", "--clip", "c", "--multi", "--device", "cpu"]
    assert faces_script.changed_settings(faces_script.parse_args(needed)) == []
    args = faces_script.parse_args([*needed, "--prior-only", "--seed", "1", "--width", "256"])
    assert faces_script.changed_settings(args) == ["--prior-only", "--seed 1", "--width 256"]
    scores = {"all": dict.fromkeys(("ip", "ip_std", "pc", "pc_std", "no_face"), 0.5) | {"n": 2400}}
    results = {"scores": scores, "protocol": "multi", "subjects": 15, "changed": []}
    assert "Do not compare" not in faces_script.table(results)
    assert "(another CLIP)" in faces_script.table({**results, "changed": ["another CLIP"]})


@pytest.fixture
def subjects(place) -> Path:
    """A folder of two people."""
    for name, photo in (("ada", "ada.png"), ("bob", "bob.png")):
        (place / "people" / name).mkdir(parents=True)
        (place / photo).rename(place / "people" / name / "1.png")
    (place / "vggface2.pt").touch()
    (place / "people" / "subjects.json").write_text('{"ada": "woman", "bob": "man"}')
    return place / "people"


@pytest.fixture(autouse=True)
def any_prompt(monkeypatch):
    """The tiny world knows few of the protocol's words."""
    monkeypatch.setattr(Pipeline, "check_prompt", lambda self, prompt: None)


@pytest.fixture
def judged(monkeypatch):
    """Stand-ins for the networks: a photo's face is at 0 degrees, a picture's at 60 unless the picture is
    wide, then there is none; CLIP gives a cosine of 1/4. Counts what it is asked."""
    asked = []

    def detect(picture):
        asked.append(picture)
        return None if picture.width > 64 else faces(0 if picture.width < 64 else 60)

    networks = Networks(detect, embed, lambda picture: torch.tensor([1., 0]),
                    lambda prompt: torch.tensor([0.25, 0.75]), {"facenet": "1"})
    monkeypatch.setattr(faces_script, "load_networks", lambda *_: networks)
    return networks, asked


@pytest.fixture
def evaluate(world, subjects, judged, capsys):
    """Run the command; returns what it printed, its results and how many pictures were looked at."""
    def run(*flags, output="out"):
        judged[1].clear()
        faces_script.main(["--weights", str(world), "--subjects", str(subjects), "--output", output,
                             "--facenet", "vggface2.pt", "--clip", "vggface2.pt", *SMALL, *flags])
        file = Path(output, "results.json")
        people = 2  # whose photos are looked at each time
        return (capsys.readouterr().out, json.loads(file.read_text()) if file.exists() else None,
                len(judged[1]) - people)
    return run


def test_the_command_with_its_own_networks(world, subjects, clips, capsys):
    """MTCNN's own weights, a FaceNet and a small CLIP of random ones. Nobody is found in pictures of a random
    model, which scores 0; a drawing of ada in place of one is found: it looks like her photo, not bob's."""
    facenet = pytest.importorskip("facenet_pytorch")
    torch.save(facenet.InceptionResnetV1().state_dict(), "vggface2.pt")
    for name, size in (("ada", 256), ("bob", 160)):
        portrait(size).save(subjects / name / "1.png")
    command = ["--weights", str(world), "--subjects", str(subjects), "--output", "out",
               "--facenet", "vggface2.pt", "--clip", str(clips[1]), *SMALL]
    faces_script.main(command)
    assert "is not CLIP ViT-L/14" in "".join(capsys.readouterr())
    results = json.loads(Path("out/results.json").read_text())
    scores = results["scores"]["all"]
    assert (scores["n"], scores["ip"], scores["no_face"]) == (8, 0, 1)
    assert len({picture["pc"] for picture in results["pictures"].values()}) == 8
    of_ada, of_bob = (next(name for name, picture in results["pictures"].items()
                           if picture["people"] == [person]) for person in ("ada", "bob"))
    for path in (Path("out/pictures") / name for name in (of_ada, of_bob)):
        save_png(portrait(), path, read_settings(path))  # of other settings, it would be drawn again
    faces_script.main(command)
    found = json.loads(Path("out/results.json").read_text())["pictures"]
    assert found[of_ada]["faces"] == found[of_bob]["faces"] == 1
    # To a random FaceNet all faces are nearly alike.
    assert found[of_ada]["ip"] == pytest.approx(1, abs=1e-6) and 0 < found[of_bob]["ip"] < 1 - 5e-6
    others = set(found) - {of_ada, of_bob}
    assert {n: found[n] for n in others} == {n: results["pictures"][n] for n in others}


def test_draws_scores_and_goes_on(evaluate, judged):
    out, results, looked = evaluate()
    assert "8 drawn, 0 were there" in out and looked == 8
    assert results["scores"]["all"] == pytest.approx(
        {"ip": 0.5, "ip_std": 0, "pc": 0.25, "pc_std": 0, "no_face": 0, "n": 8}, abs=1e-6)
    assert list(results["scores"]) == ["accessory", "style", "action", "context", "all"]
    assert "| MoA, the paper | 0.555 | 0.202 |" in out and "| this run | 0.500 | 0.250 |" in out
    assert ("Not the protocol (--max-prompts 1, --max-images 1, --steps 1, other subjects): 2 subjects, "
            "8 pictures. Do not compare." in out)
    assert out.endswith(Path("out/results.md").read_text() + "\n")
    names = sorted(path.name for path in Path("out/pictures").iterdir())
    assert names[1] == "subject_0000_prompt_0010_instance_0000.png" and len(names) == 8
    assert results["pictures"][names[1]] == {
        "prompt": "a painting of a woman in the style of Banksy", "people": ["ada"],
        "ip": pytest.approx(0.5), "pc": 0.25, "faces": 1}

    out, again, looked = evaluate()
    assert "0 drawn, 8 were there" in out and looked == 0 and again["scores"] == results["scores"]
    Path("out/scores", names[2]).with_suffix(".json").unlink()
    assert evaluate()[2] == 1
    Path("out/pictures", names[0]).unlink()
    assert "1 drawn, 7 were there" in evaluate()[0]
    out, again, looked = evaluate("--width", "72")  # nobody is found
    assert "8 drawn, 0 were there" in out and looked == 8
    assert again["scores"]["all"]["ip"] == 0 and again["scores"]["all"]["no_face"] == 1
    judged[0].as_paper = False
    assert evaluate("--width", "72")[1]["changed"][-2:] == ["another CLIP", "other subjects"]


def test_two_people_and_two_processes(evaluate, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    out, results, looked = evaluate("--multi")
    assert "1 drawn" in out and "| all |" not in out and results is None and looked == 1
    monkeypatch.setenv("RANK", "0")
    out, results, looked = evaluate("--multi")
    assert "2 drawn" in out and looked == 2 and results["scores"]["all"]["n"] == 3
    # One face for two people, both at 0 degrees: it is at 60, the one that is missing at 0.
    assert results["scores"]["all"]["ip"] == pytest.approx(0.5) and "Table 3" not in out
    assert {tuple(one["people"]) for one in results["pictures"].values()} == {("ada", "bob")}


def test_waits_for_pictures_of_the_same_settings(evaluate, monkeypatch):
    """Another process, which has not come to its pictures yet, has older ones there, with scores."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        evaluate()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        raise RuntimeError("waited")

    monkeypatch.setattr(faces_script.time, "sleep", sleep)
    with pytest.raises(RuntimeError, match="waited"):
        evaluate("--guidance-scale", "2")
    monkeypatch.setenv("RANK", "1")
    evaluate("--guidance-scale", "2")
    monkeypatch.setenv("RANK", "0")
    assert evaluate("--guidance-scale", "2")[1]["settings"]["guidance_scale"] == 2 and len(waited) == 1


def refused(run, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        run()
    _, err = capsys.readouterr()
    assert stopped.value.code == 2 and len(err.splitlines()) == 1
    return err


def test_does_not_mix_runs(evaluate, judged, capsys):
    evaluate("--max-subjects", "1")
    assert "with another protocol: give another folder" in refused(lambda: evaluate("--multi"), capsys)
    judged[0].files["facenet"] = "2"
    err = refused(lambda: evaluate("--max-subjects", "1"), capsys)
    assert "pictures of another run, with another facenet: give another folder" in err


def nouns(text: str):
    return lambda folder: (folder / "subjects.json").write_text(text)


def leave_one(folder: Path) -> None:
    (folder / "ada").rename(folder / "000001")
    (folder / "bob").rename(folder.parent / "gone")
    (folder / "subjects.json").unlink()


@pytest.mark.parametrize(("spoil", "flags", "words"), [
    (lambda folder: (folder / "subjects.json").unlink(), [], "ada is not a known subject: write what to"),
    (nouns('{"ada": "queen"}'), [], "must say what to call each"),
    (lambda folder: (folder / "ada" / "1.png").unlink(), [], "ada has no .jpg, .jpeg, .png or .webp"),
    (lambda folder: Image.new("RGB", (80, 80)).save(folder / "ada" / "0.png"), [], "0.png: no face is found"),
    (lambda folder: (folder / "ada").rename(folder.parent / "gone"), [], "names ada, but there is no folder"),
    (lambda folder: folder.rename(folder.parent / "gone"), [], "is not a folder: give one"),
    (leave_one, ["--multi"], "has 1 people"),
    (None, ["--facenet", "none.pt"], "--facenet none.pt does not exist: give facenet-pytorch's vggface2"),
    (None, ["--clip", "none"], "--clip none does not exist: give CLIP ViT-L/14")])
def test_refuses_before_the_first_picture(evaluate, subjects, capsys, spoil, flags, words):
    if spoil:
        spoil(subjects)
    assert words in refused(lambda: evaluate(*flags), capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(("flags", "words"), [
    ([], "--facenet is missing: give"), (["--facenet", "ada.png"], "--clip is missing: give")])
def test_the_networks_files_must_be_given(capsys, place, flags, words):
    command = ["--subjects", "people", "--output", "out", *flags]
    assert words in refused(lambda: faces_script.main(command), capsys)
