"""Momentum encoders and their queue against plain loops."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from capfilt.models.losses import soft_itc_loss, soft_targets
from capfilt.models.momentum import FeatureQueue, MomentumConfig, follow, similarities_to_queue, slow_copy
from tests.models.test_blip import PAD, build, draw_pairs


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def test_a_slow_copy_goes_a_small_part_of_the_way() -> None:
    torch.manual_seed(0)
    fast = nn.Linear(3, 2)
    slow = slow_copy(fast)
    before = [value for p in slow.parameters() for value in p.flatten().tolist()]
    nn.init.normal_(fast.weight)
    follow(slow, fast, 0.9)
    new = [value for p in fast.parameters() for value in p.flatten().tolist()]
    found = [value for p in slow.parameters() for value in p.flatten().tolist()]
    assert found == pytest.approx([0.9 * b + 0.1 * n for b, n in zip(before, new, strict=True)], rel=1e-5)
    assert not any(p.requires_grad for p in slow.parameters())


@given(size=st.integers(1, 7), batches=st.lists(st.integers(1, 9), max_size=6))
def test_the_queue_holds_the_last_features(size: int, batches: list[int]) -> None:
    queue, expected, number = FeatureQueue(size, 2), deque[float](maxlen=size), 0
    for batch in batches:
        numbers = [float(number + row + 1) for row in range(batch)]
        number += batch
        features = torch.tensor([[n, 0.0] for n in numbers])
        queue.hold(features, -features)
        queue.push()
        expected.extend(numbers)
    images, texts = queue.features()
    assert sorted(images[:, 0].tolist()) == sorted([*expected, *[0.0] * (size - len(expected))])
    assert torch.equal(texts, -images)


def test_what_is_held_waits_for_the_backward_pass() -> None:
    queue = FeatureQueue(4, 2)
    features = torch.ones(2, 2, requires_grad=True)
    loss = similarities_to_queue(features, queue.features()[0], torch.tensor(1.0)).sum()
    queue.hold(features, features)
    loss.backward()
    assert not queue.features()[0].any()
    queue.push()
    assert queue.features()[0].sum() == 4


def test_soft_targets_and_loss_are_those_of_the_paper() -> None:
    """ALBEF's equations 6 and 7, one pair at a time, on the second of two ranks."""
    generator = torch.Generator().manual_seed(0)
    i2t, t2i, slow_i2t, slow_t2i = (torch.randn(2, 7, generator=generator) for _ in range(4))
    alpha, offset, total = 0.3, 2, 0.0
    for similarity, slow in ((i2t, slow_i2t), (t2i, slow_t2i)):
        for row, (values, slow_values) in enumerate(zip(similarity.tolist(), slow.tolist(), strict=True)):
            targets = [alpha * share for share in softmax(slow_values)]
            targets[row + offset] += 1 - alpha
            total -= sum(t * math.log(share) for t, share in zip(targets, softmax(values), strict=True)) / 4
    targets = soft_targets(slow_i2t, alpha, offset=offset), soft_targets(slow_t2i, alpha, offset=offset)
    assert soft_itc_loss(i2t, t2i, targets).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("ids", [None, ((5, 6, 7, 0), (7, 8, 9, 9))])
def test_itc_of_blip_with_a_queue_against_a_plain_loop(ids: tuple[tuple[int, ...], ...] | None) -> None:
    """Two steps: the second one contrasts with the first one's features too, and with no empty place.

    Pairs of one image share the target, those of the first step too.
    """
    first_ids, second_ids = (None, None) if ids is None else map(torch.tensor, ids)
    columns_ids = [*range(4), *range(10, 14)] if ids is None else [*ids[1], *ids[0]]
    model = build()
    model.start_momentum(MomentumConfig(0.5, 6))
    momentum = model.filter_losses.momentum
    assert momentum is not None
    (images, tokens), mask = draw_pairs(), draw_pairs()[1] != PAD
    for parameter in model.filter.vision_projection.parameters():
        nn.init.normal_(parameter)
    first_images, first_texts = momentum.embed(images, tokens, mask)
    model(images, tokens, ("itc",), ids_B=first_ids, alpha=0.4)["loss"].backward()
    momentum.follow(model.filter)
    assert not torch.allclose(momentum.embed(images, tokens, mask)[0], first_images)

    def dots(row: Tensor, others: Tensor) -> list[float]:
        return [sum(a * b for a, b in zip(row.tolist(), o.tolist(), strict=True)) / 0.07 for o in others]

    with torch.no_grad():
        own_images = model.filter.embed_images(model.filter.vision(images))
        own_texts = model.filter.embed_texts(tokens, mask)
        slow_images, slow_texts = momentum.embed(images, tokens, mask)
    total = 0.0
    for own, slow, others, queued in (
        (own_images, slow_images, slow_texts, first_texts),
        (own_texts, slow_texts, slow_images, first_images),
    ):
        columns = torch.cat([others, queued])
        for row in range(4):
            targets = [0.4 * share for share in softmax(dots(slow[row], columns))]
            matches = [column for column in range(8) if columns_ids[column] == columns_ids[row]]
            for column in matches:
                targets[column] += 0.6 / len(matches)
            shares = softmax(dots(own[row], columns))
            total -= sum(t * math.log(share) for t, share in zip(targets, shares, strict=True)) / 8
    found = model(images, tokens, ("itc",), ids_B=second_ids, alpha=0.4)["itc"]
    assert found.item() == pytest.approx(total, rel=1e-4)
    found.backward()
    assert all(p.grad is None for p in momentum.parameters())


def test_the_queue_knows_images_again_while_it_holds_them() -> None:
    queue = FeatureQueue(4, 2)
    for ids in ([3, 4], [5, 3], [6, 7]):
        queue.hold(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(ids))
        queue.push()
    assert queue.same_images(torch.tensor([3, 4, 7])).sum(dim=1).tolist() == [1, 0, 1]
    queue.hold(torch.ones(4, 2), torch.ones(4, 2))
    queue.push()
    assert not queue.same_images(torch.tensor([3, 4, 7])).any()


def numbered(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.arange(1.0, number + 1)[:, None].expand(-1, 3)
    return features, -features


def filled(size: int, num_pushed: int) -> FeatureQueue:
    queue = FeatureQueue(size, 3)
    for images, texts in zip(*(part.split(2) for part in numbered(num_pushed)), strict=True):
        queue.hold(images, texts)
        queue.push()
    return queue


@pytest.mark.parametrize("num_pushed", [2, 6, 10])
@pytest.mark.parametrize("size", [2, 4, 6, 9])
def test_the_newest_that_fit_are_taken_over(size: int, num_pushed: int) -> None:
    old = filled(6, num_pushed)
    queue = FeatureQueue(size, 3)
    queue.take_over(*old.features(), int(old.place))
    expected = list(range(max(1, num_pushed - min(size, 6) + 1), num_pushed + 1))
    for features, sign in zip(queue.features(), (1, -1), strict=True):
        assert sorted(sign * value for value in features[:, 0].tolist() if value) == expected
    queue.hold(*(torch.full((1, 3), 100.0 * sign) for sign in (1, -1)))
    queue.push()
    left = sorted(value for value in queue.features()[0][:, 0].tolist() if value)
    is_full = len(expected) == size
    assert left == [*(expected[1:] if is_full else expected), 100], "the oldest goes first"
