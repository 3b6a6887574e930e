"""The renderer is a pure function, its folder layout is read back exactly, broken folders are named."""
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import toyworld
from data.fastcomposer import (
    MAX_PEOPLE,
    DataError,
    Folder,
    find_places,
    open_sample,
    people_of,
    read_ids,
    read_record,
    read_sample,
)
from data.processes import in_processes
from data.sample import batch_indices
from data.shards import SIZE, ShardError, Shards, build_shards, shards_of
from data.stream import Stream
from toyworld.rendered import MAX_SUBJECTS, portrait_sample, scene_labels, scene_sample, write_cache

ROOT = Path(__file__).parents[1]


def checksum(sample) -> int:
    return zlib.crc32(b"".join(a.tobytes() for a in (sample.image, sample.masks, sample.references)))


def first_scene(**wanted) -> toyworld.Scene:
    """The first training scene with these values."""
    return next(scene for scene in map(toyworld.sample_scene, range(10_000))
                if all(getattr(scene, name) == value for name, value in wanted.items()))


# The small world ---------------------------------------------------------------------------------


def test_same_seed_same_bytes_in_another_process():
    seeds = range(3)
    here = [checksum(scene_sample(seed, "train")) for seed in seeds]
    code = ("from tests.test_data import checksum, scene_sample\n"
            f"print([checksum(scene_sample(s, 'train')) for s in {list(seeds)}])")
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == here
    assert len(set(here)) == len(here)
    assert checksum(scene_sample(0, "test")) not in here


def test_a_render_depends_on_its_own_seed_only():
    scene = toyworld.sample_scene(5)
    image, masks = toyworld.render_scene(scene)
    toyworld.render_scene(toyworld.sample_scene(6))
    np.random.default_rng().random()
    again, masks_again = toyworld.render_scene(scene)
    assert (image == again).all()
    assert (masks == masks_again).all()


def test_splits_share_no_person_and_held_out_pairs_are_never_trained_on():
    train = [toyworld.sample_scene(seed, "train") for seed in range(3000)]
    test = [toyworld.sample_scene(seed, "test") for seed in range(1000)]
    people = {split: {toyworld.identity_key(s.identity) for scene in scenes for s in scene.subjects}
              for split, scenes in (("train", train), ("test", test))}
    assert not people["train"] & people["test"]
    assert not {(s.activity, s.context) for s in train} & toyworld.HELD_OUT
    assert {(s.activity, s.context) for s in test} >= toyworld.HELD_OUT
    # ... and what training can see, it sees.
    assert {s.activity for s in train} == set(toyworld.ACTIVITIES)
    assert {s.context for s in train} == set(toyworld.CONTEXTS)
    assert {s.style for s in train} == set(toyworld.STYLES)


def test_twin_portraits_differ_in_one_attribute():
    for pair in range(4):
        a, b = (portrait_sample(2 * pair + i, "train").labels["attributes"][0] for i in range(2))
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_masks_are_disjoint_and_lie_on_the_people():
    for seed in range(12):
        scene = toyworld.sample_scene(seed)
        image, masks = toyworld.render_scene(scene)
        assert image.shape == (toyworld.SIZE, toyworld.SIZE, 3)
        assert image.dtype == np.uint8
        assert masks.shape == (len(scene.subjects), toyworld.SIZE, toyworld.SIZE)
        assert masks.sum(0).max() == 1
        shares = masks.mean((1, 2))
        assert (shares > 0.02).all() and (shares < 0.5).all()
        # Subjects run from left to right.
        centers = [np.nonzero(mask)[1].mean() for mask in masks]
        assert centers == sorted(centers)


