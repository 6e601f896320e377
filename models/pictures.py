"""Images on disk: how they are read, PNG files with their story as metadata, and captioned contact sheets."""

from __future__ import annotations

import io
import re
import struct
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from errors import InputError, first_line

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DAMAGED_EXIF = (struct.error, ValueError, TypeError, KeyError, SyntaxError, ZeroDivisionError)
NO_IMAGES_OF_OWN = ("__MACOSX", "@eaDir")  # folders beside the hidden ones that systems fill with copies
LARGEST = 25_000_000  # pixels of an image that is read: on its way to RGB each may take twenty bytes
LARGE = 8_000_000  # pixels: of larger images one is unpacked at a time
_ONE_LARGE = RLock()
MARGIN = 8  # pixels around every cell and caption
FONT_SIZE = 14
SMALLEST_CELL = 128  # pixels: smaller images are enlarged by a whole factor, without smoothing
LINE_HEIGHT = round(FONT_SIZE * 1.3)
CHARACTER_WIDTH = 0.56 * FONT_SIZE  # of the widest common letters of the default font, for wrapping
ROW_CAPTION_WIDTH = 190


@contextmanager
def opened_picture(file: Path) -> Iterator[Image.Image]:
    """A PNG, JPEG or WebP file, decoded. Whatever goes wrong with it, also inside the `with`, becomes an `InputError`.

    Contents tell the format, and no other one is tried: for PostScript, under any name, Pillow starts Ghostscript. The
    size is looked at before anything is unpacked.
    """
    try:
        if not file.is_file():
            raise ValueError("there is no such file")
        with ExitStack() as alone:
            alone.enter_context(_ONE_LARGE)  # before it is opened: of a WebP that already takes a canvas
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > LARGEST:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, above {LARGEST:,} in all")
                if image.width * image.height <= LARGE:
                    alone.close()
                image.load()
                yield image
    except Exception as error:  # damaged files raise many kinds
        raise InputError(f"{file} cannot be read as an image: {first_line(error)}") from None


def read_pixels(file: Path) -> np.ndarray:
    """An image in colour as uint8 [H, W, 3]. Raises `InputError` where it cannot be read."""
    with opened_picture(file) as image:
        return np.asarray(image.convert("RGB"))


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The image files in a folder and in all below it, by their suffixes, sorted; and why others were passed over.

    The latter has an entry for each hidden image: the part of its path that a file browser would not show. Tools keep
    copies and previews there.
    """
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    hidden = {file: inside for file in found if (inside := _hidden_part(file.relative_to(folder)))}
    return [file for file in found if file not in hidden], list(hidden.values())


def _hidden_part(path: Path) -> str | None:
    return next((part for part in path.parts if part.startswith(".") or part in NO_IMAGES_OF_OWN), None)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; as it is where these are damaged."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except DAMAGED_EXIF:
        return image


def in_colour(image: Image.Image) -> Image.Image:
    """As RGB, or where a part of it is transparent as RGBA."""
    if image.mode.startswith("I;16"):  # 16 bits: `convert` would cut all above 255 off, which leaves white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")


def on_white(image: Image.Image) -> Image.Image:
    """An image of `in_colour` as RGB, what is transparent on white."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_images(values: Tensor) -> Tensor:
    """What a model draws in [-1, 1] as images in [0, 1], clamped; NaN where a value is none, or infinite."""
    return (values / 2 + 0.5).clamp(0, 1).where(values.isfinite(), torch.nan)


def to_pixels(images: Tensor) -> np.ndarray:
    """Images [..., 3, H, W] in [0, 1] as uint8 [..., H, W, 3], rounded; values outside are clipped, NaN is black."""
    return images.detach().nan_to_num().clamp(0, 1).mul(255).round().byte().movedim(-3, -1).cpu().numpy()


def as_png(image: Image.Image | np.ndarray, story: Mapping[str, str] | None = None) -> bytes:
    """An image, or uint8 [H, W, 3], as the content of a PNG file; `story`: its text chunks (iTXt: any language)."""
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in (story or {}).items():
        chunks.add_itxt(key, value)
    Image.fromarray(np.asarray(image)).save(buffer, format="png", pnginfo=chunks)
    return buffer.getvalue()


def file_stem(prompt: str, limit: int = 60) -> str:
    """A file name's body out of a prompt: lower-case letters, digits and dashes, at most `limit` characters."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return words[:limit].strip("-") or "prompt"


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], row_captions: Sequence[str], column_captions: Sequence[str]
) -> Image.Image:
    """Equal-sized uint8 images [H, W, 3] in rows, a caption above each column and to the left of each row.

    Raises ValueError where the captions do not match the rows and columns, or there is no image.
    """
    if not rows or not rows[0]:
        raise ValueError("a contact sheet needs at least one image")
    if len(row_captions) != len(rows) or any(len(row) != len(column_captions) for row in rows):
        raise ValueError("one caption for each row and for each column is needed")
    height, width = rows[0][0].shape[:2]
    factor = max(1, -(-SMALLEST_CELL // min(height, width)))
    height, width = height * factor, width * factor
    headings = [_wrapped(caption, width) for caption in column_captions]
    top = MARGIN + LINE_HEIGHT * max(heading.count("\n") + 1 for heading in headings)
    size = (ROW_CAPTION_WIDTH + len(headings) * (width + MARGIN), top + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for column, heading in enumerate(headings):
        left = ROW_CAPTION_WIDTH + column * (width + MARGIN)
        pen.multiline_text((left, MARGIN // 2), heading, fill="black", font=font)
    for row, (caption, images) in enumerate(zip(row_captions, rows, strict=True)):
        upper = top + row * (height + MARGIN)
        pen.multiline_text((MARGIN, upper), _wrapped(caption, ROW_CAPTION_WIDTH - MARGIN), fill="black", font=font)
        for column, image in enumerate(images):
            cell = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(cell, (ROW_CAPTION_WIDTH + column * (width + MARGIN), upper))
    return sheet


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, max(4, int(width / CHARACTER_WIDTH)))) or " "
