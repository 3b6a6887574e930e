"""Make the MoA file of any checkpoint of a moa run, while the run goes on or after it was stopped.

    python weights/export_moa.py runs/moa/checkpoints/020000.pt --output moa-20000.safetensors
    python sample.py --weights runs/prior --moa moa-20000.safetensors --subject ...

The tensors are those that the run would write if it ended there: the moving average, where the run
keeps one. Exit status: 0 written, 2 an error (one line on stderr).
"""
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own folder there
from models.errors import Parser, one_line
from models.load import read_checkpoint
from moa import write_moa


def export(checkpoint: Path, output: Path) -> None:
    """Write the MoA file `output`, whole or not at all. Raises WeightsError, ValueError and OSError."""
    state = read_checkpoint(checkpoint)
    if state["moa"] is None:
        raise ValueError(f"{checkpoint} is of the stage {state['run'].get('stage')}: only moa has a MoA file")
    if any(name.startswith("image_encoder.") for name in state["average"]):
        raise ValueError(f"{checkpoint} trains the image encoder too (image_layers), which a MoA file cannot "
                         "hold: the run writes both at its end")
    if output.resolve() == checkpoint.resolve():
        raise ValueError(f"--output {output} is the checkpoint itself: give another name")
    if output.exists():
        raise ValueError(f"--output {output} exists already: give another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {**state["average"], **state.get("buffers", {})}
    write_moa({name.removeprefix("unet."): value for name, value in tensors.items()}, state["moa"], output)
    print(f"{output}: step {state['step']} of {state['run'].get('steps')}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint of train.py moa")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the MoA file to write")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.output)
    except (ValueError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary file goes
    main()
