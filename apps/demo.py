"""A page to play with: design people, put them into pictures, swap and morph them, watch the routers.

    pip install -r requirements-demo.txt
    python -m apps.demo
    python -m apps.demo --weights weights/sd15 --moa runs/sd15/moa.safetensors --device cuda

Open the address that is printed in a browser. Only this machine sees the page unless --host 0.0.0.0 is
given; visitors take turns. --seed, --steps and --strength are what the page starts with, the other
flags hold for all pictures. What visitors upload is kept in a temporary folder until Ctrl-C or SIGTERM.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from numpy.random import default_rng
from PIL import Image
from torch import Tensor

import toyworld
from apps import generate_rows
from data.masks import mask_of, read_mask
from images import RoutingSheet, read_picture, save_png, to_images
from pipeline import Subject, interpolate
from sample import (BATCH_PIXELS, Parser, add_flags, check, execute, generate_images, load_pipeline,
                    settings_of)
from subjects import PEOPLE, BoundSubject, bind_rows, find_words, read_photos

ROOT = Path(__file__).resolve().parents[1]

PREVIEWS = 5  # pictures shown while one is sampled
FRAMES = 5  # of a morph
OTHERS = {"woman": ("zoe", "mia", "ada"), "man": ("leo", "max", "tom")}  # examples/, for swapping
EXAMPLES = ("a woman standing on the beach", "a woman and a man shaking hands in Paris",
            "a woman holding a bouquet of roses in Paris", "a man reading a book on a mountain",
            "a woman wearing a space suit on Mars", "a girl and a boy standing in the snow")
# Noun, skin, hair colour and style, glasses, beard, shirt colour and pattern, bottom and its colour.
FIRST = ("woman", "fair", "red", "short", "yes", "no", "blue", "plain", "trousers", "black")
SECOND = ("man", "brown", "black", "curly", "no", "no", "orange", "stripes", "trousers", "gray")
KINDS = {"self-attention": "self", "cross-attention": "cross", "mean of all": None}
INTRO = """# Mixture-of-Attention
Design people or upload photos, and compare the base model's picture with the same one with them in it."""
MASK = """A greyscale picture as large as the photo: 1 in the pixels of one person, 2 in the next one's, 0
elsewhere. Then click on a person in the photo; without a click the largest is taken."""
FIRST_DRAW = "Draw a picture first."
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto !important}
.picture {padding-top: 28px !important}
.picture .image-frame, .picture img {width: 100% !important; height: auto !important}
.picture img {object-fit: contain !important}
.portrait img {aspect-ratio: 1}
.picture .empty {aspect-ratio: 1; min-height: 0 !important; height: auto !important}
.strip .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important}
.strip .grid-wrap {height: auto !important; min-height: 0 !important; max-height: none !important}
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)")
    add("--port", type=int, default=7860, help="default 7860; 0: the first free one from there on")
    add_flags(parser, seed=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check(args)
    if (args.width or 0) * (args.height or 0) > BATCH_PIXELS // 2:
        raise ValueError(f"--width and --height: the page draws two pictures at a time, of at most "
                         f"{BATCH_PIXELS // 2} pixels each")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folder goes, too
    with tempfile.TemporaryDirectory(prefix="moa-demo-") as folder:
        # Read when gradio is imported: it reports to nobody, and visitors can ask for what lies in its
        # folder. Its own fonts would come from Google.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
                       "GRADIO_TEMP_DIR": f"{folder}/cache"}
        print(f"loading {os.path.relpath(args.weights)} ...", flush=True)
        studio = Studio(args, Path(folder))
        try:
            import gradio
        except ImportError as error:
            raise ValueError(f"the page needs gradio ({error}): pip install -r requirements-demo.txt"
                             ) from error
        page = build(gradio, studio)
        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            page.queue(max_size=20).launch(
                server_name=args.host, server_port=args.port or None, theme=theme, css=CSS, quiet=True,
                prevent_thread_lock=True, ssr_mode=False, footer_links=[], max_file_size="20mb",
                state_session_capacity=100)
        except OSError as error:
            raise ValueError(f"{args.host} port {args.port} cannot be listened on, it may be in use: give "
                             "another --port N, 0 for a free one") from error
        print(f"open {page.local_url} in a browser; Ctrl-C ends", flush=True)
        try:
            Event().wait()
        finally:
            studio.end()


