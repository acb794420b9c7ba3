"""Which pictures a step takes: permutations, slices of ranks, and what choosing costs."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg.data.sampling import EpochOrder, mix, rank_slice


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_takes_every_picture_once(length, seed, epoch):
    order = EpochOrder(length, seed)
    assert sorted(order(epoch, 0, length).tolist()) == list(range(length))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.data())
def test_any_part_is_a_part_of_the_whole(length, data):
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start, length + 5))
    order = EpochOrder(length, 3)
    assert np.array_equal(order(4, start, stop), order(4, 0, length)[start:stop])


def test_epochs_and_seeds_differ():
    orders = [
        tuple(EpochOrder(100, seed)(epoch, 0, 100)) for seed in range(4) for epoch in range(4)
    ]
    assert len(set(orders)) == 16
    assert EpochOrder(5, 1, shuffle=False)(7, 1, 9).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("length", [5, 24])
def test_every_picture_is_as_likely_at_every_place(length):
    epochs = 4000
    counts = np.zeros((length, length))
    pairs = np.zeros((length, length))  # which picture follows which
    for epoch in range(epochs):
        order = EpochOrder(length, 9)(epoch, 0, length)
        counts[np.arange(length), order] += 1
        pairs[order[:-1], order[1:]] += 1
    # chi-square over places: mean (length - 1)^2, deviation sqrt(2) (length - 1)
    expected = epochs / length
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - (length - 1) ** 2) < 6 * 2**0.5 * (length - 1)
    rate = pairs[~np.eye(length, dtype=bool)] / (epochs * (length - 1) / (length * (length - 1)))
    assert abs(rate - 1).max() < 6 * (length / epochs) ** 0.5


def test_a_batch_of_three_million_pairs_is_chosen_in_a_millisecond():
    order, length = EpochOrder(3_000_000, 0), 3_000_000
    seconds = []
    for step in range(200):  # at random places of many epochs: nothing is prepared for one of them
        start = mix(step) % (length - 768)
        began = time.perf_counter()
        chosen = order(step, start, start + 768)
        seconds.append(time.perf_counter() - began)
    assert len(set(chosen.tolist())) == 768
    assert np.median(seconds) < 1e-3, f"{1e6 * np.median(seconds):.0f} us"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_slices_of_ranks_are_the_batch(size, ranks):
    parts = [list(range(size))[rank_slice(size, rank, ranks)] for rank in range(ranks)]
    assert [place for part in parts for place in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_pictures():
    with pytest.raises(ValueError, match="length is 0; expected at least one"):
        EpochOrder(0)