def test_another_person_changes_the_picture_inside_the_masks_only():
    """What the masked loss relies on: the background does not know who stands before it."""
    scene = first_scene(activity="standing", style="", context="in a park")
    others = [toyworld.sample_identity(np.random.default_rng(k), noun=s.identity.noun)
              for k, s in enumerate(scene.subjects)]
    images, masks = zip(*(toyworld.render_scene(toyworld.compose_scene(3, people, "standing", "in a park"))
                          for people in ([s.identity for s in scene.subjects], others)), strict=True)
    covered = masks[0].any(0) | masks[1].any(0)
    grown = np.array(Image.fromarray(np.uint8(covered)).resize((32, 32), Image.Resampling.BOX)) > 0
    grown = np.kron(grown | covered.reshape(32, 4, 32, 4).any((1, 3)), np.ones((4, 4))) > 0
    changed = (images[0] != images[1]).any(-1)
    assert changed[covered].mean() > 0.5
    assert changed[~grown].mean() < 0.02  # soft edges and the shadow


def test_captions_name_their_subjects_in_known_words():
    known = set(toyworld.vocabulary())
    for seed in range(2000):
        scene = toyworld.sample_scene(seed, ("train", "test")[seed % 2])
        assert set(scene.caption.lower().split()) <= known
        ends = [subject.end for subject in scene.subjects]
        assert ends == sorted(set(ends))
        for subject in scene.subjects:
            assert scene.caption[:subject.end].split()[-1] == subject.noun
            assert subject.noun in (subject.identity.noun, toyworld.TRAITS[subject.identity.noun].generic)


def test_a_description_tells_every_attribute():
    rng = np.random.default_rng(0)
    known = set(toyworld.vocabulary())
    seen: dict[str, tuple] = {}
    for _ in range(4000):
        person = toyworld.sample_identity(rng)
        text = toyworld.describe(person)
        assert set(text.split()) <= known
        labels = (person.noun, *toyworld.attribute_labels(person).values())
        assert seen.setdefault(text, labels) == labels  # equal texts, equal people


def test_labels_are_hidden_where_the_picture_hides_them():
    pencil = scene_labels(first_scene(style="pencil drawing"))["attributes"]
    assert all((value == -1) == (name in toyworld.COLOR_ATTRIBUTES)
               for person in pencil for name, value in zip(toyworld.ATTRIBUTES, person, strict=True))
    suit = scene_labels(first_scene(activity="wearing a space suit", style=""))["attributes"]
    hidden = {name for name, value in zip(toyworld.ATTRIBUTES, suit[0], strict=True) if value == -1}
    assert hidden == toyworld.SUIT


def test_compose_scene_refuses_what_cannot_be_drawn():
    person = toyworld.sample_identity(np.random.default_rng(0))
    for people, activity in (([], "standing"), ([person] * 3, "standing"), ([person], "dancing"),
                             ([person] * 2, "riding a bike"), ([person], "flying")):
        with pytest.raises(ValueError, match="cannot be"):
            toyworld.compose_scene(0, people, activity, "in Paris")


# Caches and batches ------------------------------------------------------------------------------


def test_batches_are_a_pure_function_and_cover_every_epoch_once():
    count, size = 10, 4
    steps = [batch_indices(3, step, size, count) for step in range(10)]  # 40 places, 4 epochs
    order = np.concatenate(steps)
    for epoch in order.reshape(4, count):
        assert sorted(epoch) == list(range(count))
    assert any((a != b).any() for a, b in zip(order[:count], order[count:2 * count], strict=True))
    for step in (7, 2):  # asked again, out of order
        assert (batch_indices(3, step, size, count) == steps[step]).all()
    assert (batch_indices(4, 0, size, count) != steps[0]).any()
    long = batch_indices(0, 0, 25, count)  # a batch of two epochs and a half
    assert sorted(long[:20]) == sorted([*range(count)] * 2)
    assert len(set(long[20:])) == 5


def failing_sample(seed: int):
    if seed == 3:
        raise RuntimeError("sample 3")
    return scene_sample(seed, "train")


def train_sample(seed: int):
    return scene_sample(seed, "train")


