"""Whatever file a person has is read right or refused in one line; PNGs say how they were made."""
import json
import re
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import images
from data.files import to_rgb
from images import NO_MAP, PERSONALIZED, PRIOR, RoutingSheet, labelled, page, read_picture
from subjects import read_masks

H, W = 24, 32
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
ALPHA = np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1))


def read(path) -> np.ndarray:
    """(H, W, 3), 0..255."""
    picture = read_picture(path)
    assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1
    return (picture * 255).round().permute(1, 2, 0).numpy()


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.webp", "PICTURE", "a.jpg"])
def test_reads_rgb_whatever_the_suffix(tmp_path, name):
    kind = {"a.webp": "WEBP", "a.bmp": "BMP", "a.tiff": "TIFF", "a.ppm": "PPM"}.get(name, "PNG")
    Image.fromarray(RGB).save(tmp_path / name, format=kind, lossless=True)
    assert np.array_equal(read(tmp_path / name), RGB)


TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
         5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1),
         7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90}


@pytest.mark.parametrize("orientation", TURNS)
def test_turns_as_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), TURNS[orientation](RGB))


def test_puts_transparency_over_white(tmp_path):
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "rgba.png")
    assert np.abs(read(tmp_path / "rgba.png") - over_white(RGB, ALPHA)).max() <= 1
    Image.fromarray(np.dstack([RGB[..., 0], ALPHA])).save(tmp_path / "la.png")
    assert np.abs(read(tmp_path / "la.png") - over_white(grey(RGB[..., 0]), ALPHA)).max() <= 1


def test_reads_palettes(tmp_path):
    image = Image.fromarray(RGB).quantize(16)
    indices, colours = np.array(image), np.array(image.getpalette()).reshape(-1, 3)
    image.save(tmp_path / "p.png")
    assert np.array_equal(read(tmp_path / "p.png"), colours[indices])
    image.save(tmp_path / "clear.png", transparency=3)
    expected = np.where(indices[..., None] == 3, 255, colours[indices])
    assert np.array_equal(read(tmp_path / "clear.png"), expected)
    image.save(tmp_path / "alpha.png", transparency=bytes(range(0, 256, 16)))
    expected = over_white(colours[indices], indices * 16)
    assert np.abs(read(tmp_path / "alpha.png") - expected).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_reads_16_bit_grey(tmp_path, name):
    values = np.random.default_rng(1).integers(0, 65536, (H, W), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name), grey(values >> 8))


