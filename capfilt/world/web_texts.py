"""What stands beside pictures on the web: alt-text of every kind, for the miniature world's site.

In: a scene, a kind of text and a random generator. Out: the text, or None where a page has none at all.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import numpy as np

from capfilt.world import language
from capfilt.world.scenes import Scene, draw_scene

MAX_OVERLONG_BYTES = 12_000
"""Longest of the overlong texts; above the download's default limit of a caption."""

_SHOP = (
    "Free shipping on orders over $50!", "Buy now, pay later", "SALE up to 70% off", "Add to cart",
    "Only 3 left in stock - order soon", "New arrivals: autumn collection", "★★★★☆ (128 reviews)",
    "Wholesale price, minimum order 100 pcs", "Click to enlarge", "Customers also viewed these items",
    "Best price guaranteed or your money back", "Ships within 24 hours from our warehouse",
    "Gift card available in store", "2-pack, assorted, item no. 40-1182", "Was $39.99 now $24.50",
    "Sign up for our newsletter and save 10%", "Home decor > Living room > Accessories",
    "Official store | 100% original quality", "Limited edition, while supplies last",
    "Compare (0) Wish list (2)",
    "Rated 4.8 out of 5 by 2,310 happy customers", "Back in stock!", "Download our app for exclusive deals",
    "Size guide and delivery information", "Sold out - notify me when available",
    "Bestseller no. 1 in toys",
)  # fmt: skip
_SITE = (
    "logo", "Image may contain: outdoor", "thumbnail", "Photo by user", "banner", "placeholder", "avatar",
    "Loading...", "Share on social media", "Previous | Next", "View all 24 photos", "Advertisement",
    "© 2023 All rights reserved.", "Read more »", "Posted by admin on March 4", "untitled", "picture",
    "Stock photo, royalty free", "Photo gallery of our summer trip", "Reply Retweet Like",
    "image description",
    "Accept all cookies", "click here", "Related articles", "See who liked this",
)  # fmt: skip
_OTHER_LANGUAGES = (
    "ein schöner Tag im Garten", "zwei Bälle auf dem Rasen", "Jetzt günstig online kaufen",
    "Das Bild zeigt unser neues Angebot", "une photo de vacances à la plage", "trois étoiles sur la neige",
    "Livraison gratuite dès 40 euros", "Cliquez pour agrandir l'image", "un cielo azul sobre la ciudad",
    "dos flores en la mesa de madera", "Envío gratis a todo el país", "la casa di mia nonna al mare",
    "quattro palloni rossi", "Offerta valida fino a domenica", "uma árvore no meio do campo",
    "Promoção de fim de semana", "een rode bal naast een doos", "Gratis verzending vanaf 20 euro",
    "dwie gwiazdy na śniegu", "Kup teraz z darmową dostawą", "tři srdce na písku", "en röd boll på gräset",
    "kaksi punaista palloa lumella", "kırmızı bir top ve mavi kutu", "Ücretsiz kargo fırsatı",
    "красный мяч на траве", "Купить недорого с доставкой", "дві зірки на снігу", "ένα λουλούδι στην άμμο",
    "草の上の赤いボール", "送料無料でお届けします", "雪地上的三颗星星", "全场包邮 限时特价",
    "잔디 위의 빨간 공",
    "무료 배송 이벤트",
    "كرة حمراء على العشب", "شحن مجاني لجميع الطلبات", "घास पर एक लाल गेंद", "बर्फ पर दो तारे",
    "ลูกบอลสีแดงบนหญ้า", "một quả bóng đỏ trên cỏ", "bola merah di atas rumput", "שני כוכבים על השלג",
)  # fmt: skip
_CAMERAS = (
    "IMG_{:04d}",
    "DSC{:05d}",
    "DSCF{:04d}",
    "P10{:05d}",
    "photo-{:03d}",
    "Screenshot_2021{:04d}",
    "{:08x}",
)
_ENDINGS = (".jpg", ".JPG", ".png", ".jpeg", "_edited.jpg", "-300x200.jpg", " (1).jpg", ".webp", "")
_MARKUP = (
    "<p>{}</p>", "<b>{}</b>", '<span class="caption">{}</span>', "<em>{}</em><br/>", "&nbsp;{}&nbsp;",
    '<a href="/gallery?id={n}">{}</a>', "&quot;{}&quot;", "<h2 style='color:#333'>{}</h2>", "<!-- alt -->{}",
    '<img alt="" src="x.gif"/>{}', "<figcaption>{}</figcaption>", "&lt;{}&gt;",
)  # fmt: skip
_TAG = re.compile(r"<!--.*?-->|<[a-zA-Z/][^<>]*>", re.DOTALL)

CaptionWriter = Callable[[Scene, np.random.Generator], str | None]


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _other_image(scene: Scene, rng: np.random.Generator) -> str:
    other = draw_scene(int(rng.integers(2**48)))
    return language.caption(other, rng)


def _shop(scene: Scene, rng: np.random.Generator) -> str:
    text = _pick(_SHOP if rng.random() < 0.7 else _SITE, rng)
    return f"{text} | {_pick(_SHOP, rng)}" if rng.random() < 0.3 else text


def _file_name(scene: Scene, rng: np.random.Generator) -> str:
    return _pick(_CAMERAS, rng).format(int(rng.integers(10_000))) + _pick(_ENDINGS, rng)


def _markup(scene: Scene, rng: np.random.Generator) -> str:
    return _pick(_MARKUP, rng).format(language.caption(scene, rng), n=int(rng.integers(10_000)))


def _empty(scene: Scene, rng: np.random.Generator) -> str | None:
    return None if rng.random() < 0.5 else ""


def _overlong(scene: Scene, rng: np.random.Generator) -> str:
    """Chatter without end; a third of it beyond what a download keeps."""
    wanted = int(rng.integers(9_000, MAX_OVERLONG_BYTES)) if rng.random() < 1 / 3 else int(rng.integers(400, 4_000))
    parts: list[str] = []
    while sum(map(len, parts)) < wanted:
        parts.append(_pick(_SHOP + _SITE, rng))
    return " ".join(parts)


CAPTION_WRITERS: dict[str, CaptionWriter] = {
    "true": language.caption,
    "paraphrased": language.full_caption,
    "one_fact_changed": lambda scene, rng: language.change_one_fact(scene, rng)[0],
    "other_image": _other_image,
    "shop": _shop,
    "file_name": _file_name,
    "other_language": lambda scene, rng: _pick(_OTHER_LANGUAGES, rng),
    "markup": _markup,
    "empty": _empty,
    "overlong": _overlong,
}
"""Kind of web caption → what writes it. `true` states some facts of the scene, `paraphrased` all of them in
words of its own, `one_fact_changed` is false in one, `other_image` was meant for another picture."""


def strip_markup(text: str) -> str:
    """The text a browser would show: tags and comments gone, entities resolved."""
    shown = html.unescape(_TAG.sub(" ", text)).replace("\xa0", " ")
    return " ".join(shown.split())
