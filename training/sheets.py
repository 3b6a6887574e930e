"""Sample sheets of personalized models."""
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from images import RoutingSheet, to_picture, to_uint8
from models.load import write_whole
from moa import record_routing
from pipeline import Pipeline, Subject
from training.stage import SHEET_GUIDANCE, SWAP_PROMPTS, save_grid

Person = tuple[str, np.ndarray]  # noun and reference (R, R, 3) uint8


def swap_sheet(pipeline: Pipeline, people: list[Person], path: Path) -> None:
    """First row the prior alone, then one row per person, with the reference on the left: same seeds."""
    rows = []
    for row in range(1 + len(people)):
        noun, reference = people[max(row - 1, 0)]
        prompts, subjects = [f"a {noun} {what}" for what in SWAP_PROMPTS], None
        if row:
            subjects = [bind(pipeline, prompt, noun, reference) for prompt in prompts]
        pictures = to_uint8(pipeline.generate(prompts, range(len(prompts)), subjects, steps=20,
                                              guidance_scale=SHEET_GUIDANCE, prior_only=row == 0))
        left = Image.fromarray(reference if row else np.full_like(reference, 255))
        rows.append(np.concatenate([np.array(left.resize(pictures.shape[1:3]))[None], pictures]))
    save_grid(rows, path)


def routing_sheet(pipeline: Pipeline, person: Person, path: Path) -> None:
    """What the routers give to the personalized experts in the sheet's first picture of a person, by layer
    and step."""
    noun, reference = person
    prompt, sheet = f"a {noun} {SWAP_PROMPTS[0]}", RoutingSheet(20)
    with record_routing(pipeline.models.unet) as routing:
        def progress(step: int, steps: int, t: int, x0: Tensor) -> None:
            sheet.add(step, t, routing, x0)
            routing.clear()
        picture = pipeline.generate([prompt], [0], [bind(pipeline, prompt, noun, reference)],
                                    steps=20, guidance_scale=SHEET_GUIDANCE, progress=progress)
    image = sheet.draw(Image.fromarray(to_uint8(picture)[0]), [(Image.fromarray(reference), "the subject")])
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))


def bind(pipeline: Pipeline, prompt: str, noun: str, reference: np.ndarray) -> list[Subject]:
    """A subject at the place of its noun."""
    feature, = pipeline.encode_subjects(to_picture(reference[None]) / 2 + 0.5)
    return [Subject(pipeline.models.tokenize.word_positions(prompt, noun)[0], feature)]
