"""What a user has becomes a dataset, whole or not at all; whatever is broken in either is listed."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import build
import toyworld
from data.fastcomposer import SUFFIXES, Folder, read_ids, read_sample
from data.masks import read_mask
from tests.test_data import BROKEN, write_folder

GRAY = (128, 128, 128)


def run(*arguments) -> int:
    """The exit status of `python -m data.build`."""
    with pytest.raises(SystemExit) as stop:
        build.main(list(map(str, arguments)))
    return stop.value.code


def write_scene(folder: Path, seed: int) -> toyworld.Scene:
    """A rendered scene as a user would have it."""
    scene = toyworld.sample_scene(seed)
    picture, masks = toyworld.render_scene(scene)
    numbers = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in enumerate(masks, 1):
        numbers[mask] = number
    Image.fromarray(picture).save(folder / f"scene{seed:03}.png")
    (folder / f"scene{seed:03}.txt").write_text(f"{scene.caption}\n")
    Image.fromarray(numbers).save(folder / f"scene{seed:03}_mask.png")
    return scene


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> tuple[Path, list[toyworld.Scene]]:
    folder = tmp_path_factory.mktemp("pictures")
    return folder, [write_scene(folder, seed) for seed in range(8)]


@pytest.fixture
def pictures(tmp_path) -> Path:
    """One gray picture, 40 x 30, of a woman on the left and a man on the right."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    add_picture(folder, "pair")
    return folder


def add_picture(folder: Path, name: str, caption: str = "a woman and a man") -> None:
    numbers = np.zeros((30, 40), np.uint8)
    numbers[5:25, 4:14], numbers[10:30, 24:36] = 1, 2
    Image.new("RGB", (40, 30), GRAY).save(folder / f"{name}.jpg")
    Image.fromarray(numbers).save(folder / f"{name}_mask.png")
    (folder / f"{name}.txt").write_text(caption)


def segments_of(data: Path, image_id: str) -> list[dict]:
    return json.loads((data / image_id[:5] / f"{image_id}.json").read_text())["segments"]