def test_a_cache_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="sample 3"):
        write_cache(tmp_path / "cache", failing_sample, range(4), workers=1)
    assert not list(tmp_path.iterdir())
    cache = write_cache(tmp_path / "cache", train_sample, range(2, 5), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert len(cache) == 3
    for i, seed in enumerate(range(2, 5)):
        sample = train_sample(seed)
        assert (cache.images[i] == sample.image).all()
        assert (cache.references[i] == sample.references).all()
        assert (cache.masks([i])[0] == sample.masks).all()
        assert cache.samples[i] == {"caption": sample.caption, "ends": sample.ends, "labels": sample.labels}
    # It is there, so nothing is made again.
    assert len(write_cache(tmp_path / "cache", failing_sample, range(4))) == 3


@pytest.mark.parametrize(("code", "status"), [
    ("from tests.test_data import *; write_cache(Path('cache'), train_sample, range(40), workers=1)", 1),
    ("from toyworld import main; main(['--output', 'world', '--count', '40'])", 2)])
def test_a_full_disk_is_an_error_with_a_path(code, status, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100000", "tmpfs", tmp_path], check=False,
                      capture_output=True).returncode:
        pytest.skip("only root makes a small disk")
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                              check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
        left = {path.name for path in tmp_path.iterdir()}
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert done.returncode == status, done.stderr  # -7 where it was ended by SIGBUS
    last = done.stderr.splitlines()[-1]
    assert "cache cannot be written (No space left" in last or "error: cannot write to world: " in last
    assert left <= {"world"}


# The folder layout -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six training pictures and two for testing, as the command line writes them."""
    output = tmp_path_factory.mktemp("layout") / "world"
    for split, count in (("train", 6), ("test", 2)):
        toyworld.main(["--output", str(output), "--count", str(count), "--split", split, "--seed", "40"])
    return output


def test_a_written_folder_is_read_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data.fastcomposer.CACHE_ROOT", tmp_path)
    assert len(read_ids(folder, "train")) == 6
    for split, count in (("train", 5), ("test", 2)):
        samples = Folder(folder, count, toyworld.SIZE, split, max_people=MAX_SUBJECTS)
        assert len(samples) == count
        for i in range(count):
            truth = scene_sample(40 + i, split)
            image_id = read_ids(folder, split)[i]
            sample = samples.read(i)
            assert (sample.image == np.array(Image.open(folder / image_id[:5] / f"{image_id}.jpg"))).all()
            assert np.abs(sample.image.astype(float) - truth.image).mean() < 6  # JPEG
            assert (sample.masks == truth.masks).all()
            assert (sample.caption, sample.ends) == (truth.caption, truth.ends)
            present = sample.references.any((1, 2, 3))
            assert (present == truth.masks.any((1, 2))).all()
    assert len(list(tmp_path.iterdir())) == 2
    Folder(folder, 5, toyworld.SIZE)
    assert len(list(tmp_path.iterdir())) == 2  # checked already
    Folder(folder, 4, toyworld.SIZE)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_has_both_splits(folder):
    ids = {name: (folder / f"image_ids{name}.txt").read_text().split() for name in ("", "_train", "_test")}
    assert ids[""] == ids["_train"] + ids["_test"]
    assert len(set(ids[""])) == 8


@pytest.mark.parametrize("options", [
    ["--count", "0"], ["--count", "2", "--workers", "0"], ["--count", "2", "--seed", "-1"],
    ["--count", "many"], ["--count", "2", "--split", "dev"], ["--count", "2", "--seed", "400000000"], []])
def test_bad_values_on_the_command_line(tmp_path, options, capsys):
    with pytest.raises(SystemExit) as stop:
        toyworld.main(["--output", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Hand-made samples -------------------------------------------------------------------------------

RED, BLUE, GRAY = (250, 0, 0), (0, 0, 250), (128, 128, 128)


def write_sample(folder: Path, size: tuple[int, int] = (60, 40)) -> Path:
    """A gray picture (width, height) with a red box, segment 7, and a smaller blue one, segment 9."""
    width, height = size
    picture = np.full((height, width, 3), GRAY, np.uint8)
    instances = np.zeros((height, width), np.uint8)
    boxes = {7: [20, 10, 30, 30], 9: [40, 20, 44, 36]}
    for number, color in ((7, RED), (9, BLUE)):
        x1, y1, x2, y2 = boxes[number]
        picture[y1:y2, x1:x2], instances[y1:y2, x1:x2] = color, number
    caption = "a man beside a tall boy"
    segments = [{"id": 9, "end": len(caption), "bbox": boxes[9], "coco_label": "person"},
                {"id": 7, "end": 5, "bbox": boxes[7]}]
    stem = folder / "00000" / "000000012"
    stem.parent.mkdir(parents=True)
    (folder / "image_ids_train.txt").write_text("000000012\n")
    Image.fromarray(picture).save(stem.with_suffix(".jpg"), quality=95, subsampling=0)
    np.save(stem.with_suffix(".npy"), instances)
    stem.with_suffix(".json").write_text(json.dumps({"caption": caption, "segments": segments}))
    return stem


def read_stem(stem: Path, size: int, **options):
    return read_sample(stem.parents[1], stem.name, size, **options)


def edit_json(stem: Path, change) -> None:
    """Hand the record to `change` and write it back."""
    path = stem.with_suffix(".json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_sample_is_cut_square_and_its_subjects_are_in_caption_order(tmp_path):
    sample = read_stem(write_sample(tmp_path), 80)
    assert sample.image.shape == (80, 80, 3)
    assert sample.ends == [5, 23]
    assert sample.labels == {}
    expected = np.zeros((MAX_PEOPLE, 80, 80), bool)
    expected[0, 20:60, 20:40] = True  # columns 10 to 50 are kept, then everything is doubled
    expected[1, 40:72, 60:68] = True
    assert (sample.masks == expected).all()
    for mask, color in zip(expected[:2], (RED, BLUE), strict=True):
        assert np.abs(np.median(sample.image[mask], axis=0) - color).max() < 12


def test_a_reference_is_the_subject_on_noise_padded_to_a_square(tmp_path):
    stem = write_sample(tmp_path)
    edit_json(stem, lambda r: r["segments"][1].update(bbox=[15, 10, 35, 40]))  # twice as wide as the box
    reference = read_stem(stem, 60).references[0]  # 20 x 30, padded by 5 on both sides, doubled
    assert reference.shape == (60, 60, 3)
    assert not reference[:, :8].any() and not reference[:, -8:].any()
    assert np.abs(reference[3:37, 23:37].astype(int) - RED).max() < 60
    noise = reference[44:56, 14:46].astype(float)
    assert noise.std() > 25  # neither gray, nor black
    assert (read_stem(stem, 60).references == read_stem(stem, 60).references).all()


def test_a_subject_outside_the_cut_is_left_out(tmp_path):
    sample = read_stem(write_sample(tmp_path, (300, 40)), 40)  # the middle 40 columns show neither
    assert sample.ends == []
    assert not sample.masks.any() and not sample.references.any()


def test_a_transparent_picture_is_seen_on_white(tmp_path):
    stem = write_sample(tmp_path)
    Image.new("RGBA", (60, 40)).save(stem.with_suffix(".jpg"), format="PNG")
    assert read_stem(stem, 40).image.min() == 255


def test_a_tall_picture_gets_black_sides(tmp_path):
    tall = read_stem(write_sample(tmp_path, (60, 80)), 160)
    expected = np.zeros((160, 160), bool)
    expected[20:60, 60:80] = True  # 10 columns on both sides, then doubled
    assert (tall.masks[0] == expected).all()
    assert not tall.image[:, :18].any() and not tall.image[:, -18:].any()
    assert np.abs(np.median(tall.image[expected], axis=0) - RED).max() < 12


def test_segments_that_are_no_people_are_left_out(tmp_path):
    stem = write_sample(tmp_path)
    edit_json(stem, lambda r: r["segments"][0].update(coco_label="tie", bbox=None))
    assert read_stem(stem, 40).ends == [5]


def test_masks_are_resized_to_the_nearest_pixel(tmp_path):
    stem = write_sample(tmp_path)
    instances = np.zeros((40, 60), np.uint8)
    instances[1::2, 1::2] = 7  # a quarter of all pixels, and the ones that are kept
    instances[20, 40] = 9
    np.save(stem.with_suffix(".npy"), instances)
    assert read_stem(stem, 20).masks[0].all()


def test_the_largest_subjects_are_kept_and_equal_ends_stay_two(tmp_path):
    stem = write_sample(tmp_path)
    instances = np.load(stem.with_suffix(".npy"))
    instances[0, 20:24] = 200
    np.save(stem.with_suffix(".npy"), instances)
    edit_json(stem, lambda r: r["segments"].insert(0, {"id": 200, "end": 12, "bbox": [20, 0, 24, 1]}))
    assert read_stem(stem, 40).ends == [5, 12, 23]
    assert read_stem(stem, 40, max_people=2).ends == [5, 23]
    edit_json(stem, lambda r: [s.update(end=5) for s in r["segments"]])
    sample = read_stem(stem, 40, max_people=2)
    assert sample.ends == [5, 5]
    assert sample.masks.any((1, 2)).all()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def break_npy(value):
    return ".npy", lambda path: np.save(path, value)


def break_json(change):
    return ".json", lambda path: edit_json(path.with_suffix(""), change)


def write_archive(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, np.zeros((40, 60), np.uint8))


def link_out(path: Path) -> None:
    """Move a file out of the folder and leave a link."""
    outside = path.parents[2] / f"outside{path.suffix}"
    path.rename(outside)
    path.symlink_to(outside)


def first(**values):
    return break_json(lambda r: r["segments"][0].update(values))


BROKEN = {
    "no picture": (".jpg", Path.unlink),
    "half a picture": (".jpg", lambda path: path.write_bytes(path.read_bytes()[:700])),
    "no picture at all": (".jpg", lambda path: path.write_bytes(b"GIF89a")),
    "a folder": (".jpg", lambda path: (path.unlink(), path.mkdir())),
    "no map": (".npy", Path.unlink),
    "empty map": (".npy", lambda path: path.write_bytes(b"")),
    "half a map": (".npy", lambda path: path.write_bytes(path.read_bytes()[:500])),
    "map of another shape": break_npy(np.zeros((40, 59), np.uint8)),
    "transposed map": break_npy(np.zeros((60, 40), np.uint8)),
    "map of colors": break_npy(np.zeros((40, 60, 3), np.uint8)),
    "float map": break_npy(np.zeros((40, 60))),
    "bool map": break_npy(np.zeros((40, 60), bool)),
    "pickled map": (".npy", lambda path: path.write_bytes(pickle.dumps(Bomb()))),
    "map of objects": (".npy", lambda path: np.save(path, np.full((40, 60), Bomb()), allow_pickle=True)),
    "map in an archive": (".npy", write_archive),
    "no record": (".json", Path.unlink),
    "invalid json": (".json", lambda path: path.write_text('{"caption": "a')),
    "deep json": (".json", lambda path: path.write_text("[" * 100_000)),
    "not utf-8": (".json", lambda path: path.write_bytes(b'{"caption": "\xff"}')),
    "a list": (".json", lambda path: path.write_text("[1]")),
    "null": (".json", lambda path: path.write_text("null")),
    "no caption": break_json(lambda r: r.pop("caption")),
    "caption of numbers": break_json(lambda r: r.update(caption=list(range(30)))),
    "no segments": break_json(lambda r: r.pop("segments")),
    "segment is a text": break_json(lambda r: r.update(segments=["cat"])),
    "no end": break_json(lambda r: r["segments"][0].pop("end")),
    "end behind the caption": first(end=24),
    "end at zero": first(end=0),
    "end is a text": first(end="5"),
    "id is a float": first(id=9.0),
    "bbox right of the picture": first(bbox=[40, 20, 61, 36]),
    "bbox below the picture": first(bbox=[40, 20, 44, 41]),
    "negative bbox": first(bbox=[-1, 20, 44, 36]),
    "bbox of no width": first(bbox=[44, 20, 44, 36]),
    "bbox of three numbers": first(bbox=[40, 20, 44]),
    "bbox of floats": first(bbox=[40.0, 20, 44, 36]),
    "bbox from right to left": first(bbox=[44, 20, 40, 36]),
    "bbox as y1, x1, y2, x2": first(bbox=[20, 40, 36, 44]),
    "bbox beside its segment": first(bbox=[0, 0, 5, 5]),
    "bbox of NaN": first(bbox=[float("nan"), 20, 44, 36]),
    "map of NaN": break_npy(np.full((40, 60), np.nan)),
    "segment without a pixel": first(id=5),
    "id that fits no map": first(id=10**30),
    "one id twice": first(id=7),
    "empty caption": break_json(lambda r: r.update(caption="", segments=[])),
    "blank caption": break_json(lambda r: r.update(caption=" \n")),
    "end in a word": first(end=3),
    "end before any word": break_json(lambda r: r.update(caption=" " + r["caption"][1:]) or (
        r["segments"][0].update(end=1))),
    "segments are an object": break_json(lambda r: r.update(segments={"id": 7})),
    "identity is a list": first(identity=["ada"]),
    "no bytes": (".jpg", lambda path: path.write_bytes(b"")),
    "a gif": (".jpg", lambda path: Image.new("RGB", (60, 40)).save(path, "GIF")),
    "postscript": (".jpg", lambda path: Image.new("RGB", (60, 40)).save(path, "EPS")),
    "picture outside": (".jpg", link_out),
    "record outside": (".json", link_out),
    "a link to itself": (".npy", lambda path: (path.unlink(), path.symlink_to(path))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stem = write_sample(tmp_path / "data")
    suffix, damage = BROKEN[name]
    damage(stem.with_suffix(suffix))
    with pytest.raises(DataError, match=f"{stem}{suffix}: ") as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_stem(stem, 40)
    assert len(str(error.value).splitlines()) == 1
    assert not Path("exploded").exists()


def write_folder(folder: Path, count: int) -> list[Path]:
    """Samples 000000012, 000000013, ..., all equal."""
    first = write_sample(folder)
    ids = [f"{12 + i:09}" for i in range(count)]
    (folder / "image_ids_train.txt").write_text("\n".join(ids))
    for image_id in ids[1:]:
        for suffix in (".jpg", ".npy", ".json"):
            shutil.copy(first.with_suffix(suffix), first.with_name(f"{image_id}{suffix}"))
    return [first.with_name(image_id) for image_id in ids]


@pytest.fixture
def cache_root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("data.fastcomposer.CACHE_ROOT", tmp_path / "cache")
    return tmp_path / "cache"


def test_broken_samples_are_skipped_and_counted(tmp_path, cache_root, capsys):
    stems = write_folder(tmp_path / "data", 6)
    whole = stems[1].with_suffix(".npy").read_bytes()
    stems[1].with_suffix(".npy").write_bytes(b"")
    stems[4].with_suffix(".jpg").unlink()
    with open(tmp_path / "data" / "image_ids_train.txt", "a") as file:
        file.write("\n../../etc\n000000012\n")
    for _ in range(2):  # the second time from what is remembered
        samples = Folder(tmp_path / "data", 100, 40)
        assert len(samples) == len(samples.ids) == 4
        warning, = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert "4 of 8 samples are broken and left out" in warning
        assert "listed 2 times" in warning and "000000013.npy" in warning and "data.build --check" in warning
    truth = read_stem(stems[0], 40)
    for i in range(4):
        assert (samples.read(i).image == truth.image).all()
        assert (samples.read(i).masks == truth.masks).all()
    assert len(list(cache_root.iterdir())) == 1
    stems[1].with_suffix(".npy").write_bytes(whole)  # repaired: checked anew
    assert len(Folder(tmp_path / "data", 100, 40)) == 5
    assert len(Folder(tmp_path / "data", 1, 40)) == 1
    assert "warning" not in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_broken_samples_only_leaves_no_cache(tmp_path, cache_root):
    for stem in write_folder(tmp_path / "data", 2):
        stem.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"none of the 2 samples can be used: .*000000012.json: "):
        Folder(tmp_path / "data", 2, 40)
    assert not cache_root.exists()


def kill_itself(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reading_process_that_is_killed_ends_the_reading():
    with pytest.raises(ChildProcessError, match="killed"):
        list(in_processes(kill_itself, range(3), "reading"))


@pytest.mark.parametrize(("count", "workers"), [(0, None), (3, 1), (50, 3)])
def test_results_come_in_order(count, workers):
    assert list(in_processes(hex, range(count), "counting", workers=workers)) == list(map(hex, range(count)))


@pytest.mark.parametrize("text", [None, "", "\n\n", b"\xff"])
def test_a_bad_list_of_ids(text, tmp_path):
    path = tmp_path / "image_ids_train.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = f"{tmp_path} is not a dataset, it has no {path.name}: give" if text is None else f"{path}: "
    with pytest.raises(DataError, match=said):
        read_ids(tmp_path, "train")


@pytest.mark.parametrize("image_id", ["../../etc/passwd", "/etc/passwd", "12a", "²", "12.jpg", "00/12"])
def test_a_bad_id_is_refused(image_id, tmp_path):
    write_sample(tmp_path)
    with pytest.raises(DataError, match="is not an image id"):
        read_sample(tmp_path, image_id, 40)


def test_large_pictures_have_references_of_clip_s_size(tmp_path, cache_root):
    write_folder(tmp_path / "data", 1)
    sample = Folder(tmp_path / "data", 1, 256).read(0)
    assert sample.image.shape == (256, 256, 3)
    assert sample.references.shape == (MAX_PEOPLE, 224, 224, 3)


# Augmentation and paired references --------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_sample_and_epoch(tmp_path, cache_root):
    stems = write_folder(tmp_path / "data", 8)
    plain = read_stem(stems[0], 64)
    state = torch.random.get_rng_state()
    drawn = {(seed, stem): read_stem(stem, 64, augmented=True, seed=seed)
             for seed in range(2) for stem in stems}
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    for (seed, stem), sample in drawn.items():
        assert checksum(read_stem(stem, 64, augmented=True, seed=seed)) == checksum(sample)
        assert sample.ends == plain.ends
        flipped = (sample.image == plain.image[:, ::-1]).all()
        assert flipped or (sample.image == plain.image).all()
        assert (sample.masks == (plain.masks[..., ::-1] if flipped else plain.masks)).all()
    images, references = ({getattr(s, name).tobytes() for s in drawn.values()}
                          for name in ("image", "references"))
    assert len(images) == 2
    assert len(references) == len(drawn)
    samples = Folder(tmp_path / "data", 8, 64, augmented=True, seed=1)
    for i, stem in enumerate(stems):
        assert (samples.read(i).references == drawn[1, stem].references).all()
        assert (samples.read(i, epoch=1).references != drawn[1, stem].references).any()
    assert (Folder(tmp_path / "data", 8, 64).read(0).image == plain.image).all()


def colors_of(folder: Path, count: int = 4) -> list[str]:
    """Whether each first reference shows the red box or the blue one."""
    samples = Folder(folder, count, 40)
    references = [samples.read(i).references[0] for i in range(len(samples))]
    return ["red" if r[..., 0].mean() > r[..., 2].mean() else "blue" for r in references]


def test_a_reference_comes_from_another_picture_of_the_same_identity(tmp_path, cache_root):
    """One segment per picture: red, blue, red, blue. The first two are one person."""
    stems = write_folder(tmp_path / "data", 4)
    for i, stem in enumerate(stems):
        edit_json(stem, lambda r, i=i: (r["segments"].pop(i % 2), r["segments"][0].update(
            end=5, identity=("ada", "ada", "max", "")[i])))
    assert colors_of(tmp_path / "data") == ["blue", "red", "red", "blue"]
    stems[1].with_suffix(".npy").write_bytes(b"")  # nobody is left to lend: its own picture
    assert colors_of(tmp_path / "data") == ["red", "red", "blue"]


def test_a_person_s_other_pictures_take_turns(tmp_path, monkeypatch):
    stems = write_folder(tmp_path, 5)
    for stem in stems:
        edit_json(stem, lambda r: [s.update(identity="twins") for s in r["segments"]])
    places = find_places({stem.name: people_of(read_record(tmp_path, stem.name)) for stem in stems})
    assert places == {"twins": [(stem.name, number) for stem in stems for number in (9, 7)]}
    opened = []
    monkeypatch.setattr("data.fastcomposer.open_sample", lambda folder, image_id: (
        opened.append(image_id) or OPEN(folder, image_id)))
    first = read_stem(stems[0], 40, places=places)
    assert (read_stem(stems[0], 40, places=places).references == first.references).all()
    for epoch in range(20):
        read_stem(stems[0], 40, places=places, epoch=epoch)
    assert opened.count(stems[0].name) == 22  # itself, never as a lender
    assert set(opened) == {stem.name for stem in stems}


OPEN = open_sample


# Streams and shards ------------------------------------------------------------------------------


def order(number: int) -> np.ndarray:
    """Index and epoch of the two samples of a batch."""
    return np.array([[number % 6, number // 2], [5, 7]])


def test_a_stream_gives_the_samples_of_every_batch(tmp_path, cache_root):
    stems = write_folder(tmp_path / "data", 6)
    samples = Folder(tmp_path / "data", 6, 40, augmented=True)
    stream = Stream(samples, order)
    for number in (0, 1, 2, 6, 7, 1):  # in order, and after jumps
        expected = [samples.read(int(i), int(e)) for i, e in order(number)]
        assert [checksum(s) for s in stream.batch(number)] == [checksum(s) for s in expected]
    stems[0].with_suffix(".npy").write_bytes(b"")  # it broke since it was checked
    with pytest.raises(DataError, match="000000012.npy: ") as error:
        stream.batch(0)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_readers_outlive_the_signal_that_stops_a_job(number, tmp_path, cache_root):
    """A job's manager signals all its processes; the training one then saves what it has."""
    write_folder(tmp_path / "data", 6)
    others = set(multiprocessing.active_children())  # of earlier tests in this process
    stream = Stream(Folder(tmp_path / "data", 6, 40), order)
    stream.batch(0)
    readers = set(multiprocessing.active_children()) - others
    assert readers
    for reader in readers:
        os.kill(reader.pid, number)
    time.sleep(0.2)
    for batch in range(1, 8):
        assert len(stream.batch(batch)) == 2
    stream.close()
    for reader in readers:
        reader.join(60)
    assert not readers & set(multiprocessing.active_children())


COUNT = SIZE + 5


def make_rows(rows: range) -> dict[str, torch.Tensor]:
    numbers = torch.tensor(rows)
    return {"a": numbers[:, None] * torch.ones(3), "b": numbers}


def build(folder: Path, numbers=(0, 1), made=None) -> None:
    """Make shards; which rows had to be made is noted in `made`."""
    def make(rows):
        if made is not None:
            made.append(rows)
        return map(make_rows, (rows[:3], rows[3:]))

    build_shards(folder, COUNT, make, numbers)


def test_shards_are_made_once_in_parts_and_read_by_row(tmp_path):
    assert shards_of(COUNT) == [range(SIZE), range(SIZE, COUNT)]
    made = []
    build(tmp_path, [1, 3], made)  # this process's share; there are no more than two
    assert made == [range(SIZE, COUNT)]
    build(tmp_path, [0], made)
    build(tmp_path, [0, 1], made)
    assert made == [range(SIZE, COUNT), range(SIZE)]
    indices = [COUNT - 1, 0, SIZE, SIZE - 1, 7]
    rows = Shards(tmp_path, COUNT).rows(np.array(indices))
    assert rows["b"].tolist() == indices
    assert torch.equal(rows["a"], torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, 3))


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def fail(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(tmp_path, COUNT, fail, [0])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ShardError, match="000000.safetensors cannot be read"):
        Shards(tmp_path, COUNT).rows([0])
