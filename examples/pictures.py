"""The three models of CapFilt on a few pictures: captions, the two that CLIP likes best, and what the filter says.

    python examples/pictures.py photo.jpg …                                    # the small embedded models
    python examples/pictures.py photo.jpg --captioner Salesforce/blip-image-captioning-large \
        --clip-model ViT-L-14 --filter-model Salesforce/blip-itm-large-coco

Prints a JSON line for each picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from capfilt import Captioner, Filter, Ranker
from capfilt.errors import CapfiltError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the lines; 1 where a picture or a model cannot be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pictures", nargs="+", help="files")
    parser.add_argument("--captioner", default="embedded", help="folder, hub id or `embedded`")
    parser.add_argument("--clip-model", default="embedded", help="open_clip name or `embedded`")
    parser.add_argument("--filter-model", default="embedded", help="folder, hub id or `embedded`")
    parser.add_argument("--num-captions", type=int, default=10, help="captions of a picture")
    options = parser.parse_args(arguments)
    try:
        captions = Captioner(options.captioner, num_captions=options.num_captions)(options.pictures)
        best = Ranker(options.clip_model, keep=2).best(options.pictures, captions)
        scores = Filter(options.filter_model)(options.pictures, best)
    except CapfiltError as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 1
    for picture, texts, own in zip(options.pictures, best, scores, strict=True):
        judged = [{"text": text, "itm_score": round(score, 4)} for text, score in zip(texts, own, strict=True)]
        print(json.dumps({"picture": picture, "captions": judged}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
