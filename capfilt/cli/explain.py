"""`capfilt explain`: where a model sees the words of a text in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli.console import clean, note, say, say_json
from capfilt.cli.options import AsJson, Device
from capfilt.errors import UsageError
from capfilt.progress import counted

if TYPE_CHECKING:
    from PIL import Image

    from capfilt.explain import ExplainableModel, Explanation

PNG_AUTHOR, PNG_HEAD_BYTES = b"Software\0capfilt", 1 << 12
"""What `capfilt.report.gradcam` writes into its pictures, and where."""
NUM_STRONGEST = 5
"""Words named in the terminal."""


def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A BLIP filter, a BLIP captioner or a stage-1 model: folder, hub id, .pth, embedded."
        ),
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="One or more texts about it.")],
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Layer whose cross-attention is shown, counted from 0; unset: 7 of 12, a captioner's last.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The PNG to write (several texts: FILE-1.png, …); unset: explain-IMAGE.png.",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="PX", help="Side of the square that the model is shown; unset: its own.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw where a model sees each word of a text in a picture (Grad-CAM)."""
    picture = _read_picture(image)
    files = _output_files(output or Path(f"explain-{image.stem}.png"), len(texts), image)
    from capfilt.explain import load_explainable

    loaded = load_explainable(model, device=device, image_size_px=image_size)
    layer = loaded.layer if layer is None else layer
    found = loaded.explain(picture, texts, layer)
    for file, explanation in zip(files, found, strict=True):
        file.write_bytes(_draw(picture, explanation, loaded, layer))
        if explanation.cut:
            note(f"The model reads {loaded.max_tokens} tokens at most; not read: {clean(explanation.cut)}")
    if as_json:
        say_json({
            "model": model, "kind": loaded.kind, "image": image, "image_size_px": loaded.image_size_px,
            "layer": layer, "layers": loaded.layers,
            "texts": [_plain(one, file) for one, file in zip(found, files, strict=True)],
        })  # fmt: skip
        return
    for file, explanation in zip(files, found, strict=True):
        say(f"{probability_of(explanation, loaded)}  {clean(explanation.text)}")
        say(f"strongest words: {strongest_of(explanation)}")
        words = counted(len(explanation.words), "word")
        say(f"{clean(file)}: the average and {words}, layer {layer}")


def _read_picture(path: Path) -> Image.Image:
    """An image file that a user named. Raises UsageError where it is no picture that capfilt reads."""
    from capfilt.data.image_sources import ImageFile
    from capfilt.data.images import ImageRefused, decode_image

    try:
        return decode_image(ImageFile(path).read())
    except (ImageRefused, OSError) as error:
        raise UsageError(f"{path} cannot be used: {error}. Give another picture.") from None


def _output_files(output: Path, num_texts: int, image: Path) -> list[Path]:
    """The files to write; refused before anything is loaded."""
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output is {output}; expected a name that ends in .png.")
    if not output.parent.is_dir():
        raise UsageError(f"There is no folder {output.parent} for --output {output.name}. Make it first.")
    files = [output]
    if num_texts > 1:
        files = [output.with_stem(f"{output.stem}-{number}") for number in range(1, num_texts + 1)]
    for file in files:
        if file.exists() and file.samefile(image):
            raise UsageError(f"--output {file} is the picture itself. Give another name.")
        if file.is_dir():
            raise UsageError(f"--output {file} is a folder. Give a name that ends in .png.")
        if file.exists() and not (file.is_file() and PNG_AUTHOR in file.read_bytes()[:PNG_HEAD_BYTES]):
            raise UsageError(f"--output {file} is there and was not drawn by capfilt; it would be lost. Name another.")
    return files


def _draw(picture: Image.Image, explanation: Explanation, model: ExplainableModel, layer: int) -> bytes:
    from capfilt.report.gradcam import Panel, draw_panels, word_title

    panels = [Panel("average", explanation.average)]
    for word, share, map_IJ in zip(explanation.words, explanation.shares, explanation.maps, strict=True):
        panels.append(Panel(word_title(word, share), map_IJ))
    heading = f"{probability_of(explanation, model)}, layer {layer}: {explanation.text}"
    return draw_panels(picture, panels, heading)


def probability_of(explanation: Explanation, model: ExplainableModel) -> str:
    name = "probability per token" if model.kind == "captioner" else "match probability"
    return f"{name} {explanation.probability:.3f}"


def strongest_of(explanation: Explanation) -> str:
    if not any(explanation.shares):
        return "none, no word's look at the picture speaks for the text in this layer"
    order = sorted(range(len(explanation.words)), key=lambda number: -explanation.shares[number])
    named = [f"{clean(explanation.words[number], 40)} {explanation.shares[number]:.0%}" for number in order]
    return ", ".join(named[:NUM_STRONGEST])


def _plain(explanation: Explanation, file: Path) -> dict[str, Any]:
    """An explanation for JSON, raw maps included."""
    known = explanation.word_probabilities
    words = [
        {"word": word, "share": share, "map": map_IJ.tolist()}
        | ({} if known is None else {"probability": known[number]})
        for number, (word, share, map_IJ) in enumerate(
            zip(explanation.words, explanation.shares, explanation.maps, strict=True)
        )
    ]
    return {
        "text": explanation.text, "probability": explanation.probability, "cut": explanation.cut, "output": file,
        "average": explanation.average.tolist(), "words": words,
    }  # fmt: skip