def test_rendered_pictures_make_the_round_trip(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.fastcomposer.CACHE_ROOT", tmp_path / "cache")
    folder, truth = scenes
    data = tmp_path / "data"
    assert run(folder, "--output", data) == 0
    assert "8 good, 0 broken" in capsys.readouterr().out
    assert read_ids(data, "train") == read_ids(data, "") == [f"{i:09}" for i in range(8)]
    assert Image.open(data / "contact_sheet.png").width > 500
    before = sorted(data.rglob("*"))
    assert run("--check", data, "--sheet", tmp_path / "sheet.png") == 0
    assert sorted(data.rglob("*")) == before
    assert (tmp_path / "sheet.png").read_bytes() == (data / "contact_sheet.png").read_bytes()
    samples = Folder(data, 8, toyworld.SIZE)
    assert len(samples) == 8
    for i, scene in enumerate(truth):
        picture, masks = toyworld.render_scene(scene)
        sample = samples.read(i)
        assert sample.caption == scene.caption
        assert sample.ends == [subject.end for subject in scene.subjects]
        assert (sample.masks[:len(masks)] == masks).all()
        assert np.abs(sample.image.astype(float) - picture).mean() < 6  # JPEG
        assert sample.references.any((1, 2, 3)).sum() == len(masks)


def test_all_captions_of_the_small_world_are_understood():
    for seed in range(3000):
        scene = toyworld.sample_scene(seed, ("train", "test")[seed % 2])
        caption, words = build.find_people(scene.caption, build.NOUNS)
        assert caption == scene.caption
        assert [word.end() for word in words] == [subject.end for subject in scene.subjects]


@pytest.mark.parametrize(("caption", "expected", "words"), [
    ("two women and a man", "a woman and a woman and a man", "woman woman man"),
    ("Three elderly men", "an elderly man and an elderly man and an elderly man", "man man man"),
    ("a guy with 2 kids", "a guy with a kid and a kid", "guy kid kid"),
    ("a Woman's son on a man-made beach", None, "Woman son"),
    ("two dogs and women", None, ""), ("a crowd of people", None, ""), ("two of the men", None, ""),
    ("a chef and two chefs", "a chef and a chef and a chef", "chef chef chef")])
def test_people_in_captions(caption, expected, words):
    rewritten, found = build.find_people(caption, (*build.NOUNS, "chef"))
    assert rewritten == (expected or caption)
    assert [match[0] for match in found] == words.split()


def test_the_record_of_a_sample(pictures, tmp_path):
    assert run(pictures, "--output", tmp_path / "data") == 0
    stem = tmp_path / "data" / "00000" / "000000000"
    assert json.loads(stem.with_suffix(".json").read_text()) == {
        "image_id": "000000000", "caption": "a woman and a man", "source": "pair.jpg", "segments": [
            {"id": 1, "word": "woman", "start": 2, "end": 7, "coco_label": "person", "bbox": [4, 5, 14, 25]},
            {"id": 2, "word": "man", "start": 14, "end": 17, "coco_label": "person",
             "bbox": [24, 10, 36, 30]}]}
    assert np.load(stem.with_suffix(".npy")).dtype == np.uint8
    assert Image.open(stem.with_suffix(".jpg")).size == (40, 30)


def test_names_become_paired_references(pictures, tmp_path, capsys):
    add_picture(pictures, "other", "a woman, a man")
    (pictures / "pair_people.txt").write_text("Ada\n\n")
    (pictures / "other_people.txt").write_text("\nAda")
    assert run(pictures, "--output", tmp_path / "data") == 0
    assert "names     1, in several pictures 1" in capsys.readouterr().out
    assert [s.get("identity") for s in segments_of(tmp_path / "data", "000000000")] == [None, "Ada"]
    assert Folder(tmp_path / "data", 2, 64).places == {"Ada": [("000000000", 2), ("000000001", 1)]}


@pytest.mark.parametrize("kind", ["white", "white, 16 bit", "one bit", "palette", "16 bit", "second only",
                                  "RGB", "RGBA"])
def test_ways_to_write_a_mask(kind, pictures, tmp_path):
    path = pictures / "pair_mask.png"
    numbers = np.array(Image.open(path))
    expected = {"white": [1], "white, 16 bit": [1], "one bit": [1], "second only": [2]}.get(kind, [1, 2])
    if kind in ("white", "one bit"):
        mask = Image.fromarray(np.uint8(255 * (numbers == 1))).convert("1" if kind == "one bit" else "L")
    elif kind == "palette":
        mask = Image.fromarray(numbers).convert("P")
        mask.putdata(numbers.flatten().tolist())
        mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    elif kind == "RGB":
        mask = Image.fromarray(numbers).convert("RGB")
    elif kind == "RGBA":  # nobody is where it is transparent
        mask = Image.fromarray(np.dstack([np.where(numbers, numbers, 9)] * 3 + [255 * (numbers > 0)]
                                         ).astype(np.uint8))
    elif kind == "white, 16 bit":
        mask = Image.fromarray(np.uint16(65535 * (numbers == 1)))
    elif kind == "16 bit":
        mask = Image.fromarray(numbers.astype(np.uint16))
    else:
        mask = Image.fromarray(np.uint8(numbers * (numbers == 2)))
    mask.save(path)
    assert run(pictures, "--output", tmp_path / "data") == 0
    instances = np.load(tmp_path / "data" / "00000" / "000000000.npy")
    assert (instances == numbers * np.isin(numbers, expected)).all()
    assert [segment["id"] for segment in segments_of(tmp_path / "data", "000000000")] == expected


def test_pictures_are_taken_as_a_viewer_shows_them(pictures, tmp_path):
    """A phone's picture lies on its side and says so; a transparent one is seen on white."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.full((40, 30, 3), GRAY, np.uint8)
    lying[:, :5] = 0  # the top when turned
    Image.fromarray(lying).save(pictures / "pair.jpg", exif=exif, quality=95)
    add_picture(pictures, "clear")
    (pictures / "clear.jpg").unlink()
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(pictures / "clear.png")
    assert run(pictures, "--output", tmp_path / "data") == 0
    white, turned = (np.array(Image.open(path)) for path in sorted((tmp_path / "data").rglob("*.jpg")))
    assert white.min() > 250
    assert turned.shape == (30, 40, 3)
    assert turned[:4].max() < 30
    assert turned[8:].min() > 90


@pytest.mark.parametrize("spelled", [str.upper, str.title])
def test_files_as_windows_writes_them(spelled, pictures, tmp_path):
    """Names in capitals, UTF-16 with its mark and other line ends, and files of its own between them."""
    for path in list(pictures.iterdir()):
        path.rename(path.with_name("pair" + spelled(path.name.removeprefix("pair"))))
    (pictures / f"pair{spelled('.txt')}").write_bytes("a woman\u2028and a man\r\n".encode("utf-16"))
    (pictures / "Thumbs.db").write_bytes(b"")
    assert run(pictures, "--output", tmp_path / "data") == 0
    assert read_sample(tmp_path / "data", "000000000", 32).caption == "a woman and a man"
    ids = tmp_path / "data" / "image_ids_train.txt"
    ids.write_bytes(b"\xef\xbb\xbf" + ids.read_bytes())
    assert read_ids(tmp_path / "data", "train") == ["000000000"]


def break_mask(value):
    return "_mask.png", lambda path: Image.fromarray(value).save(path)


def write(data: bytes):
    return lambda path: path.write_bytes(data)


BROKEN_INPUTS = {
    "no caption": (".txt", Path.unlink, "worse.txt: not there: write a caption"),
    "empty caption": (".txt", write(b"\n"), "one line, not 0"),
    "two captions": (".txt", write(b"a man\na woman"), "one line, not 2"),
    "caption that is no text": (".txt", write(b"\xff a man"), "not a text in UTF-8"),
    "caption of old Windows": (".txt", write("a man in a café".encode("cp1252")), "save it as UTF-8"),
    "UTF-16 without its mark": (".txt", write("a man".encode("utf-16-le")), "it holds zeros"),
    "nobody in the caption": (".txt", write(b"a dog on a man-made beach"), "give --nouns"),
    "fewer words than people": (".txt", write(b"a woman"), "persons 1, 2 on the mask"),
    "no mask": ("_mask.png", Path.unlink, "worse_mask.png: not there"),
    "empty mask": (*break_mask(np.zeros((30, 40), np.uint8)), "nobody on the mask"),
    "mask of another size": (*break_mask(np.ones((40, 30), np.uint8)), "30 x 40 pixels, the picture"),
    "mask in colors": (*break_mask(np.tile(np.uint8([1, 2, 3]), (30, 40, 1))), "greyscale or palette, a"),
    "mask with soft edges": (*break_mask(np.arange(1200).reshape(30, 40).astype(np.uint8)), "1, 2, 3, 4, 5"),
    "mask that is no png": ("_mask.png", write(b"P5 1 1 255 a"), "a mask is a PNG, this is PPM"),
    "half a mask": ("_mask.png", lambda path: path.write_bytes(path.read_bytes()[:60]), "_mask.png"),
    "empty picture": (".jpg", write(b""), "it is empty"),
    "half a picture": (".jpg", lambda path: path.write_bytes(path.read_bytes()[:400]), "Truncated"),
    "no picture": (".jpg", write(b"ftypheic"), "Save it as JPEG or PNG"),
    "more names than words": ("_people.txt", write(b"a\nb\nc"),
                              "names: 3, words for a person in the caption: 2"),
    "names that are no text": ("_people.txt", write(b"\xff"), "save it as UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN_INPUTS)
def test_a_broken_input_is_listed_and_only_left_out_if_told_to(name, pictures, tmp_path, capsys):
    suffix, damage, message = BROKEN_INPUTS[name]
    add_picture(pictures, "worse")
    damage(pictures / f"worse{suffix}")
    assert run(pictures, "--output", tmp_path / "data") == 1
    assert not (tmp_path / "data").exists()
    listed, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken")]
    assert str(pictures / "worse") in listed
    assert message in listed
    assert run(pictures, "--output", tmp_path / "data", "--skip-broken") == 1
    assert len(read_ids(tmp_path / "data", "train")) == 1
    assert run("--check", tmp_path / "data") == 0


def test_all_faults_are_said_at_once_and_mended_it_goes_on(pictures, tmp_path, capsys):
    for name in ("camera", "chef"):
        Image.new("RGB", (40, 30), GRAY).save(pictures / f"{name}.jpg")
    (pictures / "chef.txt").write_text("a chef")
    (pictures / "pair_people.txt").write_text("Ada\nBob\nCem")
    assert run(pictures, "--output", tmp_path / "data") == 1
    out = capsys.readouterr().out
    assert [line.split(": ")[0].split("/")[-1] for line in out.splitlines() if line.startswith("broken")] == [
        "camera.txt", "camera_mask.png", "chef.txt", "chef_mask.png", "pair_people.txt"]
    (pictures / "pair_people.txt").unlink()
    for name in ("camera", "chef"):
        add_picture(pictures, name)
    assert run(pictures, "--output", tmp_path / "data") == 0


def test_files_without_a_picture_and_pictures_of_one_name(pictures, tmp_path, capsys):
    (pictures / "lone.txt").write_text("a man")
    (pictures / "lone_mask.png").write_bytes(b"")
    (pictures / "sub").mkdir()
    add_picture(pictures / "sub", "twice")
    add_picture(pictures / "sub", "a_people")  # its caption is nobody's list of names
    Image.new("RGB", (40, 30)).save(pictures / "sub" / "twice.png")
    (pictures / ".hidden.jpg").write_bytes(b"")
    (pictures / "film.mp4").write_bytes(b"")
    (pictures / "link").symlink_to(pictures / "sub")
    (pictures / "gone.jpg").symlink_to(pictures / "nowhere.jpg")
    assert run(pictures, "--output", tmp_path / "data", "--skip-broken") == 1
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken")]
    assert len(listed) == 6
    assert "twice: 2 pictures have this name" in listed[0]
    assert "film.mp4: not read, pictures are .jpg" in listed[1]
    for place, name in ((2, "gone.jpg"), (3, "link")):
        assert f"{name}: not read, it is a link or a device, no file: copy here" in listed[place]
    assert "lone.txt: there is no picture for it" in listed[4]
    assert "lone_mask.png: there is no picture for it" in listed[5]
    assert len(read_ids(tmp_path / "data", "train")) == 2


@pytest.mark.parametrize(("mode", "clear"), [("P", 1), ("P", bytes([255, 0, 255])), ("L", 1), ("I;16", 1)])
def test_nobody_is_where_a_mask_is_transparent(mode, clear, tmp_path):
    labels = np.array([[0, 1, 2]] * 3, np.uint16 if mode == "I;16" else np.uint8)
    mask = Image.fromarray(labels)
    if mode == "P":
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "a_mask.png", transparency=clear)
    assert np.array_equal(read_mask(tmp_path / "a_mask.png", (3, 3)),
                          labels * (labels != 1))


def test_pictures_without_people(pictures, tmp_path, capsys):
    """With --without-people captions may be about anything, and masks are not read."""
    (pictures / "pair_mask.png").unlink()
    Image.new("RGB", (60, 40), GRAY).save(pictures / "still.png")
    (pictures / "still.txt").write_text("two women and a bowl of fruit")
    assert run(pictures, "--output", tmp_path / "data") == 1
    assert "nothing is written: 0 of 2" in capsys.readouterr().out
    data = tmp_path / "data"
    assert run(pictures, "--output", data, "--without-people") == 0
    assert "2 good, 0 broken" in capsys.readouterr().out
    assert [segments_of(data, image_id) for image_id in read_ids(data, "train")] == [[], []]
    samples = Folder(data, 8, 32)
    assert samples.people == 0
    assert samples.read(0).caption == "a woman and a man"
    assert samples.read(1).caption == "two women and a bowl of fruit"
    assert not samples.read(1).masks.any()


def test_more_nouns(pictures, tmp_path):
    (pictures / "pair.txt").write_text("an astronaut and a man")
    assert run(pictures, "--output", tmp_path / "data", "--nouns", "astronaut", "chef") == 0
    assert [s["word"] for s in segments_of(tmp_path / "data", "000000000")] == ["astronaut", "man"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere", "--output", "data"], "nowhere is not a folder"),
    (["empty", "--output", "data"], "holds no picture"),
    (["pictures", "--output", "pictures"], "exists already"),
    (["pictures", "--output", "pictures/data"], "is inside of"),
    (["broken", "--output", "data", "--skip-broken"], "none of the 1 pictures"),
    (["twice", "--output", "data", "--skip-broken"], "2 pictures have this name"),
    (["pictures"], "give FOLDER and --output"), ([], "give FOLDER"),
    (["pictures", "--check", "data"], "nothing to build"),
    (["pictures", "--output", "data", "--sheet", "a.png"], "give FOLDER"),
    (["pictures", "--output", "data", "--nouns", "a man"], "is not a word"),
    (["--check", "nowhere"], "nowhere is not a dataset, it has no image_ids_train.txt: give")])
def test_errors_are_one_line_and_write_nothing(arguments, message, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(pictures, tmp_path / "broken")
    (tmp_path / "broken" / "pair.txt").unlink()
    shutil.copytree(pictures, tmp_path / "twice")
    shutil.copy(pictures / "pair.jpg", tmp_path / "twice" / "pair.png")
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 2)])
def test_a_dataset_is_written_whole_or_not_at_all(error, status, pictures, tmp_path, monkeypatch):
    def stop(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(build, "draw_sheet", stop)
        assert run(pictures, "--output", tmp_path / "data") == status
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    (tmp_path / "data").mkdir()  # an empty folder is free
    assert run(pictures, "--output", tmp_path / "data") == 0


def test_every_broken_sample_of_a_dataset_is_listed(tmp_path, capsys):
    stems = write_folder(tmp_path / "data", len(BROKEN) + 2)
    for stem, (suffix, damage) in zip(stems[1:-1], BROKEN.values(), strict=True):
        damage(stem.with_suffix(suffix))
    with open(tmp_path / "data" / "image_ids_train.txt", "a") as ids:
        ids.write("\n../../etc/passwd\n000000012")
    assert run("--check", tmp_path / "data", "--sheet", tmp_path / "sheet.png") == 1
    out = capsys.readouterr().out.splitlines()
    assert f"2 good, {len(BROKEN) + 2} broken" in out[0]
    listed = "\n".join(line for line in out if line.startswith("broken"))
    for stem, (suffix, _) in zip(stems[1:-1], BROKEN.values(), strict=True):
        assert f"{stem.name}{suffix}: " in listed
    assert "passwd' is not an image id" in listed
    assert "id 000000012 is listed 2 times" in listed
    assert len(listed.splitlines()) == len(BROKEN) + 2
    assert (tmp_path / "sheet.png").exists()


def test_what_the_renderer_writes_is_good(tmp_path, capsys):
    for split in ("train", "test"):
        toyworld.main(["--output", str(tmp_path / "data"), "--count", "6", "--split", split])
    assert run("--check", tmp_path / "data") == 0
    out = capsys.readouterr().out
    assert "train 6, test 6; 12 good, 0 broken" in out
    assert out.count("note") == 1  # its pictures are small


def test_a_dataset_without_a_good_sample(tmp_path, capsys):
    for stem in write_folder(tmp_path / "data", 2):
        stem.with_suffix(".npy").unlink()
    assert run("--check", tmp_path / "data", "--sheet", tmp_path / "sheet.png") == 1
    assert "0 good, 2 broken" in capsys.readouterr().out
    assert not (tmp_path / "sheet.png").exists()


def test_what_is_odd_is_noted(tmp_path, capsys):
    stems = write_folder(tmp_path / "data", 4)
    for suffix in SUFFIXES:
        shutil.copy(stems[0].with_suffix(suffix), stems[0].with_name(f"000000999{suffix}"))
    records = [json.loads(stem.with_suffix(".json").read_text()) for stem in stems]
    records[1]["segments"].pop()
    records[2]["segments"][0]["end"] = records[2]["segments"][1]["end"]
    records[3]["caption"] = records[3]["caption"].replace("boy", "elf")
    for stem, record in zip(stems, records, strict=True):
        stem.with_suffix(".json").write_text(json.dumps(record))
    (tmp_path / "data" / "image_ids.txt").write_text("000000012")
    (tmp_path / "data" / "image_ids_test.txt").write_text("000000999")
    assert run("--check", tmp_path / "data", "--sheet", tmp_path / "sheet.png") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert [note.split(": ")[1] for note in notes] == ["1", "1", "1", "5", "4"]
    assert "(elf)" in notes[0]
    assert "more words for people than there are segments" in notes[1]
    assert "share a word" in notes[2]
    assert "512" in notes[3]
    assert "in only one of" in notes[4]


def test_people_beside_the_square_are_noted(pictures, tmp_path, capsys):
    numbers = np.zeros((30, 200), np.uint8)
    numbers[:, :9], numbers[:, 90:99] = 1, 2
    Image.new("RGB", (200, 30), GRAY).save(pictures / "pair.jpg")
    Image.fromarray(numbers).save(pictures / "pair_mask.png")
    assert run(pictures, "--output", tmp_path / "data") == 0
    assert "people outside of the middle square that is trained on: 1" in capsys.readouterr().out
    assert read_sample(tmp_path / "data", "000000000", 64).ends == [17]
