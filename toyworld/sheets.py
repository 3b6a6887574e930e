"""What evaluate.py shows: contact sheets of cases, their routing maps, and the routers' heat maps."""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from images import LINE, beside, heading, labelled, paint, stack, write
from models.load import write_whole

TILE = 60  # pixels of one layer's routing map
FULL = 0.5  # of the range of colours: a change of this much is shown as the strongest
COLUMNS = (("subjects", "who is to be in the picture"), ("prior alone", "the base model's picture"),
           ("with them", "the same prompt and seed with the subjects"),
           ("others", "other subjects of the same words"), ("with the others", "once more with these"),
           ("change", "from 'with them' to 'with the others', dark: none, yellow: half of the range or more; "
                      "white: the people that the classifier sees in either"),
           ("routing", "mean weight of the personalized expert in 'with them', its own lowest dark, its "
                       "highest yellow; white: the people that the classifier sees"))
LAYERS = ("Weight of the personalized expert with the subjects, mean over the timesteps at which MoA draws: "
          "dark 0, yellow 1. Upper row: self-attention, lower row: cross-attention, l: transformer block in "
          "forward order. Left: the picture, and the mean of all maps on a scale of its own; white: the "
          "people that the classifier sees.")


def case_sheet(entries: list[tuple]) -> Image.Image:
    """Cases in two columns. entries: (case, references (people, S, S, 3) of its first and of its second
    subjects, its description by `evaluate.summary`)."""
    blocks = [stack([text_lines(description, 7 * 136), labelled(tiles(*entry), len(COLUMNS))])
              for *entry, description in entries]
    columns = [stack(blocks[k::2]) for k in range(min(2, len(blocks)))]
    body = beside(columns)
    return stack([heading(". ".join(f"{name}: {what}" for name, what in COLUMNS) + ".", body.width), body])


def tiles(case, references: np.ndarray, others: np.ndarray) -> list[tuple[Image.Image, str]]:
    """The pictures of one case with their labels."""
    prior, first, second = map(Image.fromarray, case.pictures)
    people = case.readings[1].people | case.readings[2].people
    change = np.abs(case.pictures[1].astype(int) - case.pictures[2]).mean(-1) / 255 / FULL
    images = [portraits(references), prior, first, portraits(others), second,
              outlined(paint(torch.from_numpy(change)), people), mean_map(case)]
    return [(image, name) for image, (name, _) in zip(images, COLUMNS, strict=True)]


def portraits(references: np.ndarray) -> Image.Image:
    """One subject, or the middle halves of two beside each other."""
    width = references.shape[2]
    left = width // 2 - width // len(references) // 2
    return Image.fromarray(np.concatenate(references[:, :, left:left + width // len(references)], axis=1))


def mean_map(case) -> Image.Image:
    """The mean of all routing maps, as large as the picture, on its own scale: its values lie close."""
    mean = torch.from_numpy(case.routing.mean((0, 1, 2)))
    mean = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-6)
    size = case.pictures.shape[2:0:-1]
    return outlined(paint(mean).resize(size, Image.Resampling.NEAREST), case.readings[1].people)


def outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A picture with the edge of a mask (S, S) bool in white."""
    mask = Image.fromarray(mask).convert("L")
    edge = ImageChops.difference(mask, mask.filter(ImageFilter.MinFilter(3)))
    return Image.composite(Image.new("RGB", image.size, "white"), image, edge)


def text_lines(description: dict, width: int) -> Image.Image:
    """A case's number, prompt, scores and what was read wrong."""
    local = "-" if description["locality"] is None else f"{description['locality']:.2f}"
    wrong = [", ".join(names).replace("_", " ") or "nothing" for names in description["wrong"]]
    lines = [f"case {description['case']}: {description['prompt']}",
             f"identity {description['identity']:.2f},  background change {local},  "
             f"router IoU {description['router_iou']:.2f}",
             "read wrong: " + (wrong[0] if len(wrong) == 1 else f"left {wrong[0]};  right {wrong[1]}")]
    image = Image.new("RGB", (width, LINE * len(lines) + 8), "white")
    for i, line in enumerate(lines):
        write(ImageDraw.Draw(image), 8, 8 + LINE * i, line, width - 16)
    return image


def routing_sheet(entries: list[tuple]) -> Image.Image:
    """One row per case: its picture, its mean routing map, and each layer's mean over the timesteps."""
    blocks = []
    for case, _, _, description in entries:
        row = beside([labelled([(Image.fromarray(case.pictures[1]), "with them"),
                                (mean_map(case), "mean")], 2), layer_maps(case)])
        blocks.append(stack([text_lines(description, row.width), row]))
    return stack([heading(LAYERS, blocks[0].width), *blocks])


def layer_maps(case) -> Image.Image:
    """Two rows of maps, self- and cross-attention, one column per layer."""
    maps = torch.from_numpy(case.routing.mean(2))  # (2, L, h, w)
    rows, layers = maps.shape[:2]
    image = Image.new("RGB", (44 + (TILE + 2) * layers + 8, LINE + (TILE + 2) * rows + 8), "white")
    canvas = ImageDraw.Draw(image)
    for k, kind in enumerate(("self", "cross")):
        write(canvas, 4, LINE + (TILE + 2) * k + TILE // 2 - 8, kind, 40)
        for layer in range(layers):
            tile = paint(maps[k, layer]).resize((TILE, TILE), Image.Resampling.NEAREST)
            image.paste(tile, (44 + (TILE + 2) * layer, LINE + (TILE + 2) * k))
    for layer in range(layers):
        write(canvas, 44 + (TILE + 2) * layer + 10, 0, f"l = {layer}", TILE)
    return image


def plot_router(router: dict, path: Path) -> None:
    """Heat maps of the personalized expert's weight, layer x timestep, on people and in the background.

    Needs matplotlib and somebody to see; otherwise says so and leaves no older plot behind.
    """
    cases = router["grid"]["people"]["n"]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        Figure = None
    if Figure is None or not cases:
        path.unlink(missing_ok=True)
        why = "the classifier sees no people in any picture" if Figure else (
            "matplotlib is not installed, give: pip install matplotlib")
        print(f"{path.name} was not drawn: {why}", file=sys.stderr)
        return
    timesteps = router["timesteps"]
    every = -(-len(timesteps) // 20)  # labels that find room
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, kind in zip(axes, router["kinds"], strict=True):
        for axis, where in zip(row, ("people", "background"), strict=True):
            values = np.array(router["grid"][where]["mean"])[router["kinds"].index(kind)]
            image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            axis.set_title(f"{kind}-attention, {'on people' if where == 'people' else 'in the background'}: "
                           f"mean {values.mean():.2f}")
            axis.set_xticks(range(0, len(timesteps), every), timesteps[::every], rotation=90)
            axis.set_yticks(router["layers"], router["layers"])
    for axis in axes[:, 0]:
        axis.set_ylabel("layer l, transformer block in forward order")
    for axis in axes[-1]:
        axis.set_xlabel("timestep t, in the order of drawing")
    figure.colorbar(image, ax=axes, label="0: all prior, 1: all personalized")
    figure.suptitle(f"Weight that the routers give to the personalized expert, mean of {cases} cases")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