class Studio:
    """The model and what the page asks of it. One thread draws for all visitors, one after the other:
    forced and recorded routing are states of the model that they share."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.pipeline = load_pipeline(args)
        self.args, self.folder, self.numbers = args, folder, count()
        self.small_world = self.pipeline.models.config.get("world") == "toyworld"
        self.pool, self.ended = ThreadPoolExecutor(1), Event()

    def new_file(self, name: str) -> Path:
        """A file of about this name in a folder of its own."""
        folder = self.folder / f"{next(self.numbers)}"
        folder.mkdir()
        return folder / f"{re.sub('[^a-zA-Z0-9]+', '-', name)[:100]}.png"

    def portrait(self, *looks: str) -> str:
        """A picture file of the person with these looks, whose name tells them."""
        person = toyworld.Identity(*looks, width=1.0, height=1.0)
        file = self.new_file(toyworld.identity_key(person))
        Image.fromarray(toyworld.render_reference(person, 0)).save(file)
        return str(file)

    def photo(self, upload: str) -> str:
        """Any picture file as a PNG. Raises ValueError."""
        image, = to_images(read_picture(upload)[None] * 2 - 1)
        file = self.new_file(Path(upload).stem)
        image.save(file)
        return str(file)

    def mask(self, person: str | None, upload: str) -> str:
        """A copy of a person's photo, with a mask of the same size beside it. Raises ValueError."""
        if not person:
            raise ValueError("upload the photo before its mask")
        photo, labels = Path(person.partition("#")[0]), read_picture(upload, labels=True)
        width, height = Image.open(photo).size
        if labels.shape[1:] != (height, width) or not labels.any() or (labels != labels[0]).any():
            raise ValueError(f"{Path(upload).name} must be a greyscale picture of {width} x {height} pixels, "
                             "1, 2, ... in the pixels of each person and 0 elsewhere")
        file = self.new_file(photo.stem)
        shutil.copy(photo, file)
        to_images(labels[None] * 2 - 1)[0].convert("L").save(mask_of(file))
        return str(file)

    def settings(self, prompt: str, seed: float, steps: float, strength: float) -> argparse.Namespace:
        """The flags with what the page says. Raises ValueError that names the field."""
        named, most = len(find_words(prompt, PEOPLE)), self.pipeline.max_people
        if not named:
            raise ValueError(f"Prompt: nobody in it to stand for, write one of {', '.join(PEOPLE[:6])}, ...")
        if most is not None and named > most:
            raise ValueError(f"Prompt: {named} people, these weights were trained on at most {most} in a "
                             "picture, and would mix them up")
        args = argparse.Namespace(**{**vars(self.args), "prompt": prompt, "seed": int(seed or 0),
                                     "steps": int(steps), "strength": float(strength)})
        try:
            check(args)
        except ValueError as error:
            flag, said = str(error).split(maxsplit=1)
            raise ValueError(f"{flag.strip('-').capitalize()}: {said}") from error
        return args

    def people(self, args: argparse.Namespace, rows: list[list[str]]
               ) -> tuple[list[list[BoundSubject]], list[list[Subject]]]:
        """Whom each row's photos stand for in the prompt, and the people themselves. Raises ValueError."""
        bound = bind_rows(args.prompt, ["+".join(row) for row in rows])
        pipeline = self.pipeline
        return bound, [pipeline.make_subjects(args.prompt, row, pipeline.encode_photos(row, read_photos(row)))
                       for row in bound]

    def draw(self, show: Callable, args: argparse.Namespace, photos: list[str]) -> dict:
        """The prior's picture, the one with the people, and what the routers did meanwhile."""
        (subjects,), (people,) = self.people(args, [photos])
        sheet = RoutingSheet(args.steps)
        with sheet.recording(self.pipeline.models.unet, first=1) as record:
            def watch(step: int, steps: int, t: int, x0: Tensor) -> None:
                record(step, steps, t, x0)
                seen = step < steps and step % max(1, round(steps / PREVIEWS)) == 0
                pictures = map(args.checker, to_images(self.pipeline.decode(x0))) if seen else ()
                show({"done": step / steps, **dict(zip(("prior", "mixed"), pictures, strict=False))})
            prior, mixed = generate_images(args, self.pipeline, [args.prompt] * 2, [args.seed] * 2,
                                           [None, people], watch)
        file = self.new_file(f"seed-{args.seed}")
        save_png(mixed, file, settings_of(args, subjects))
        return {"prior": prior, "mixed": mixed,
                "drawn": {"picture": mixed, "sheet": sheet, "file": str(file)}}

    def swap(self, show: Callable, args: argparse.Namespace, photos: list[str]) -> dict:
        """One after the other in the place of the first person, under their names."""
        (first, *_), = bind_rows(args.prompt, photos[:1])
        others = OTHERS.get(first.word, sum(OTHERS.values(), ())) if self.small_world else ()
        in_turn = [*photos, *(str(ROOT / "examples" / f"{name}.png") for name in others)]
        _, people = self.people(args, [[one, *photos[1:]] for one in in_turn])
        rows = generate_rows(args, self.pipeline, [None, *people], [args.seed], counting(show))
        names = ["base", "first", *["second"] * len(photos[1:]), *others]
        return {"strip": [(row[0], name) for row, name in zip(rows, names, strict=True)]}

    def morph(self, show: Callable, args: argparse.Namespace, photos: list[str]) -> dict:
        """From the first person to the one of the last photo, in the first one's place. Who else is in the
        picture stays."""
        *drawn, last = photos
        _, ((first, *others), (other, *_)) = self.people(args, [drawn, [last, *drawn[1:]]])
        people = [[replace(first, feature=feature), *others]
                  for feature in interpolate(first.feature, other.feature, FRAMES)]
        return {"frames": list(generate_images(args, self.pipeline, [args.prompt] * FRAMES,
                                               [args.seed] * FRAMES, people, counting(show)))}

    def live(self, work: Callable[..., dict], photos: list[str], *values) -> Iterator[dict]:
        """Yield what `work(show, args, photos)` shows and, at last, returns. It works in the drawing thread
        until its next step after the visitor has left. Raises what it raises."""
        found, left = SimpleQueue(), Event()

        def show(value: dict) -> None:
            if left.is_set() or self.ended.is_set():
                raise InterruptedError
            found.put(value)

        def job() -> None:
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always", UserWarning)
                    show({"done": 0.0})
                    result = work(show, self.settings(*values), photos)
                found.put({**result, "warnings": {self.clean(each.message) for each in said}})
            except Exception as error:
                found.put(error)

        self.pool.submit(job)
        try:
            value = {}
            while "warnings" not in value:
                value = found.get()
                if isinstance(value, Exception):
                    raise value
                yield value
        finally:
            left.set()

    def end(self) -> None:
        """Wait until nothing is drawn any more; who waits for a picture is told that there is none."""
        self.ended.set()
        self.pool.shutdown()

    def clean(self, message: object) -> str:
        """In one line, without the folders that files lie in."""
        return " ".join(re.sub(rf"{re.escape(str(self.folder))}/(cache/)?\w+/", "", str(message)).split())


