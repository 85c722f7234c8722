"""Why a row or a pair did not go on: two closed lists of codes, each with a sentence, and the quarantine row.

A row in quarantine could not be worked on (a dead address, a broken picture). A dropped pair was worked on
and judged; it stays in the manifest with its drop reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

REASON_SENTENCES: dict[str, str] = {
    # the address
    "bad_url": "The address is empty or cannot be parsed.",
    "bad_scheme": "The address is neither http nor https.",
    "bad_port": "The address names a port that is not allowed.",
    "blocked_address": "The host is a private, loopback or otherwise reserved address.",
    "dns_error": "The host name could not be resolved.",
    # the exchange
    "connection_error": "The connection was refused, reset or broke off.",
    "tls_error": "The server's certificate or TLS handshake was not accepted.",
    "timeout": "The exchange did not end within the time allowed for one address.",
    "too_many_redirects": "The server redirected more often than allowed, or in a circle.",
    "bad_response": "The server's answer is not valid HTTP, or its headers are too long.",
    "not_found": "The server answered 404.",
    "gone": "The server answered 410.",
    "forbidden": "The server answered 401, 403 or 451.",
    "too_many_requests": "The server answered 429, or asked before to be left alone.",
    "http_error": "The server answered with another status that is not a success.",
    "server_error": "The server answered 500 or above.",
    "disallowed": "The server's X-Robots-Tag, or its robots.txt, forbids this use.",
    "empty_body": "The server answered without a body.",
    "body_too_large": "The body is longer than allowed.",
    # the picture
    "not_an_image": "The bytes are not a picture.",
    "unsupported_format": "The picture's format is not on the list of formats that are read.",
    "truncated_image": "The picture ends before its last row.",
    "bad_image": "The picture cannot be decoded.",
    "too_many_pixels": "The picture has more pixels than allowed.",
    "bad_aspect_ratio": "The picture is longer against its width than allowed, or has an empty edge.",
    # the row
    "bad_row": "A value of the row has a type or content that cannot be used.",
    "caption_too_long": "The web caption is longer than allowed.",
    "bad_caption": "The web caption is not readable text.",
    "duplicate_key": "Another sample of the run has the same key.",
    "missing_image": "The sample has a caption or metadata but no image.",
    "several_images": "The sample has more than one image.",
    # the tar of an imported shard
    "bad_member": "A member of the tar is not a plain file, or its name cannot be used.",
    "member_too_large": "A member of the tar is larger than allowed.",
    "damaged_tar": "The tar is damaged from here on; what follows could not be read.",
    # our own work on it
    "worker_failed": "The process that worked on the row died or hung more often than it is tried again.",
    "retried": "The shard was downloaded anew; a later shard of `capfilt retry` has what became of the row.",
    "scoring_failed": "A model could not be applied to the sample.",
}
"""Code → what it says, for people."""

REASONS: tuple[str, ...] = tuple(REASON_SENTENCES)
"""Closed list of the reason codes of the quarantine, and of the shards' column `reason`."""

SETTLED_REASONS = frozenset({
    "bad_url", "bad_row", "caption_too_long", "bad_caption", "duplicate_key", "missing_image", "several_images",
    "bad_member", "member_too_large", "damaged_tar", "scoring_failed",
})  # fmt: skip
"""Reasons that asking for the row again does not change."""

DROP_REASON_SENTENCES: dict[str, str] = {
    "low_itm": "The ITM score is below the threshold.",
    "low_clip": "The CLIP score is not among the best of its image.",
    "duplicate": "Another caption of the same image reads the same.",
    "empty": "There is no text.",
    "other_source": "The selection takes captions of another source only.",
    "known_false": "Somebody who knows the picture says that the text is false of it.",
}
"""Code → what it says, for people."""

DROP_REASONS: tuple[str, ...] = tuple(DROP_REASON_SENTENCES)
"""Closed list of the values of the manifest's column `drop_reason`; null where the pair is kept."""


_BY_STATUS = {
    401: "forbidden", 403: "forbidden", 451: "forbidden", 404: "not_found", 410: "gone", 429: "too_many_requests",
}  # fmt: skip


def reason_of_status(status: int) -> str:
    """Reason of an HTTP answer that is not a success."""
    return _BY_STATUS.get(status, "server_error" if status >= 500 else "http_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """One row or sample that a stage could not work on."""

    key: str
    """Key of the sample, or of the row that never became one."""
    reason: str
    """One of REASONS."""
    detail: str = ""
    """What was found, short; cleaned of control characters when it is written."""
    sha256: str | None = None
    """Hex digest of the bytes that were refused, where there were any."""
    num_bytes: int | None = None
    """Length of the bytes that were refused, where there were any."""

    def __post_init__(self) -> None:
        if self.reason not in REASON_SENTENCES:
            raise ValueError(f"reason is {self.reason!r}; expected one of {', '.join(REASONS)}")


def shorten_counts(counts: Mapping[str, int], most: int = 4) -> str:
    """Name the first few of many counts, and how many are in the others: "not_found 4, gone 2 and 3 others"."""
    named = ", ".join(f"{reason} {count:,}" for reason, count in list(counts.items())[:most])
    rest = sum(list(counts.values())[most:])
    return f"{named} and {rest:,} others" if rest else named
