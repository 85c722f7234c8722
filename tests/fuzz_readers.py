"""Coverage-guided fuzzing of what reads tars and pictures, for as long as it is left to run.

    uv pip install atheris
    python tests/fuzz_readers.py tars CORPUS_DIR -max_total_time=1800
    python tests/fuzz_readers.py pictures CORPUS_DIR -max_total_time=1800

In: a folder for the inputs that reached something new, filled with sound files where it is empty. Out: nothing, or the
input that made a reader fail otherwise than by its own refusal, in a file crash-…; such a file becomes a test.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import atheris

with atheris.instrument_imports(include=["capfilt", "PIL"]):
    from capfilt.curation.import_samples import check_sample, group_members
    from capfilt.data.foreign_tars import read_foreign_tar
    from capfilt.data.images import ImageRefused, decode_image, probe_image
    from capfilt.data.tars import index_tar, write_tar
    from capfilt.errors import CorruptionError
    from capfilt.settings import DownloadSettings

SETTINGS = DownloadSettings(max_pixels=1_000_000)
"""Small pictures: the fuzzer's time goes into odd ones, not into large ones."""


def read_tar(data: bytes) -> None:
    """As a shard of others, sample by sample, and as one of ours."""
    for sample in group_members(read_foreign_tar(io.BytesIO(data))):
        check_sample(sample, SETTINGS)
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        with suppress(CorruptionError):
            for member in index_tar(Path(file.name)):
                assert 0 <= member.offset <= member.offset + member.length <= len(data)


def read_picture(data: bytes) -> None:
    """Header and pixels."""
    for read in (probe_image, lambda given: decode_image(given, max_pixels=SETTINGS.max_pixels)):
        with suppress(ImageRefused):
            read(data)


def sound_tars() -> list[bytes]:
    """One as we write it, one with the headers that others use."""
    from tests.data.conftest import encoded_image
    from tests.hostile_tars import GOOD, info, packed

    picture = encoded_image(1)
    members = [("a.jpg", picture), ("a.txt", b"a dog"), ("a.json", b'{"url": "http://x/"}'), ("b" * 120 + ".png", b"x")]
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "a.tar", members[:3])
        ours = (Path(folder) / "a.tar").read_bytes()
    return [ours, packed(*[(info(name, len(content)), content) for name, content in members], GOOD)]


def sound_pictures() -> list[bytes]:
    """Small ones of every format."""
    from tests.data.test_images import SEEDS

    return SEEDS


READERS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "tars": (read_tar, sound_tars),
    "pictures": (read_picture, sound_pictures),
}


def main() -> None:
    """Fuzz what the first argument names; the others are libFuzzer's."""
    read, seeds = READERS[sys.argv.pop(1)]
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number, seed in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