def person_at(person: str, x: int, y: int) -> str:
    """PHOTO or PHOTO#N, the person of number N at a pixel of its mask; without #N the largest of all."""
    photo = person.partition("#")[0]
    mask = mask_of(Path(photo))
    number = int(read_mask(mask, None)[y, x]) if mask.exists() else 0
    return f"{photo}#{number}" if number else photo


def counting(show: Callable) -> Callable:
    """For `generate_images`: says how far it is."""
    return lambda step, steps, t, x0: show({"done": step / steps})


def heat_map(drawn: dict | None, kind: str, layer: int, step: int) -> tuple:
    """The picture below the weight of the personalized expert, and what there is to see."""
    if not drawn:
        return None, FIRST_DRAW
    sheet, picture = drawn["sheet"], drawn["picture"]
    t, maps = sheet.columns[min(step, len(sheet.columns)) - 1]
    weights = maps.get((layer, KINDS[kind]))
    tile = sheet.tile(weights)
    if KINDS[kind] is None:
        tile, colours = sheet.mean(picture.size)
        said = f"Weight of the personalized expert, mean over all layers and steps: {colours}."
    elif weights is None:
        said = f"t = {t}: the prior draws this step alone."
    else:
        said = (f"Block l = {layer}, t = {t}: the personalized expert gets {weights.mean():.2f} on average, "
                f"{weights.min():.2f} to {weights.max():.2f}. Dark is 0, yellow 1.")
    return Image.blend(picture, tile.resize(picture.size, Image.Resampling.NEAREST), 0.6), said


# --- the page ---


