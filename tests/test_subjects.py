"""People cut out of photos by a mask beside them."""
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data.fastcomposer import cut_reference
from subjects import bind_subjects, on_noise, read_photo, read_photos


@pytest.fixture
def pair(monkeypatch, tmp_path) -> np.ndarray:
    """couple.jpg.png, two people with a mask beside it; returns the mask."""
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((40, 60), np.uint8)
    mask[5:30, 4:20], mask[8:38, 30:55] = 1, 2
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save("couple.png")
    Image.fromarray(mask).save("couple_mask.png")
    return mask


def test_a_person_is_cut_out_as_in_training(pair):
    """By the mask beside the photo: the largest, and says so, or the one of #N."""
    picture = np.array(Image.open("couple.png"))
    for name, number in (("couple.png#1", 1), ("couple.png#2", 2), ("couple.png", 2)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            photo = on_noise(read_photo(name))
        assert [str(each.message)[:41] for each in said] == (
            [] if "#" in name else ["couple.png shows 2 people, the largest is"])
        person, (x1, y1, x2, y2) = pair == number, ((4, 5, 20, 30), (30, 8, 55, 38))[number - 1]
        side = y2 - y1
        expected = cut_reference(Image.fromarray(picture), person, [x1, y1, x2, y2], side,
                                 np.random.default_rng(0), augmented=False)
        alone = Image.fromarray((photo.permute(1, 2, 0) * 255).round().byte().numpy())
        assert np.array_equal(ImageOps.pad(alone, (side, side)), expected)


def test_subject_mask_takes_the_place_of_the_file_beside_it(pair):
    Image.fromarray(np.uint8(pair == 1) * 255).save("left.png")
    subject = bind_subjects("a man", ["couple.png"])
    (alone,), = read_photos(subject, [Path("left.png")])
    assert torch.equal(alone, read_photo("couple.png#1"))
    with pytest.raises(ValueError, match="the people on left.png are 1$"):
        read_photo("couple.png#2", Path("left.png"))


def test_people_are_named_by_the_numbers_of_their_pixels(pair):
    Image.fromarray(np.array((0, 127, 255), np.uint8)[pair]).save("couple_mask.png")
    with pytest.warns(UserWarning, match="; couple.png#127, couple.png#255 say who"):
        read_photo("couple.png")


@pytest.mark.parametrize(("name", "said"), [
    ("couple.png#3", "the people on couple_mask.png are 1, 2"), ("ada.png#1", "there is no ada_mask.png"),
    ("small.png", "the mask has 3 x 3 pixels, the picture"), ("empty.png", "there is nobody on the mask"),
    ("couple.png#0", "the people on couple_mask.png are 1, 2"), ("white.png", "person 1 covers the whole"),
    ("lossy.png", "lossy_MASK.JPG: a mask is a PNG, this is JPEG: save it as PNG")])
def test_masks_that_do_not_fit(pair, name, said):
    for file in ("ada", "small", "empty", "white", "lossy"):
        Image.new("RGB", (20, 20)).save(f"{file}.png")
    Image.new("L", (3, 3), 1).save("small_mask.png")
    Image.new("L", (20, 20)).save("empty_mask.png")
    for file in ("white_mask.png", "lossy_MASK.JPG"):
        Image.new("L", (20, 20), 255).save(file)
    with pytest.raises(ValueError, match=said):
        read_photo(name)
