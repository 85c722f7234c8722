"""Texts that a terminal, a browser or a spreadsheet would act upon, and a run that is full of them."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pyarrow as pa

from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_sealed, sealed_bytes
from tests.stress.lives import COMMITS

TRICKS = {
    "colour": "\x1b[31mred", "title (OSC 0)": "\x1b]0;owned\x07", "link (OSC 8)": "\x1b]8;;http://evil\x1b\\x",
    "clipboard (OSC 52)": "\x1b]52;c;ZXZpbA==\x07", "C1 CSI": "\x9b31mred", "C1 OSC": "\x9d0;owned\x9c",
    "device control": "\x1bP1$r\x1b\\", "backspace": "good\b\b\b\bevil", "carriage return": "good\revil",
    "line feed": "a\nb", "vertical tab": "a\x0bb", "bell": "\x07", "null": "a\0b", "delete": "a\x7fb",
    "right to left": "\u202egnp.exe", "isolates": "\u2066a\u2069\u2067b", "marks": "\u200e\u200f\u061c",
    "zero width": "a\u200bb\ufeff", "tags": "\U000e0041\U000e0042", "lone surrogate": "a\ud800b",
    "line separator": "a\u2028b", "private use": "\ue000", "shift out": "\x0e", "query": "\x1b[c\x1b[6n",
}  # fmt: skip
PAYLOADS = [
    "<script>alert(1)</script>", "</title><script>alert(1)</script>", "</pre><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>', "' onmouseover='alert(1)", '" onfocus=alert(1) autofocus="', "<img src=//evil/x.png>",
    "<iframe src=javascript:alert(1)>", "<a href=javascript:alert(1)>x</a>", "javascript:alert(1)",
    "<link rel=stylesheet href=//evil/x.css>", "<style>@import '//evil/x.css'</style>", "<base href=//evil/>",
    "<meta http-equiv=refresh content='0;url=//evil/'>", "<form action=//evil/><button>x</button></form>",
    "<object data=//evil/x.swf>", "<embed src=//evil/x>", "<video src=//evil/x onerror=alert(1)>",
    "<math><mi xlink:href='javascript:alert(1)'>", "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1)>", "<!--><script>alert(1)</script>", "<![CDATA[<script>alert(1)</script>]]>",
    "<noscript><p title='</noscript><img src=x>'>", "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;script&#62;alert(1)",
    "<scr\0ipt>alert(1)</scr\0ipt>", "\u003cscript\u003ealert(1)", "＜script＞alert(1)＜/script＞",
    "<ScRiPt\n>alert(1)</sCrIpT>", "<x contenteditable onblur=alert(1)>", "<details open ontoggle=alert(1)>",
    "<body onload=alert(1)>", "<input onfocus=alert(1) autofocus>", "<marquee onstart=alert(1)>",
    "<template><script>alert(1)</script></template>", "<table background=//evil/x.png>",
    "<div style=background:url(//evil/x)>", "<img srcset='//evil/x 1x'>", "<picture><source srcset=//evil/x></picture>",
    "<audio src=//evil/x>", "<portal src=//evil/>", "data:text/html,<script>alert(1)</script>",
    "]]><script>alert(1)</script>", "{{constructor.constructor('alert(1)')()}}", "${alert(1)}", "<%= alert(1) %>",
    "\u2028<script>alert(1)</script>", "\u202e<script>", "</li></ul></body></html><script>x</script>", "<plaintext>",
    "<textarea><script>alert(1)</script>", "`onerror=alert(1)`", "<img/src/onerror=alert(1)>",
]  # fmt: skip
FORMULAS = [
    "=1+1", "=cmd|'/c calc'!A0", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "＋1", "－1", "＠SUM(A1)",
    "'=1", "''", "\\0", "'\\", "a\0b", "=\0\\", "\0", "'\\\0", "a,b;c\td", '"=1"', '";=1', "a\n=1", " =1", "",
]  # fmt: skip


def is_unsafe(char: str) -> bool:
    """Whether a terminal could act upon it, or shows nothing, or shows what nobody agreed on."""
    return char in "\u2028\u2029" or (unicodedata.category(char)[0] == "C" and char not in "\u200c\u200d")


class _Unsafe:
    """Finds such characters, but for the line feed: lines end with it, and are counted."""

    def search(self, text: str) -> str | None:
        return next((char for char in sorted(set(text)) if char != "\n" and is_unsafe(char)), None)


UNSAFE = _Unsafe()


def fuzzed(rng: random.Random) -> str:
    alphabet = "".join(TRICKS.values()) + "abc äé猫🙂 []();:/\\'\"%{}$`"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60)))


def run_with_texts(path: Path, texts: list[str]) -> RunDir:
    """A run of one shard whose captions and addresses are these texts, in turn; every second time the keys too.

    A pair with such a key has no picture.
    """
    run = RunDir.create(path)
    for stage, commit in COMMITS.items():
        commit(run, **({"num_samples": len(texts)} if stage == "shards" else {}))
    table, record, _ = read_sealed(run.stage_file("manifest", "00000"))
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        row["text"] = row["url"] = texts[number % len(texts)].encode("utf-8", "replace").decode()
        if number // len(texts) % 2:
            row["key"] = row["text"]
        row["itm_score"] = (row["itm_score"] if row["itm_score"] is not None else 0.5) or 0.5
    run.stage_file("manifest", "00000").write_bytes(
        sealed_bytes(pa.Table.from_pylist(rows, schema=table.schema), record)
    )
    return run
