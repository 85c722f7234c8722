"""Reports of retrieval and of a filter as lines of text: ruled sections and tables, at most 100 columns.

In: a `RetrievalReport` or `FilterReport`. Out: lines. Words of the user's files are cleaned here.
"""

from __future__ import annotations

from collections.abc import Iterator

from capfilt.data.texts import clean_for_terminal
from capfilt.evaluate.correlation import KendallTau
from capfilt.evaluate.filter_report import ALL, TRUE_FROM, FilterReport, Judgments
from capfilt.evaluate.labelled_scores import AtThreshold, Calibration, ScoreFigures
from capfilt.evaluate.ranking import Recalls
from capfilt.evaluate.retrieval import RetrievalReport
from capfilt.progress import bar, counted, format_seconds
from capfilt.report.stats_view import rule

_BAR_WIDTH = 20
_NAMES = {"itm": "ITM score", "clip": "CLIP score"}


def retrieval_lines(report: RetrievalReport, model: str, *, plain: bool = False) -> Iterator[str]:
    """Recalls both ways, by ITC and after ITM; `plain` keeps to ASCII."""
    yield rule(f"Retrieval with {clean_for_terminal(model, 60)}", plain=plain)
    yield (
        f"  {counted(report.num_images, 'image')}, {counted(report.num_texts, 'text')}; {report.computing}, "
        f"{format_seconds(report.seconds)}"
    )
    if report.num_images_without_text:
        without = counted(report.num_images_without_text, "image")
        yield f"  {without} without a text: among the candidates, not looked for"
    yield ""
    ks = list(report.itc.image_to_text)
    width = 8 * len(ks)
    yield f"  {'':<9} {'image to text':^{width}}   {'text to image':^{width}}".rstrip()
    heads = "".join(f"{f'R@{k}':>8}" for k in ks)
    yield f"  {'':<9} {heads}   {heads}   {'mean':>6}"
    rows = [("ITC", report.itc), ("ITC + ITM", report.itm)]
    for name, recalls in rows:
        if recalls is not None:
            yield _recall_line(name, recalls)
    yield ""
    if report.k_test:
        yield (
            f"  ITC + ITM: the {report.k_test:,} best by ITC, ranked again by match logit + cosine "
            f"({report.num_itm_pairs:,} pairs)"
        )
    yield "  in percent; a false candidate with the score of the true one counts as before it"


def _recall_line(name: str, recalls: Recalls) -> str:
    ways = [
        "".join(f"{value:>8.1f}" for value in way.values()) for way in (recalls.image_to_text, recalls.text_to_image)
    ]
    return f"  {name:<9} {ways[0]}   {ways[1]}   {recalls.mean:>6.1f}"


def filter_lines(report: FilterReport, *, plain: bool = False) -> Iterator[str]:
    """Figures by source, thresholds, calibration, judgments; `plain` keeps to ASCII."""
    yield rule(f"{_NAMES[report.score]} against labels", plain=plain)
    yield from _group_lines(report)
    yield from _count_lines(report)
    whole = report.figures[ALL]
    yield ""
    yield rule("Thresholds, all pairs", plain=plain)
    yield from _threshold_lines(whole, report.target_precision)
    if whole.calibration is not None:
        yield ""
        yield rule("Calibration, all pairs", plain=plain)
        yield from _calibration_lines(whole.calibration, plain)
    if report.judgments is not None:
        yield ""
        yield rule("Experts' judgments", plain=plain)
        yield from _judgment_lines(report.judgments)


def _group_lines(report: FilterReport) -> Iterator[str]:
    at = report.figures[ALL].at_threshold
    if at is not None:
        yield f"  kept: a score of at least {at.threshold:g}"
    yield (
        f"  {'':<10} {'pairs':>9} {'true':>7} {'kept':>7} {'precision':>10} {'recall':>7} {'F1':>6} {'accuracy':>9} "
        f"{'AUC':>6} {'AP':>6}"
    )
    for name, found in report.figures.items():
        own = found.at_threshold
        kept = own.kept_share if own else None
        yield (
            f"  {clean_for_terminal(name, 10):<10} {found.num_pairs:>9,} {found.share_true:>7.1%} {_share(kept):>7} "
            f"{_share(own.precision if own else None):>10} {_share(own.recall if own else None):>7} "
            f"{_figure(own.f1 if own else None):>6} {_share(own.accuracy if own else None):>9} "
            f"{_figure(found.auc):>6} {_figure(found.average_precision):>6}"
        )
    yield "  AUC: area under the ROC curve; AP: average precision"


def _count_lines(report: FilterReport) -> Iterator[str]:
    name = _NAMES[report.score]
    if report.num_unscored:
        yield f"  left out: {counted(report.num_unscored, 'labelled pair')} without {name}"
    if report.num_unjoined:
        yield f"  left out: {counted(report.num_unjoined, 'label')} of pairs that are not there"
    if report.num_unlabelled:
        yield f"  not measured: {counted(report.num_unlabelled, 'pair')} with {name}, without a label"


def _threshold_lines(found: ScoreFigures, target_precision: float) -> Iterator[str]:
    yield f"  {'threshold':>9} {'kept':>7} {'precision':>10} {'recall':>7} {'F1':>6}"
    for step in found.sweep:
        yield _threshold_line(step)
    for name, step in (("best F1", found.best_f1), (f"precision {target_precision:g}", found.at_precision)):
        if step is None:
            yield f"  {name}: no threshold reaches it"
        else:
            yield f"{_threshold_line(step)}   {name}"


def _threshold_line(step: AtThreshold) -> str:
    return (
        f"  {step.threshold:>9.4f} {step.kept_share:>7.1%} {_share(step.precision):>10} {_share(step.recall):>7} "
        f"{step.f1:>6.3f}"
    )


def _calibration_lines(found: Calibration, plain: bool) -> Iterator[str]:
    yield (
        f"  expected calibration error {found.expected_error:.4f} ({len(found.bins)} bins of equal width), "
        f"Brier score {found.brier:.4f}"
    )
    yield f"  {'score':<14} {'pairs':>9} {'mean':>7} {'true':>7}"
    for one in found.bins:
        if one.mean_score is not None and one.share_true is not None:
            drawn = bar(one.share_true, _BAR_WIDTH, plain=plain).rstrip(" ·.")
            span = f"{one.low:.2f} to {one.high:.2f}"
            yield f"  {span:<14} {one.num_pairs:>9,} {one.mean_score:>7.3f} {one.share_true:>7.1%}  {drawn}".rstrip()


def _judgment_lines(found: Judgments) -> Iterator[str]:
    yield f"  {'':<34} {'rows':>8} {'tau-c':>7} {'tau-b':>7}"
    yield _tau_line(f"all {found.num_pairs:,} pairs", found.all)
    yield _tau_line(f"without {found.num_own_captions:,} own captions", found.without_own_captions)
    yield f"  every judgment is a row; above, a pair is true where its mean judgment is at least {TRUE_FROM:g}"


def _tau_line(name: str, tau: KendallTau) -> str:
    return f"  {name:<34} {tau.num_rows:>8,} {_figure(tau.tau_c):>7} {_figure(tau.tau_b):>7}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _figure(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.3f}"