def test_reads_8_bit_values_in_32(tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (H, W), dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.array_equal(read(tmp_path / "a.tiff"), grey(values))


def profile(grey: bool = False) -> bytes:
    """A colour profile whose red and blue are exchanged, or one of linear greys: sRGB's, changed."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {bytes(data[i:i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, blue, curve = table[b"rXYZ"] + 4, table[b"bXYZ"] + 4, table[b"rTRC"]
    if grey:
        data[16:20], data[curve:curve + 4] = b"GRAY", b"kTRC"
        start = int.from_bytes(data[curve + 4:curve + 8], "big") + 8
        data[start:start + 8] = struct.pack(">HHI", 0, 0, 1 << 16)  # an exponent of 1
    else:
        data[red:red + 8], data[blue:blue + 8] = data[blue:blue + 8], data[red:red + 8]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_applied(tmp_path, mode):
    """A damaged one is left out, and one of another kind of colours."""
    picture = Image.new("RGB", (W, H), (200, 20, 20)).convert(mode, palette=Image.Palette.ADAPTIVE)
    picture.save(tmp_path / "a.png", icc_profile=profile())
    assert np.abs(read(tmp_path / "a.png") - (20, 20, 200)).max() <= 3
    for data in (profile()[:200], profile(grey=True)):
        picture.save(tmp_path / "a.png", icc_profile=data)
        assert np.array_equal(read(tmp_path / "a.png")[0, 0], (200, 20, 20))


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_profiles_of_greys_are_applied(tmp_path, mode):
    picture = Image.fromarray(np.full((H, W), 64 << 8, np.uint16)) if mode == "I;16" else Image.new(
        "L", (W, H), 64).convert(mode)
    picture.save(tmp_path / "a.png", icc_profile=profile(grey=True))
    assert np.abs(read(tmp_path / "a.png") - 137).max() <= 1  # 64 / 255, linear, in sRGB


def test_reads_lab(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    picture = Image.new("RGB", (W, H), (200, 60, 20))
    ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB").save(tmp_path / "a.tiff")
    assert np.abs(read(tmp_path / "a.tiff") - (200, 60, 20)).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16"])
def test_labels_are_black_where_they_are_transparent(tmp_path, mode):
    labels = np.zeros((H, W, 4), np.uint8)
    labels[:, :8] = 255, 0, 0, 255
    labels[:, 8:16] = 0, 255, 0, 100  # a soft edge
    labels[:, 16:] = 255, 255, 255, 0
    image = Image.fromarray(labels)
    if mode == "P":
        image = image.convert("RGB").quantize(8)
    elif mode != "RGBA":  # numbers; a PNG names the one that is transparent
        image = Image.fromarray(labels[..., 0].astype(np.uint16 if mode == "I;16" else np.uint8) // 2
                                + labels[..., 2] // 4)
    if mode != "RGBA":
        image.info["transparency"] = image.getpixel((20, 0))
    image.save(tmp_path / "a.png", transparency=image.info.get("transparency"))
    person, *others = read_masks(tmp_path / "a.png", torch.zeros(3, H, W))[::-1]
    assert len(others) == (mode == "P") and person[:, :8].all() and not person[:, 16:].any()


@pytest.mark.parametrize("content, match", [
    (b"\0\0\0\x18ftypheic" + bytes(99), "none of PNG, JPEG, .* Save it as JPEG"),
    (b"", "it is empty: copy or download it again"),
    (b"<!DOCTYPE html>", "a web page: download the picture again"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing: save it as PNG"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer: run `git lfs pull`")])
def test_what_is_no_picture_is_told_a_cure(tmp_path, content, match):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.jpg cannot be used .* {match}"):
        read_picture(tmp_path / "a.jpg")


def test_premultiplied_alpha_is_put_over_white(tmp_path):
    picture = Image.fromarray(np.dstack([RGB[..., 0], ALPHA])).convert("La")
    expected = over_white(grey(RGB[..., 0]), ALPHA)
    assert np.abs(np.array(to_rgb(picture)) - expected).max() <= 2


def test_16_bits_stay_16_where_all_of_them_are_dark(tmp_path):
    Image.fromarray(np.full((H, W), 200, np.uint16)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").max() == 0


def test_labels_of_16_bits_stay_apart(tmp_path):
    """As in Cityscapes, whose people are 24000, 24001 and so on."""
    labels = np.zeros((H, W), np.uint16)
    labels[:, :8], labels[:, 16:] = 24000, 24001
    Image.fromarray(labels).save(tmp_path / "a.png")
    left, right = read_masks(tmp_path / "a.png", torch.zeros(3, H, W))
    assert left[:, :8].all() and right[:, 16:].all() and left.sum() + right.sum() == 24 * H


def test_labels_are_not_read_from_a_jpeg(tmp_path):
    Image.fromarray(np.uint8(255 * (RGB[..., 0] > 99))).save(tmp_path / "a.jpg", quality=95)
    with pytest.raises(ValueError, match="JPEG may change colours, which are labels here: save it as PNG"):
        read_masks(tmp_path / "a.jpg", torch.zeros(3, H, W))


@pytest.mark.parametrize("zipped", [False, True])
def test_megabytes_of_text_in_a_png_are_skipped(tmp_path, zipped):
    info = PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=zipped)
    Image.fromarray(RGB).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(read(tmp_path / "a.png"), RGB)


def test_reads_16_bit_rgb(tmp_path):
    values = np.random.default_rng(2).integers(0, 65536, (H, W, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(W, H, 16, 2, rows))
    assert np.abs(read(tmp_path / "a.png") - values / 257).max() <= 1


def test_reads_cmyk(tmp_path):
    inks = np.random.default_rng(3).integers(0, 256, (H, W, 4), dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tiff")
    paper = 255 - inks.astype(float)
    assert np.abs(read(tmp_path / "a.tiff") - paper[..., :3] * paper[..., 3:] / 255).max() <= 1
    Image.new("CMYK", (W, H), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    assert np.abs(read(tmp_path / "red.jpg") - (255, 0, 0)).max() <= 3


def test_reads_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read(tmp_path / "a.gif"), np.full((H, W, 3), (255, 0, 0)))


def bad_files(folder) -> list:
    """One of each kind of file that is no picture of a person."""
    Image.fromarray(np.zeros((H, W), np.float32)).save(folder / "float.tiff")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("L", (16, 4000)).save(folder / "sliver.png")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(png(60000, 60000, 8, 2, b""))
    (folder / "large.png").write_bytes(png(9500, 9500, 8, 2, b""))  # where Pillow itself only warns
    (folder / "text.png").write_text("<html>not found</html>")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n")
    (folder / "folder.png").mkdir()
    return sorted(folder.iterdir()) + [folder / "missing.png", "/dev/zero", "/dev/null"]


def test_refuses_in_one_line_that_names_the_file(tmp_path):
    files = bad_files(tmp_path)
    assert len(files) == 12
    for file in files:
        with pytest.raises(ValueError, match=re.escape(str(file))) as raised:
            read_picture(file)
        assert "\n" not in str(raised.value) and len(str(raised.value)) > len(str(file)) + 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_or_damaged_files_raise_nothing_but_value_error(tmp_path, kind):
    path, rng = tmp_path / "a", np.random.default_rng(4)
    Image.fromarray(RGB).save(path, format=kind)
    whole = path.read_bytes()
    for length in range(1, len(whole) * 9 // 10, max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_picture(path)
    for _ in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(0, min(len(whole), 300), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        with suppress(ValueError):
            read_picture(path)


def test_nan_is_an_error():
    bad = torch.zeros(2, 3, 8, 8)
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        images.to_images(bad)


SETTINGS = {"prompt": "a woman, « 笑 »\nin Paris: now", "negative_prompt": "rain", "steps": 20,
            "sampler": "unipc", "guidance_scale": 4.0, "seed": 7, "width": 64, "height": 128,
            "weights": "my, model", "clip_skip": 2, "controls": [], "loras": []}


def test_metadata_come_back(tmp_path):
    images.save_png(Image.new("RGB", (8, 8)), tmp_path / "new" / "a.png", SETTINGS)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert json.loads(image.text["moa"]) == SETTINGS
        *lines, last = image.text["parameters"].split("\n")
    assert "\n".join(lines) == SETTINGS["prompt"] + "\nNegative prompt: rain"
    # The expression with which the field's web UIs read the last line.
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert pairs == {"Steps": "20", "Sampler": "UniPC", "CFG scale": "4.0", "Seed": "7", "Size": "64x128",
                     "Model": '"my, model"', "Clip skip": "2"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_picture_that_fails_to_save_leaves_nothing(tmp_path, monkeypatch):
    def break_off(self, path, **rest):
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(Image.Image, "save", break_off)
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        images.save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]


@pytest.mark.parametrize("name", ["new/a.gif", "new/a.PNG"])
def test_animation_holds_every_frame_in_order(tmp_path, name):
    colours = [(250, 20 * k, 10) for k in range(5)]
    frames = [Image.new("RGB", (20, 30), colour) for colour in colours]
    images.save_animation(frames, tmp_path / name, SETTINGS)
    with Image.open(tmp_path / name) as image:
        assert (image.n_frames, image.info["loop"], image.size) == (5, 0, (20, 30))
        kept = image.info["comment"] if name.endswith("gif") else image.text["moa"]
        assert json.loads(kept) == SETTINGS
        for k, colour in enumerate(colours):
            image.seek(k)
            assert image.convert("RGB").getpixel((0, 0)) == colour
            assert image.info["duration"] == (120 if name.endswith("gif") else 125)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name[4:]]


def test_a_sheet_shows_every_picture():
    colours = [(20 * k, 0, 100) for k in range(10)]
    tiles = [(Image.new("RGB", (40, 30), colour), "seed " + "9" * 40) for colour in colours]
    sheet = page("a  very long\nprompt " * 20, labelled(tiles[:2], 2), labelled(tiles[2:], 4))
    found = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert all(found[colour] == 40 * 30 for colour in colours)


def odd_levels(h: int, w: int, levels: int = 4):
    """Latent sizes level by level, rounded up."""
    for _ in range(levels):
        yield h, w
        h, w = -(-h // 2), -(-w // 2)


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (1, 256), (256, 1), (9, 31)])
def test_routing_sheet_draws_maps_on_their_own_grid(size):
    sheet = RoutingSheet(steps=3)
    x0 = torch.zeros(1, 4, *size)
    maps = {}
    for layer, (h, w) in enumerate(odd_levels(*size)):
        weights = torch.zeros(2, h, w, 2)  # of a guided batch the second half counts
        weights[1, :, : -(-w // 2), 1] = 1  # personalized on the left
        weights[..., 0] = 1 - weights[..., 1]
        maps[layer, "self"] = maps[layer, "cross"] = weights.flatten(1, 2)
    sheet.add(1, 999, {}, x0)
    sheet.add(2, 500, maps, x0)
    sheet.add(3, 1, maps, x0)
    for layer, (h, w) in enumerate(odd_levels(*size)):
        tile = np.array(sheet.tile(sheet.columns[1][1][layer, "self"]))
        assert tile.shape == (h, w, 3)
        assert (tile[:, : -(-w // 2)] == PERSONALIZED).all() and (tile[:, -(-w // 2):] == PRIOR).all()
    picture = sheet.draw(Image.new("RGB", (size[1] * 8, size[0] * 8)), [])
    assert {NO_MAP, PERSONALIZED} <= {colour for _, colour in picture.getcolors(1 << 22)}


def test_routing_sheet_says_the_ends_of_its_colours(monkeypatch):
    sheet, said = RoutingSheet(steps=1, names=["woman 1"]), []
    weights = torch.tensor([0.25, 0.25, 0.75, 0.75])
    attention = torch.tensor([0.0, 0.5, 0.125, 0.0])[None, None, :, None]  # (B, H, N, S)
    sheet.add(1, 500, {(0, "self"): torch.stack([1 - weights, weights], dim=1)[None]},
              torch.zeros(1, 4, 2, 2), {0: attention})
    monkeypatch.setattr("images.write", lambda canvas, x, y, text, width: said.append(text))
    sheet.draw(Image.new("RGB", (16, 128)), [])
    text = " ".join(said)
    assert "mean: dark 0.25, yellow 0.75" in text and "to woman 1: dark 0.00, yellow 0.50" in text


def test_routing_sheet_keeps_at_most_its_columns():
    sheet = RoutingSheet(steps=999)
    for step in range(1, 1000):
        sheet.add(step, 999 - step, {}, torch.zeros(1, 4, 2, 2))
    sheet.add(1, 5, {}, torch.zeros(1, 4, 2, 2))  # of a second batch
    assert len(sheet.columns) == RoutingSheet.COLUMNS
    assert sheet.columns[0][0] == 998 and sheet.columns[-1][0] == 0
