"""Packing and batches; the oracle is a loop over tokens."""

import random
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.pieces import PIECE
from data.sources import read_chitchat
from datacollator import DataCollator, RowStream, pack_best_fit
from tokenizer import Tokenizer

CAPACITY, PAD = 24, 999
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)
CONVERSATION = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 1)), min_size=1, max_size=8)
ROWS = st.lists(st.lists(CONVERSATION, min_size=1, max_size=3), min_size=1, max_size=4)


def as_dataset(conversations) -> datasets.Dataset:
    features = datasets.Features({name: PIECE[name] for name in ("input_ids", "mask", "length", "targets")})
    ids, masks = ([list(c[i]) for c in conversations] for i in (0, 1))
    counts = {"length": [*map(len, ids)], "targets": [sum(mask[1:]) for mask in masks]}
    return datasets.Dataset.from_dict({"input_ids": ids, "mask": masks} | counts, features=features)


def numbered_conversations(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Return conversations of random lengths; all tokens of conversation i are i."""
    rng = random.Random(seed)
    return [([i] * n, [0] + [1] * (n - 1)) for i in range(count) for n in [rng.randint(2, CAPACITY)]]


# --- Packing ---


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packing_is_best_fit_decreasing_and_its_size_does_not_depend_on_the_order(lengths, seed):
    rooms: list[int] = []  # room left in each row, by trying all rows
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(CAPACITY - length)
    rows = pack_best_fit(lengths, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert sorted(CAPACITY - sum(lengths[i] for i in row) for row in rows) == sorted(rooms)
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    assert len(pack_best_fit(shuffled, CAPACITY)) == len(rows)


def test_chitchat_is_packed_with_at_most_one_percent_of_padding():
    tokenizer = Tokenizer(vocab_size=8192)
    lengths = [min(len(tokenizer.render(row["messages"])[0]), 2048) for row in islice(read_chitchat("train", ""), 1500)]
    assert sum(lengths) / (len(pack_best_fit(lengths, 2048)) * 2048) > 0.99


# --- Batches ---


@given(rows=ROWS, packing=st.booleans())
def test_a_batch_is_what_a_loop_over_tokens_writes(rows, packing):
    if not packing:
        rows = [row[:1] for row in rows]
    collator = DataCollator(CAPACITY, PAD, packing)
    batch = collator([[tuple(zip(*conversation, strict=True)) for conversation in row] for row in rows])
    width = CAPACITY if packing else max(len(conversation) for row in rows for conversation in row)
    for b, row in enumerate(rows):
        expected = []
        for number, conversation in enumerate(row, start=1):
            for position, (token, _) in enumerate(conversation):
                label = -100
                if position + 1 < len(conversation):
                    following, trained = conversation[position + 1]
                    label = following if trained else -100
                expected.append((token, label, position, number))
        expected += [(PAD, -100, 0, 0)] * (width - len(expected))
        columns = [batch[name][b].tolist() for name in ("input_ids", "labels", "position_ids", "sequence_ids")]
        assert list(zip(*columns, strict=True)) == expected
    assert all(t.dtype == torch.int64 and t.shape == (len(rows), width) for t in batch.values())


# --- The stream ---


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_conversation_once_in_as_many_rows(packing, shuffle):
    conversations = numbered_conversations(50)
    stream = RowStream(as_dataset(conversations), DataCollator(CAPACITY, PAD, packing), seed=3, shuffle=shuffle)
    epochs = []
    for epoch in range(3):
        rows = [stream.row(epoch * stream.rows_per_epoch + i) for i in range(stream.rows_per_epoch)]
        found = sorted((ids.tolist(), mask.tolist()) for row in rows for ids, mask in row)
        assert found == sorted(conversations)
        assert all(sum(len(ids) for ids, _ in row) <= CAPACITY for row in rows)
        epochs.append([[int(ids[0]) for ids, _ in row] for row in rows])
    assert (epochs[0] == epochs[1] == epochs[2]) == (not shuffle)
    if not shuffle and not packing:
        assert epochs[0] == [[i] for i in range(50)]


def test_a_row_is_a_function_of_data_seed_and_number():
    dataset, collator = as_dataset(numbered_conversations(50)), DataCollator(CAPACITY, PAD)
    first = RowStream(dataset, collator, seed=1)
    order = [7, 300, 2, 150, 301, 0]  # a resumed run, or another process, starts anywhere
    rows = {i: first.row_indices(i) for i in sorted(order)}
    again = RowStream(dataset, collator, seed=1)
    assert {i: again.row_indices(i) for i in order} == rows
    other = RowStream(dataset, collator, seed=2)
    assert any(other.row_indices(i) != rows[i] for i in order)


def test_a_batch_larger_than_the_dataset_continues_with_the_next_epochs():
    stream = RowStream(as_dataset([([1, 2], [0, 1])]), DataCollator(CAPACITY, PAD))
    assert stream.rows_per_epoch == 1
    assert stream.batch(range(4))["input_ids"][:, :2].tolist() == [[1, 2]] * 4


def test_conversations_are_read_from_any_table():
    conversations = numbered_conversations(60)
    pieces = [as_dataset(conversations[i : i + 7]) for i in range(0, 60, 7)]
    whole = datasets.concatenate_datasets(pieces)
    for dataset, expected in [
        (whole, conversations),
        (whole.select(range(10, 50)), conversations[10:50]),
        (whole.select(range(59, -1, -2)), conversations[59::-2]),
    ]:
        stream = RowStream(dataset, DataCollator(CAPACITY, PAD))
        assert stream.lengths.tolist() == [len(ids) for ids, _ in expected]
        for i, (ids, mask) in enumerate(expected):
            assert [array.tolist() for array in stream.piece(i)] == [ids, mask]


def test_unshuffled_rows_come_in_the_order_of_the_data_and_shuffled_ones_of_any_length():
    """Best fit makes rows from the longest conversations on; neither what is trained first nor a sample of what is
    held out may be that."""
    conversations = numbered_conversations(300)
    dataset, collator = as_dataset(conversations), DataCollator(CAPACITY, PAD)
    plain = RowStream(dataset, collator, shuffle=False)
    firsts = [min(plain.row_indices(i)) for i in range(plain.rows_per_epoch)]
    assert firsts == sorted(firsts)
    shuffled = RowStream(dataset, collator, seed=1)
    sample = [len(shuffled.row(i)) for i in range(shuffled.rows_per_epoch // 4)]
    everything = [len(shuffled.row(i)) for i in range(shuffled.rows_per_epoch)]
    assert np.mean(sample) == pytest.approx(np.mean(everything), rel=0.15)