def build(gr, studio: Studio):
    """All that a visitor sees, and what happens when they touch it."""
    args, layers = studio.args, len(list(studio.pipeline.models.unet.transformer_blocks()))
    about, off = (ROOT / "README.md").read_text("utf-8").split("\n\n")[1], {"interactive": False}
    with gr.Blocks(title="Mixture-of-Attention", analytics_enabled=False, delete_cache=(3600, 7200)) as page:
        gr.Markdown(INTRO)
        with gr.Accordion("What is this?", open=False):
            gr.Markdown(f"{about}\n\nThe rest is in `README.md`, beside the code of this page.")
        # On a phone the columns stand below each other, row by row.
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=2, elem_id="prompt")
                with gr.Row():
                    first, first_chance = person(gr, studio, "First person", FIRST)
                    second, second_chance = person(gr, studio, "Second person", SECOND)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", scale=2, min_width=140, elem_id="draw")
                    again = gr.Button("New seed", min_width=140, elem_id="again")
            with gr.Column(scale=3, min_width=320):
                status = gr.Markdown("Both pictures show here while they grow.", elem_id="status")
                with gr.Row():
                    prior = picture(gr, "Base model", "prior")
                    mixed = picture(gr, "With your people", "mixed")
                download = gr.DownloadButton("Download, settings inside", size="sm", **off)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                examples = gr.Dataset(components=[gr.Textbox(visible=False)], samples=[[e] for e in EXAMPLES],
                                      label="For example")
                if studio.small_world:
                    design(gr, studio, "Design the first person", FIRST, first, first_chance)
                    design(gr, studio, "Design the second person", SECOND, second, second_chance)
                both = gr.Checkbox(True, label="Second person, too, if the prompt names two")
                seed = gr.Number(args.seed, label="Seed", precision=0, elem_id="seed")
                steps = gr.Slider(1, max(50, args.steps), args.steps, step=1, label="Steps", buttons=[])
                strength = gr.Slider(0, max(2, args.strength), args.strength, step=0.05, buttons=[],
                                     label="Strength of the people (1: as trained)")
            with gr.Column(scale=3, min_width=320):
                drawn, frames = gr.State(), gr.State()
                with gr.Tab("Routers"), gr.Row():
                    with gr.Column(min_width=280):
                        kind = gr.Radio(list(KINDS), value="self-attention", label="Routers of", **off)
                        layer = gr.Slider(0, layers - 1, min(10, layers - 1), step=1, buttons=[],
                                          label="Transformer block l", elem_id="layer", **off)
                        step = gr.Slider(1, max(2, args.steps), max(1, args.steps * 3 // 4), step=1,
                                         buttons=[], label="Step, from noise to picture", **off)
                        said = gr.Markdown(FIRST_DRAW, elem_id="said")
                    heat = picture(gr, "Weight of the personalized expert", "heat")
                with gr.Tab("Swap"):
                    swap = gr.Button("Draw the same with others in the first person's place", elem_id="swap")
                    strip = gr.Gallery(columns=3, object_fit="contain", show_label=False, format="png",
                                       buttons=[], elem_id="strip", elem_classes="strip")
                with gr.Tab("Morph"), gr.Row():
                    with gr.Column(min_width=280):
                        morph = gr.Button("Draw from the first to the second person", elem_id="morph")
                        amount = gr.Slider(0, 1, 0.5, step=1 / (FRAMES - 1), buttons=[],
                                           label="How much of the second", **off)
                    frame = picture(gr, "Between the two", "frame")

        def show(work: Callable, outputs: dict, first: str | None, second: str | None, both: bool,
                 prompt: str, *values) -> Iterator[dict]:
            """What `work` draws, in the outputs of these names, in place of what was there, with a line that
            says how far it is or what is wrong."""
            photos = [first, second] if both and len(find_words(prompt, PEOPLE)) > 1 else [first]
            if work == studio.morph:
                photos += [second]
            cleared = dict.fromkeys(outputs.values())
            yield {**cleared, status: "Waiting."}
            try:
                if None in photos:
                    raise ValueError(f"{'Second' if first else 'First'} person: upload a photo.")
                for value in studio.live(work, photos, prompt, *values):
                    warned = "".join(f"\n\n**Warning:** {each}" for each in sorted(value.get("warnings", ())))
                    yield {status: f"Drawing: {value['done']:.0%}" if "done" in value else f"Done.{warned}",
                           **{outputs[name]: value[name] for name in outputs if name in value}}
            except Exception as error:
                yield {**cleared, status: f"**{studio.clean(error)}**"}
                if not isinstance(error, (ValueError, OSError)):  # not the visitor's to mend
                    raise

        def fit(drawn: dict | None, kind: str, step: int) -> list:
            """What can be asked of the picture."""
            columns = len(drawn["sheet"].columns) if drawn else args.steps
            maps = bool(drawn) and KINDS[kind] is not None
            return [gr.update(value=drawn and drawn["file"], interactive=bool(drawn)),
                    gr.update(interactive=bool(drawn)), gr.update(interactive=maps),
                    gr.update(interactive=maps, maximum=max(2, columns), value=min(step, columns))]

        def pick(frames: list | None, amount: float) -> tuple:
            frame = frames[round(amount * (FRAMES - 1))] if frames else None
            return frame, gr.update(interactive=bool(frames))

        def settle(prompt: str) -> list:
            return [gr.update(interactive=len(find_words(prompt, PEOPLE)) > fewer) for fewer in (1, 0)]

        busy = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal",
                "show_progress_on": status}
        quick = {"show_progress": "hidden", "trigger_mode": "always_last"}
        seeded = again.click(lambda: random.randrange(10_000), None, seed, **quick)
        draw = {"prior": prior, "mixed": mixed, "drawn": drawn}
        for asked, work, outputs in (
                (start.click, studio.draw, draw), (prompt.submit, studio.draw, draw),
                (seeded.then, studio.draw, draw), (swap.click, studio.swap, {"strip": strip}),
                (morph.click, studio.morph, {"frames": frames})):
            asked(partial(show, work, outputs), [first, second, both, prompt, seed, steps, strength],
                  [status, *outputs.values()], **busy)
        fitted = gr.on([drawn.change, kind.change], fit, [drawn, kind, step], [download, kind, layer, step],
                       **quick)
        # The map comes after `fit`: a step above its new maximum would be refused.
        for asked in (fitted.then, partial(gr.on, [layer.change, step.change])):
            asked(heat_map, [drawn, kind, layer, step], [heat, said], **quick)
        gr.on([frames.change, amount.change], pick, [frames, amount], [frame, amount], **quick)
        gr.on([page.load, prompt.change], settle, prompt, [both, strength], **quick)
        # In the browser, so that no click on Draw can be faster.
        examples.click(None, examples, prompt, js=f"(k) => {json.dumps(EXAMPLES)}[k]")
    return page


