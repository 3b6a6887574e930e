"""What steers a picture besides its prompt: from `--controlnet` and `--control-image` to `Control`s."""
import argparse
import warnings
from pathlib import Path

# Flag -> its default, and what it may say.
NUMBERS = {"control_scale": (1.0, 0.0, 10.0), "control_start": (0.0, 0.0, 1.0),
           "control_end": (1.0, 0.0, 1.0)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that draws pictures understands."""
    add = parser.add_argument_group(
        "control", "--controlnet and --control-image can be given several times, as pairs, whose effects add "
        "up; the numbers once for all or once for each").add_argument
    add("--controlnet", action="append", default=[], metavar="FILE",
        help="a file or folder that convert_controlnet.py reads or has written, or train.py controlnet")
    add("--control-image", action="append", default=[], metavar="FILE",
        help="the picture that it follows, such as a skeleton; brought to the size of what is drawn")
    add("--control-scale", action="append", type=float, metavar="S",
        help="how strongly; 0 is as if it were not there (default 1)")
    add("--control-start", action="append", type=float, metavar="F",
        help="from which share of the steps on (default 0)")
    add("--control-end", action="append", type=float, metavar="F", help="up to which share (default 1)")
    add("--guess-mode", action="store_true",
        help="steer only where guidance has the prompt, and the finer features less: lets the control image "
             "say what is to be seen; wants --guidance-scale 3 to 5")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first control flag that cannot be used."""
    count, images = len(args.controlnet), len(args.control_image)
    if count != images:
        raise ValueError(f"{count} --controlnet with {images} --control-image: give one image for each")
    if not count and (args.guess_mode or any(getattr(args, name) for name in NUMBERS)):
        raise ValueError("--control-scale, --control-start, --control-end and --guess-mode mean nothing "
                         "without --controlnet and --control-image")
    for name, (_, low, high) in NUMBERS.items():
        values, flag = getattr(args, name) or [], "--" + name.replace("_", "-")
        if len(values) not in (0, 1, count):
            raise ValueError(f"{len(values)} {flag} for {count} --controlnet: give one for all, or one for "
                             "each")
        for value in values:
            if not low <= value <= high:
                raise ValueError(f"{flag} must be in {low:.0f}..{high:.0f}, not {value}")
    for setting in describe(args):
        if not setting["start"] < setting["end"]:
            raise ValueError(f"--control-start {setting['start']} must be smaller than --control-end "
                             f"{setting['end']}")


def read_hints(args: argparse.Namespace) -> list:
    """The control images, (1, 3, H, W) in [0, 1] each. Raises ValueError naming the file."""
    from images import read_picture
    return [read_picture(file)[None] for file in args.control_image]


def load_controls(args: argparse.Namespace, hints: list, pipeline) -> list:
    """The `Control`s that the flags ask for; each ControlNet is read once. Raises ValueError."""
    from safetensors import SafetensorError

    from pipeline import Control
    from weights.checkpoints import Refusal
    from weights.controlnet import load_controlnet
    nets = {}
    for source in dict.fromkeys(args.controlnet):
        try:
            nets[source] = load_controlnet(source).to(pipeline.device, pipeline.dtype)
            pipeline.check_controlnet(nets[source])
        except (Refusal, SafetensorError, ValueError) as error:
            raise ValueError(f"--controlnet {source}: {error}") from error
    controls = []
    for source, hint, setting in zip(args.controlnet, hints, describe(args), strict=True):
        controls.append(Control(nets[source], hint, setting["scale"], setting["start"], setting["end"],
                                args.guess_mode))
        warn(args, controls[-1], setting["image"])
    return controls


def warn(args: argparse.Namespace, control, name: str) -> None:
    """Say so when a control acts in no step, or when its picture is stretched."""
    if control.scale and not any(control.acts(step, args.steps) for step in range(args.steps)):
        warnings.warn(f"--control-start {control.start} and --control-end {control.end} leave none of the "
                      f"{args.steps} steps between them: {name} has no effect", stacklevel=2)
    height, width = control.hint.shape[-2:]
    if abs(width * args.height / (height * args.width) - 1) > 0.02:
        warnings.warn(f"--control-image {name} has {width} x {height} pixels and is stretched to "
                      f"{args.width} x {args.height}", stacklevel=2)


def describe(args: argparse.Namespace) -> list[dict]:
    """Each control's settings: names of files, never where they lie."""
    columns = {}
    for name, (default, _, _) in NUMBERS.items():
        values = getattr(args, name) or [default]
        columns[name.removeprefix("control_")] = values * (len(args.controlnet) if len(values) == 1 else 1)
    return [{"controlnet": Path(net).resolve().name, "image": Path(image).name,
             **{name: values[i] for name, values in columns.items()}, "guess_mode": args.guess_mode}
            for i, (net, image) in enumerate(zip(args.controlnet, args.control_image, strict=True))]
