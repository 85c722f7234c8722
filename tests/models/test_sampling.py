"""Token choice against transformers' own processors and against brute force."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from capfilt.models.sampling import adjust_logits, candidates, choose_tokens, uniforms
from capfilt.settings import CaptionSettings

VOCAB_SIZE, END = 500, 3
COMBINATIONS = list(product((0, 5, 50), (1.0, 0.9, 0.5), (1.0, 0.7), (1.0, 1.3)))


def draw_logits(seed: int, rows: int = 4, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def their_probabilities(
    logits: Tensor,
    tokens: Tensor,
    top_k: int,
    top_p: float,
    temperature: float,
    penalty: float,
    min_length: int,
) -> Tensor:
    """What transformers' generate would draw from."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(MinLengthLogitsProcessor(min_length, END))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors(tokens, logits.clone()).double().softmax(dim=1)


def our_probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    ids, weights = candidates(logits, top_k=top_k, top_p=top_p)
    assert (ids.diff(dim=1) > 0).all()
    return torch.zeros(logits.shape, dtype=torch.float64).scatter(1, ids, weights / weights.sum(1, keepdim=True))


@pytest.mark.parametrize(("top_k", "top_p", "temperature", "penalty"), COMBINATIONS)
def test_probabilities_are_those_of_transformers(top_k: int, top_p: float, temperature: float, penalty: float) -> None:
    tokens = torch.randint(0, VOCAB_SIZE, (4, 6), generator=torch.Generator().manual_seed(1))
    for min_length, scale in product((0, 20), (0.3, 3.0)):
        logits = draw_logits(2, scale=scale)
        theirs = their_probabilities(logits, tokens, top_k, top_p, temperature, penalty, min_length)
        ours = adjust_logits(
            logits.clone(), tokens, end_token_id=END, repetition_penalty=penalty, min_length=min_length
        )
        found = our_probabilities(ours / temperature, top_k, top_p)
        torch.testing.assert_close(found, theirs, atol=1e-6, rtol=0)
        assert (found[:, END] == 0).all() or min_length == 0