def picture(gr, label: str, name: str):
    """Where a picture will be."""
    return gr.Image(label=label, interactive=False, format="png", buttons=["fullscreen"], min_width=140,
                    elem_id=name, elem_classes="picture")


def person(gr, studio: Studio, title: str, looks: tuple[str, ...]) -> tuple:
    """Somebody to be uploaded or, in the small world, designed: the state that holds their picture file, with
    #N for one of several people in it, and the button for somebody else."""
    portrait = studio.portrait(*looks) if studio.small_world else None
    with gr.Column(min_width=140):
        file = gr.State(portrait)
        image = gr.Image(portrait, label=title, interactive=False, format="png", buttons=[], min_width=140,
                         elem_classes=["picture", "portrait"])
        upload = gr.UploadButton("Upload a photo", size="sm", file_types=["image"])
        chance = gr.Button("Somebody else", size="sm", visible=studio.small_world)
        with gr.Accordion("Several in it?", open=False):
            gr.Markdown(MASK)
            mask = gr.UploadButton("Mask: who is where", size="sm", file_types=["image"])

    def on_upload(work: Callable[..., str], *values: str | None) -> str:
        try:
            return work(*values)
        except ValueError as error:
            raise gr.Error(f"{title}: {studio.clean(error)}", print_exception=False) from error

    def on_click(person: str, click: gr.SelectData) -> str:
        return person_at(person, *click.index)

    def on_change(person: str) -> dict:
        photo, _, number = person.partition("#")
        largest = ": the largest" if mask_of(Path(photo)).exists() else ""
        return gr.update(value=photo, label=f"{title}: number {number}" if number else title + largest)

    upload.upload(partial(on_upload, studio.photo), upload, file, show_progress="hidden")
    mask.upload(partial(on_upload, studio.mask), [file, mask], file, show_progress="hidden")
    image.select(on_click, file, file, show_progress="hidden")
    file.change(on_change, file, image, show_progress="hidden")
    return file, chance


def design(gr, studio: Studio, title: str, looks: tuple[str, ...], file, chance) -> None:
    """Menus for the looks of a person of the small world, for the components of `person`."""
    attributes = {"noun": toyworld.NOUNS, **toyworld.ATTRIBUTES}
    with gr.Accordion(title, open=False), gr.Row():
        menus = [gr.Dropdown(list(values), value=look, filterable=False, min_width=110,
                             label={"noun": "who"}.get(name, name.replace("_", " ")))
                 for (name, values), look in zip(attributes.items(), looks, strict=True)]

    def on_chance(noun: str) -> list[str]:
        someone = toyworld.sample_identity(default_rng(), "test", noun)
        looks = [getattr(someone, name) for name in attributes]
        return [studio.portrait(*looks), *looks]

    gr.on([menu.input for menu in menus], studio.portrait, menus, file, show_progress="hidden",
          trigger_mode="always_last")
    chance.click(on_chance, menus[0], [file, *menus], show_progress="hidden")


if __name__ == "__main__":
    main()
