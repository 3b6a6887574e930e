"""Swap a person of a real picture (MoA paper, Section 5.3, Fig. 13).

    python -m apps.edit --image examples/couple.png --mask examples/couple_mask.png \\
        --source-prompt "a person and a person" --keep 1 --subject 2=examples/zoe.png
    python -m apps.edit --image me.jpg --source-prompt "a person" --subject other.jpg

The prior takes the picture back to noise (DDIM inversion, with the source prompt, without guidance); from
this noise MoA draws, with DDIM and the same steps, the new person and those to keep, cut from the picture.
The strip shows the picture, what the prior alone makes of its noise, and the edit. The picture is scaled
to cover --width x --height and cut around its middle. There is no seed: the noise is the picture's own.
"""
import argparse
from pathlib import Path

from tqdm import tqdm

from apps import plan_sheet, save_sheet, strip
from images import fit, psnr, read_picture, to_images
from samplers import invert_ddim, sample_ddim
from sample import (Parser, add_flags, check, execute, keep_inputs, load_pipeline, sampling_options,
                    settings_of)
from subjects import SUBJECT, bind_subjects, cut_people, read_photos

ITERATIONS = {"fixed-point": 3, "negative-prompt": 0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--image", type=Path, required=True, metavar="FILE", help="the picture to be edited")
    add("--source-prompt", required=True, metavar="TEXT", help="what it shows")
    add("--subject", action="append", required=True, metavar=SUBJECT,
        help="photo of somebody new, bound to the prompt as sample.py does, or to its N-th person by N=FILE")
    add("--keep", type=int, nargs="+", action="extend", default=[], metavar="N",
        help="these people of the prompt stay; --mask or --box says where they are")
    where = parser.add_mutually_exclusive_group().add_argument
    where("--mask", type=Path, metavar="FILE", help="of the picture's size: a colour per person on black")
    where("--box", action="append", default=[], metavar="X0,Y0,X1,Y1",
          help="a person's pixels in the picture; repeatable. People count from the left; of as many as "
               "are kept, all stay")
    add("--inversion", choices=list(ITERATIONS), default="fixed-point",
        help="fixed-point: each step is iterated (default); negative-prompt: it is not, and the source "
             "prompt is --negative-prompt (arXiv 2305.16807)")
    add("--guidance-scale", type=float, default=1.0, metavar="SCALE",
        help="1 keeps most of the picture (default); a stronger swap: --inversion negative-prompt and 2 to 4")
    add("--output", type=Path, default=Path("edit.png"), metavar="PATH",
        help="a .png for the strip, or a folder for the strip and its pictures (default edit.png)")
    add_flags(parser, without=("--seed", "--sampler", "--guidance-scale"))
    parser.set_defaults(seed=0, sampler="ddim")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Find the people, invert the picture, draw it again without and with the new ones, save."""
    check(args)
    if args.inversion == "negative-prompt":
        if args.negative_prompt:
            raise ValueError("--inversion negative-prompt takes the source prompt for --negative-prompt: "
                             "leave one of them out")
        args.negative_prompt = args.source_prompt
    kept = [f"{number}={args.image}" for number in args.keep]
    subjects = bind_subjects(args.source_prompt, [*kept, *args.subject])
    sheet, files = plan_sheet(args.output, 3)
    keep_inputs(args, subjects, [sheet, *files], [args.image, args.mask or args.image])

    picture = read_picture(args.image)
    photos = cut_people(picture, args.keep, args.mask, args.box) + read_photos(subjects[len(kept):])
    pipeline = load_pipeline(args)
    people = pipeline.make_subjects(args.source_prompt, subjects, pipeline.encode_photos(subjects, photos))
    source, null = pipeline.encode_text([args.source_prompt, args.negative_prompt], args.clip_skip).split(1)
    picture = fit(picture, (args.height, args.width))
    latents, prior = pipeline.encode(picture), pipeline.denoiser(source, [[]], prior_only=True)
    with tqdm(total=3 * args.steps, desc="inverting, drawing twice", unit="step", disable=None) as bar:
        watch = {"steps": args.steps, "progress": lambda *step: bar.update()}
        noise = invert_ddim(prior, latents, iterations=ITERATIONS[args.inversion], **watch)
        untouched = pipeline.decode(sample_ddim(prior, noise, **watch))
        edited = pipeline.decode(pipeline.sample(noise, source, null, [people],
                                                 **{**sampling_options(args), **watch}))

    print(f"the base model's round trip, PSNR: {psnr(untouched, pipeline.decode(latents)):.2f} dB to what "
          f"the VAE makes of it, {psnr(untouched, picture):.2f} dB to the picture itself", flush=True)
    settings = settings_of(args, subjects, prompt=args.source_prompt, inversion=args.inversion)
    images = [to_images(picture)[0], *(args.checker(to_images(one)[0]) for one in (untouched, edited))]
    labels = ["picture", "round trip", ", ".join(map(str, subjects[len(kept):]))]
    tiles = list(zip(images, labels, strict=True))
    save_sheet(strip(args.source_prompt, tiles), sheet, settings, images, files, [{}] * 3)


if __name__ == "__main__":
    main()
