"""The losses against brute force, loop by loop."""

from __future__ import annotations

import math

import pytest
import torch

from capfilt.models.losses import draw_hard_negatives, itc_loss, itm_loss, lm_loss


def test_itc_is_cross_entropy_both_ways() -> None:
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for matrix in (similarity.tolist(), similarity.T.tolist()):
        for number, row in enumerate(matrix):
            expected -= math.log(math.exp(row[number]) / sum(map(math.exp, row))) / 10
    assert itc_loss(similarity, similarity.T).item() == pytest.approx(expected, rel=1e-5)


def test_itc_counts_from_its_own_rows_among_all_ranks() -> None:
    all_pairs = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    whole = itc_loss(all_pairs, all_pairs.T)
    parts = [itc_loss(all_pairs[i : i + 2], all_pairs.T[i : i + 2], offset=i) for i in (0, 2, 4)]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-5)


def test_itc_smooths_over_all_pairs() -> None:
    similarity = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    logs = similarity.log_softmax(dim=1)
    rows = [-(0.9 * logs[i, 2 + i] + 0.1 * logs[i].mean()) for i in range(2)]
    found = itc_loss(similarity, similarity, offset=2, label_smoothing=0.1)
    assert found.item() == pytest.approx(float(sum(rows)) / 2, rel=1e-5)


def test_pairs_of_one_image_share_the_target_of_itc() -> None:
    i2t, t2i = (torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    matches = {0: (1, 3, 4), 1: (2,)}  # the rows' own pairs are 1 and 2
    total = 0.0
    for similarity in (i2t, t2i):
        for row, columns in matches.items():
            logs = similarity[row].log_softmax(dim=0)
            total -= sum(float(logs[column]) for column in columns) / len(columns) / 4
    same = torch.zeros(2, 5, dtype=torch.bool)
    for row, columns in matches.items():
        same[row, list(columns)] = True
    assert itc_loss(i2t, t2i, offset=1, same_image_BA=same).item() == pytest.approx(total, rel=1e-5)
    alone = torch.eye(5, dtype=torch.bool)[1:3]
    plain = itc_loss(i2t, t2i, offset=1, label_smoothing=0.1)
    assert itc_loss(i2t, t2i, offset=1, label_smoothing=0.1, same_image_BA=alone).item() == pytest.approx(plain.item())


def test_hard_negatives_follow_softmax_and_leave_out_the_pair() -> None:
    similarity = torch.tensor([[9.0, 1.0, 0.0, 0.0], [2.0, 9.0, 0.0, 1.0]])
    excluded = torch.tensor([[True, False, False, True], [False, True, False, False]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [draw_hard_negatives(similarity, excluded, torch.rand(2, generator=generator)) for _ in range(4000)]
    )
    shares = torch.stack([(draws == column).float().mean(0) for column in range(4)], dim=1)
    for row in range(2):
        weights = torch.exp(similarity[row]).masked_fill(excluded[row], 0) + 0.0
        assert torch.allclose(shares[row], weights / weights.sum(), atol=0.04)
    assert shares[excluded].sum() == 0


@pytest.mark.parametrize("offset", [0, 2])
def test_equal_texts_everywhere_give_another_pair(offset: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_hard_negatives(
            torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.bool), torch.rand(3, generator=generator), offset=offset
        )
        assert ((drawn >= 0) & (drawn < 5)).all()
        assert not (drawn == torch.arange(3) + offset).any()


def test_the_own_pair_is_no_negative_even_where_nothing_is_excluded() -> None:
    drawn = draw_hard_negatives(30 * torch.eye(6), torch.zeros(6, 6, dtype=torch.bool))
    assert not (drawn == torch.arange(6)).any()


def test_a_pair_that_is_alone_is_drawn_itself() -> None:
    assert draw_hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)).tolist() == [0]


def test_itm_is_two_class_cross_entropy() -> None:
    match, mismatch = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)) + math.log(2)
    assert itm_loss(match, mismatch).item() == pytest.approx(expected / 3, rel=1e-5)


def test_lm_smooths_over_the_vocabulary() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    log_probability = torch.log_softmax(logits, 1)[0]
    expected = -(0.9 * log_probability[0] + 0.1 * log_probability.mean())
    loss = lm_loss(logits, torch.tensor([0]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
