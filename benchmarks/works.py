"""Every piece of work that is timed, with its sides."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import curation, sides, training
from benchmarks.sides import Case, Pass

SIDES: dict[str, dict[str, Callable[[Case], Pass]]] = {
    "decode": {"capfilt": sides.our_decoding, "transformers": sides.transformers_decoding},
    "caption": {"capfilt": sides.our_captioning, "transformers": sides.transformers_captioning},
    "itm": {
        "capfilt": sides.our_matching, "transformers, pair by pair": sides.transformers_matching_of_pairs,
        "transformers, image once": sides.transformers_matching_encoded_once,
    },
    "clip": {"capfilt": sides.our_clip, "open_clip": sides.open_clip_scores},
    "run": {
        "capfilt": curation.OurRun, "script": curation.plain_script, "models alone": curation.our_models_alone,
        "script, one by one": curation.plain_script_one_by_one,
    },
    "stage1": {"capfilt": training.our_step, "transformers, a pass a loss": training.plain_step},
}  # fmt: skip
"""Work → side → what builds it."""
