"use strict";
// Filters and sorts the gallery. Reads data attributes, hides and moves elements; makes no markup.
(() => {
  const form = document.getElementById("filters");
  const list = document.getElementById("gallery");
  const shown = document.getElementById("shown");
  if (!form || !list || !shown) return;
  const cards = Array.from(list.children);
  const field = (name) => form.elements.namedItem(name).value;
  const number = (name, otherwise) => {
    const value = Number.parseFloat(field(name));
    return Number.isNaN(value) ? otherwise : value;
  };
  const orders = {
    nearest: (a, b) => a.dataset.distance - b.dataset.distance,
    "itm-up": (a, b) => a.dataset.itm - b.dataset.itm,
    "itm-down": (a, b) => b.dataset.itm - a.dataset.itm,
    "clip-up": (a, b) => a.dataset.clip - b.dataset.clip,
    "clip-down": (a, b) => b.dataset.clip - a.dataset.clip,
    key: (a, b) => (a.dataset.key < b.dataset.key ? -1 : 1),
  };
  const update = () => {
    const source = field("source");
    const verdict = field("verdict");
    const least = number("least", -2);
    const most = number("most", 2);
    const isBounded = field("least") !== "" || field("most") !== "";
    let numCards = 0;
    let numCaptions = 0;
    for (const card of cards) {
      let found = 0;
      for (const caption of card.querySelectorAll(".captions li")) {
        const { source: own, verdict: why, itm } = caption.dataset;
        const isIn =
          (source === "" || own === source) &&
          (verdict === "" || why === verdict || (verdict === "dropped" && why !== "kept")) &&
          (!isBounded || (Number(itm) >= 0 && Number(itm) >= least && Number(itm) <= most));
        caption.hidden = !isIn;
        found += isIn ? 1 : 0;
      }
      card.hidden = found === 0;
      numCards += found ? 1 : 0;
      numCaptions += found;
    }
    for (const card of cards.slice().sort(orders[field("order")])) list.append(card);
    shown.textContent = `${numCaptions} captions of ${numCards} images shown`;
  };
  form.addEventListener("input", update);
  form.addEventListener("reset", () => window.setTimeout(update, 0));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
})();
