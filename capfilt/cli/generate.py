"""`capfilt generate`: captions and answers from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capfilt.cli.console import clean, say, say_json
from capfilt.cli.options import AsJson, Device, Dtype
from capfilt.errors import UsageError
from capfilt.settings import DTYPES

if TYPE_CHECKING:
    from PIL import Image


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or LAVIS's .pth of a stage-2 model.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue, or a question with --answer.")
    ] = None,
    answer: Annotated[
        bool, typer.Option("--answer", help="Answer the --prompt as a question, in the model's frame.")
    ] = False,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams; unset: 1, or 5 with --answer.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest text in tokens; unset: 30, or 10 with --answer.", show_default=False),
    ] = None,
    llm: Annotated[
        str, typer.Option(metavar="PATH|ID", help="Language model, for a .pth of LAVIS's, which has none.")
    ] = "",
    image_encoder: Annotated[
        str, typer.Option(metavar="PATH|ID", help="Image encoder, for a .pth of LAVIS's that was saved without.")
    ] = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Describe images, or answer a question about them."""
    if answer and not prompt:
        raise UsageError("--answer needs a question. Add --prompt 'what colour is the ball?'")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    pictures = [read_picture(path) for path in images]
    from capfilt.train.generate import load_generator

    generator = load_generator(model, device, dtype, llm, image_encoder)
    prompts = [prompt or ""] * len(pictures)
    given = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    options = {name: value for name, value in given.items() if value is not None}
    write = generator.answer if answer else generator.generate
    texts = write(pictures, prompts, **options)
    if as_json:
        say_json([{"image": path, "text": text} for path, text in zip(images, texts, strict=True)])
        return
    for path, text in zip(images, texts, strict=True):
        say(clean(text, 1000) if len(images) == 1 else f"{clean(path)}\t{clean(text, 1000)}")


def read_picture(path: Path) -> Image.Image:
    """An image file that a user named. Raises UsageError where it is no picture that capfilt reads."""
    from capfilt.data.images import ImageRefused, decode_image

    try:
        return decode_image(path.read_bytes())
    except ImageRefused as refused:
        raise UsageError(f"{path} cannot be used: {refused}. Give another picture.") from None