@pytest.mark.parametrize(("top_k", "top_p", "temperature", "penalty"), COMBINATIONS)
def test_draws_follow_the_distribution(top_k: int, top_p: float, temperature: float, penalty: float) -> None:
    """Chi-square of 20,000 draws on fixed logits against the probabilities by brute force."""
    tokens = torch.tensor([[7, 8, 9, 7]])
    logits = draw_logits(5, rows=1)
    expected = their_probabilities(logits, tokens, top_k, top_p, temperature, penalty, 0)[0].numpy()
    decoding = CaptionSettings(
        decoding="nucleus", top_k=top_k, top_p=top_p, temperature=temperature, repetition_penalty=penalty
    )
    adjusted = adjust_logits(logits.clone(), tokens, end_token_id=END, repetition_penalty=penalty, min_length=0)
    check_draws(adjusted, decoding, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("min_length", [4, 5])
@pytest.mark.parametrize("top_k", [5, 50, 0])
@pytest.mark.parametrize("decoding", ["nucleus", "top-k"])
def test_draws_follow_the_distribution_with_and_without_an_end(
    decoding: str, top_k: int, min_length: int, temperature: float
) -> None:
    """The end is the likeliest token after four; `top-k` takes no notice of top_p."""
    tokens = torch.tensor([[7, 8, 9, 7]])
    logits = draw_logits(6, rows=1, scale=1.5)
    logits[0, END] = logits.max() + 1
    top_p = 0.8 if decoding == "nucleus" else 1.0
    expected = their_probabilities(logits, tokens, top_k, top_p, temperature, 1.3, min_length)[0].numpy()
    assert (expected[END] > 0.05) == (min_length == 4)
    chosen = CaptionSettings(
        decoding=decoding, top_k=top_k, top_p=0.8, temperature=temperature, repetition_penalty=1.3,
        min_length=min_length,
    )  # fmt: skip
    adjusted = adjust_logits(logits.clone(), tokens, end_token_id=END, repetition_penalty=1.3, min_length=min_length)
    check_draws(adjusted, chosen, expected)


def check_draws(adjusted: Tensor, decoding: CaptionSettings, expected: np.ndarray) -> None:
    """Chi-square of 20,000 draws from one row of logits against their probabilities."""
    num = 20_000
    draws = torch.from_numpy(np.concatenate([uniforms(0, str(key), 0, 8) for key in range(num // 8)]))
    found = np.zeros(VOCAB_SIZE)
    for part in draws.split(4000):
        chosen = choose_tokens(adjusted.expand(len(part), -1), part, decoding)
        found += np.bincount(chosen.numpy(), minlength=VOCAB_SIZE)
    assert found[expected == 0].sum() == 0
    frequent = expected * num >= 5
    observed = np.append(found[frequent], found[~frequent].sum())
    predicted = np.append(expected[frequent] * num, expected[~frequent].sum() * num)
    observed, predicted = observed[predicted > 0], predicted[predicted > 0]
    statistic = ((observed - predicted) ** 2 / predicted).sum()
    assert chi2.sf(statistic, len(predicted) - 1) > 1e-4


def brute_force(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Full sort, float64, equal logits by id."""
    order = np.lexsort((np.arange(len(logits)), -logits.numpy().astype(float)))
    values = logits.double()[order]
    kept = torch.ones(len(logits), dtype=torch.bool)
    if 0 < top_k < len(logits):
        kept = values >= values[top_k - 1]
    weights = (values - values[0]).exp() * kept
    kept &= (weights.cumsum(0) - weights) < top_p * weights.sum()
    return torch.zeros(len(logits), dtype=torch.bool).scatter(0, torch.from_numpy(order), kept)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6), top_k=st.sampled_from([0, 1, 50, 60, 499, 500, 900]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]), levels=st.sampled_from([2, 9, 200]),
)  # fmt: skip
def test_many_equal_logits_are_decided_as_by_a_full_sort(seed: int, top_k: int, top_p: float, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (2, VOCAB_SIZE), generator=generator) * (4.0 / levels)
    found = our_probabilities(logits, top_k, top_p) > 0
    assert torch.equal(found, torch.stack([brute_force(row, top_k, top_p) for row in logits]))


def test_top_k_decoding_ignores_top_p_and_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [10, 20, 30]] = torch.tensor([2.0, 2.0, 1.0])
    draws = torch.linspace(0, 1 - 1e-9, 50, dtype=torch.float64)
    decoding = CaptionSettings(decoding="top-k", top_k=3, top_p=0.01)
    assert set(choose_tokens(logits.expand(50, -1), draws, decoding).tolist()) == {10, 20, 30}
    greedy = CaptionSettings(decoding="greedy", num_captions=1)
    assert choose_tokens(logits, draws[:1], greedy).tolist() == [10]


def test_extreme_uniforms_choose_possible_tokens() -> None:
    logits = draw_logits(9, rows=2)
    draws = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for top_k, top_p in ((0, 1.0), (50, 0.9), (0, 0.9)):
        decoding = CaptionSettings(top_k=top_k, top_p=top_p)
        chosen = choose_tokens(logits, draws, decoding)
        possible = our_probabilities(logits, top_k, top_p) > 0
        assert possible[torch.arange(2), chosen].all()


def test_uniforms_depend_on_seed_key_and_index_alone() -> None:
    whole = uniforms(1, "key", 2, 30)
    assert whole.dtype == np.float64
    assert ((whole >= 0) & (whole < 1)).all()
    assert np.array_equal(uniforms(1, "key", 2, 11), whole[:11])
    for other in (uniforms(2, "key", 2, 30), uniforms(1, "kex", 2, 30), uniforms(1, "key", 3, 30)):
        assert not np.isin(other, whole).any()
    # Fixed for ever: another version of capfilt writes the same captions.
    assert uniforms(0, "000000000", 0, 1)[0] == 0.46464677449811964
    many = np.concatenate([uniforms(0, str(key), 0, 16) for key in range(2000)])
    assert abs(many.mean() - 0.5) < 0.006
    assert chi2.sf(((np.histogram(many, 64, (0, 1))[0] - 500) ** 2 / 500).sum(), 63) > 1e-4


CHOICES = [
    CaptionSettings(decoding="nucleus", top_k=0), CaptionSettings(decoding="nucleus", top_k=50, temperature=0.7),
    CaptionSettings(decoding="top-k", top_k=50), CaptionSettings(decoding="top-k", top_k=0),
    CaptionSettings(decoding="greedy", num_captions=1),
]  # fmt: skip


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda chosen: f"{chosen.decoding} {chosen.top_k}")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, "nothing but -inf"])
def test_a_row_whose_logits_are_not_finite_has_no_token(chosen: CaptionSettings, value: float | str) -> None:
    logits, draws = draw_logits(7), torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    expected = choose_tokens(logits.clone(), draws, chosen)
    if isinstance(value, float):
        logits[2, 77] = value
    else:
        logits[2] = -torch.inf
    found = choose_tokens(logits, draws, chosen)
    assert found.tolist() == [*expected[:2].tolist(), -1, expected[3].item()]


class Sorts(TorchDispatchMode):
    """The longest rows that any sort or top-k inside puts in order, and the longest result."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_sorted = self.longest_kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("sort", "argsort", "msort", "unique", "_unique2", "kthvalue"):
            self.longest_sorted = max(self.longest_sorted, max(args[0].shape))
        elif name == "topk":
            self.longest_kept = max(self.longest_kept, args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 1.0), (50, 0.9), (0, 0.9)])
def test_nucleus_of_the_whole_vocabulary_is_found_without_sorting_it(top_k: int, top_p: float) -> None:
    """Peaky logits, as a trained captioner has them; the result is that of a full sort."""
    logits_RV = 3.0 * torch.randn(40, 30524, generator=torch.Generator().manual_seed(0))
    peaks_R3 = torch.arange(40)[:, None] * 31 + torch.arange(3) * 7001
    logits_RV.scatter_(1, peaks_R3, 20.0 + logits_RV.gather(1, peaks_R3))
    with Sorts() as sorts:
        ids_RK, weights_RK = candidates(logits_RV, top_k=top_k, top_p=top_p)
    assert 0 < sorts.longest_sorted <= 256
    assert 0 < sorts.longest_kept <= 256
    probabilities = torch.zeros(logits_RV.shape, dtype=torch.float64).scatter(1, ids_RK, weights_RK)
    values, order = logits_RV.double().sort(dim=1, descending=True, stable=True)
    expected = (values - values[:, :1]).exp()
    if top_k:
        expected[values < values[:, top_k - 1 : top_k]] = 0.0
    expected[(expected.cumsum(1) - expected) >= top_p * expected.sum(1, keepdim=True)] = 0.0
    expected = torch.zeros_like(expected).scatter(1, order, expected)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected, rtol=1e-9, atol=0)
    assert (expected > 0).sum(dim=1).unique().numel() > 1 or top_p == 1.0
