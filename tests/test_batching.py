"""Packing, dealing and the order of samples."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.batching import Schedule, best_fit_decreasing, cost, deal, idle_share

SCALE = 12.0 * 4096

capacities = st.integers(8, 64)
worlds = st.integers(1, 8)
packable = capacities.flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(1, capacity), min_size=1, max_size=60), st.just(capacity)
    )
)


def flat(bins) -> list[int]:
    """The items of all bins, sorted."""
    return sorted(itertools.chain.from_iterable(bins))


# --- best-fit decreasing -------------------------------------------------------------------


@given(packable)
def test_packing_is_a_partition(case):
    """Every item is in exactly one bin, and no bin is empty."""
    lengths, capacity = case
    bins = best_fit_decreasing(lengths, capacity)
    assert flat(bins) == list(range(len(lengths)))
    assert all(bins)


@given(packable)
def test_no_bin_holds_more_than_its_capacity(case):
    """Capacity is in the same unit as the lengths."""
    lengths, capacity = case
    bins = best_fit_decreasing(lengths, capacity)
    assert max(sum(lengths[i] for i in items) for items in bins) <= capacity


@given(packable)
def test_packing_wastes_no_bin(case):
    """No two bins could be joined: a bin is only opened for an item that fits into no other."""
    lengths, capacity = case
    bins = best_fit_decreasing(lengths, capacity)
    loads = sorted(sum(lengths[i] for i in items) for items in bins)
    assert len(loads) == 1 or loads[0] + loads[1] > capacity


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([4, 8, 1, 4, 2, 1], 10, [[1, 4], [0, 3, 2, 5]]),
        # Both 5 and 6 leave room for 4: it goes where less is left.
        ([5, 6, 4], 10, [[1, 2], [0]]),
        # Equal lengths keep their order.
        ([3, 3, 3], 3, [[0], [1], [2]]),
        ([], 5, []),
        ([5], 5, [[0]]),
    ],
)
def test_the_longest_is_packed_first_into_the_fullest_bin_with_room(lengths, capacity, expected):
    """What best-fit decreasing means, ties included."""
    assert best_fit_decreasing(lengths, capacity) == expected


def test_an_item_larger_than_a_bin_is_refused():
    """It would otherwise make a bin that is too full."""
    with pytest.raises(ValueError, match="item of 9 does not fit into 8"):
        best_fit_decreasing([1, 9], 8)


# --- dealing -------------------------------------------------------------------------------


@given(packable, worlds)
def test_dealing_is_a_partition(case, world):
    """Every sample of the step is computed exactly once."""
    lengths, capacity = case
    dealt = deal(lengths, world_size=world, micro_batch_tokens=capacity, attention_scale=SCALE)
    assert flat(itertools.chain.from_iterable(dealt)) == list(range(len(lengths)))


@given(packable, worlds)
def test_no_micro_batch_holds_more_tokens_than_allowed(case, world):
    """micro_batch_tokens is the memory knob, so it is never exceeded."""
    lengths, capacity = case
    dealt = deal(lengths, world_size=world, micro_batch_tokens=capacity, attention_scale=SCALE)
    assert all(sum(lengths[i] for i in items) <= capacity for ranks in dealt for items in ranks)


@given(packable, worlds)
def test_every_rank_has_the_same_and_the_least_number_of_micro_batches(case, world):
    """Engines meet at every micro-batch; as few as best-fit decreasing needs."""
    lengths, capacity = case
    dealt = deal(lengths, world_size=world, micro_batch_tokens=capacity, attention_scale=SCALE)
    assert {len(ranks) for ranks in dealt} == {world}
    assert len(dealt) == math.ceil(len(best_fit_decreasing(lengths, capacity)) / world)


@given(packable, worlds)
def test_dealing_depends_on_nothing_else(case, world):
    """All ranks compute it by themselves and must come to the same."""
    lengths, capacity = case
    settings = {"world_size": world, "micro_batch_tokens": capacity, "attention_scale": SCALE}
    assert deal(lengths, **settings) == deal(tuple(lengths), **settings)


def test_bins_of_like_cost_meet_in_one_micro_batch():
    """Loads of 90, 75, 60 and 50 on two ranks: the two heavy ones together, then the others."""
    lengths = [90, 60, 50, 40, 35]
    dealt = deal(lengths, world_size=2, micro_batch_tokens=100, attention_scale=SCALE)
    assert dealt == [[[0], [3, 4]], [[1], [2]]]


def test_a_rank_without_samples_has_an_empty_list():
    """One sample on three ranks: the other two take part with nothing."""
    dealt = deal([5], world_size=3, micro_batch_tokens=8, attention_scale=SCALE)
    assert sorted(dealt[0]) == [[], [], [0]]
    assert len(dealt) == 1


def test_levelling_gives_way_to_capacity():
    """20 tokens fill two bins of 10 exactly; spreading the load would need a bin of 11."""
    lengths = [5, 5, 4, 3, 3]
    dealt = deal(lengths, world_size=1, micro_batch_tokens=10, attention_scale=SCALE)
    assert [sum(lengths[i] for i in ranks[0]) for ranks in dealt] == [10, 10]


def naive(lengths: list[int], world: int, capacity: int) -> list[list[list[int]]]:
    """Fill micro-batches in the given order, and hand them out in turn."""
    bins: list[list[int]] = [[]]
    for item, length in enumerate(lengths):
        if sum(lengths[i] for i in bins[-1]) + length > capacity:
            bins.append([])
        bins[-1].append(item)
    bins += [[] for _ in range(-len(bins) % world)]
    return [bins[start : start + world] for start in range(0, len(bins), world)]


def test_levelling_beats_the_order_of_the_file():
    """A fixed step with short and long conversations on four ranks."""
    lengths = [(37 * i * i + 11 * i) % 2000 + 20 for i in range(64)]
    dealt = deal(lengths, world_size=4, micro_batch_tokens=4096, attention_scale=SCALE)
    plain = naive(lengths, 4, 4096)
    assert idle_share(dealt, lengths, SCALE) < 0.02
    assert idle_share(plain, lengths, SCALE) > 0.05
    assert len(dealt) <= len(plain)


def test_levelling_counts_attention():
    """One sample of 1,000 tokens costs more than ten of 100."""
    assert cost(1000, 5000) == pytest.approx(1200)
    assert 10 * cost(100, 5000) == pytest.approx(1020)


# --- idle share ----------------------------------------------------------------------------


@given(packable, worlds)
def test_an_idle_share_is_a_share(case, world):
    """Not below 0, and less than 1: at least one rank of each micro-batch works."""
    lengths, capacity = case
    dealt = deal(lengths, world_size=world, micro_batch_tokens=capacity, attention_scale=SCALE)
    share = idle_share(dealt, lengths, SCALE)
    assert 0 <= share <= 1 - 1 / world + 1e-9


def test_equal_loads_do_not_wait():
    """Exactly nothing: a share of -1e-16 would be printed as -0.0%."""
    shares = [idle_share([[[0]] * world], [7], SCALE) for world in range(1, 65)]
    assert [share for share in shares if not 0 <= share < 1e-9] == []


def test_idle_share_of_known_cases():
    """One rank of two has nothing: half; 3 beside 1: 2 of 6; then 2 beside 2: 2 of 10."""
    assert idle_share([[[0], []]], [5], SCALE) == pytest.approx(0.5)
    assert idle_share([[[0], [1]]], [3, 1], math.inf) == pytest.approx(1 / 3)
    assert idle_share([[[0], [1]], [[2], [3]]], [3, 1, 2, 2], math.inf) == pytest.approx(0.2)
    assert idle_share([], [], SCALE) == 0


# --- schedule ------------------------------------------------------------------------------


def schedule(count: int = 10, **changes) -> Schedule:
    """Ten samples of 1 to 10 tokens, 4 a step, 2 epochs."""
    values = {
        "sample_count": count,
        "fingerprint": "f",
        "seed": 0,
        "batching": "conversations",
        "global_batch_size": 4,
        "num_train_epochs": 2,
        "max_steps": None,
        "seq_len": 10,
        "lengths": list(range(1, count + 1)),
    }
    return Schedule(**(values | changes))


def samples(plan: Schedule, step: int) -> list[int]:
    """The samples of a step in its order."""
    return [i for unit in plan.step(step) for i in unit]


def epoch(plan: Schedule, number: int) -> list[int]:
    """The samples of an epoch in its order."""
    first = number * plan.steps_per_epoch
    steps = range(first, first + plan.steps_per_epoch)
    return [i for step in steps for i in samples(plan, step)]


# Made once, by Python 3.11.
GOLDEN = {
    "conversations": [[8, 2, 0, 5], [6, 3, 4, 1], [9, 7], [1, 9, 2, 4], [5, 8, 0, 3], [7, 6]],
    "rows": [
        [[5, 3], [8, 0], [7, 1], [9]],
        [[4], [6, 2]],
        [[7, 1], [5, 3], [9], [8, 0]],
        [[4], [6, 2]],
    ],
}

schedules = st.builds(
    lambda lengths, batching, size, seed: schedule(
        len(lengths),
        lengths=lengths,
        batching=batching,
        global_batch_size=size,
        seed=seed,
        num_train_epochs=3,
        seq_len=32,
    ),
    st.lists(st.integers(1, 32), min_size=1, max_size=40),
    st.sampled_from(["conversations", "rows"]),
    st.integers(1, 12),
    st.integers(0, 2**32),
)


@given(schedules)
def test_every_sample_is_trained_on_once_an_epoch(plan):
    """In both kinds of batching, in every epoch."""
    for number in range(3):
        assert sorted(epoch(plan, number)) == list(range(plan.sample_count))


@given(schedules)
def test_every_step_is_full_but_the_last_of_an_epoch(plan):
    """The epoch's tail is a smaller step; nothing is dropped or filled up."""
    sizes = [len(plan.step(step)) for step in range(plan.steps_per_epoch)]
    assert sizes[:-1] == [plan.global_batch_size] * (len(sizes) - 1)
    assert sizes[-1] == plan.units - sum(sizes[:-1]) > 0


@given(schedules)
def test_a_step_can_be_asked_for_by_itself(plan):
    """Resuming at step n needs none of the steps before it."""
    fresh = dataclasses.replace(plan)
    backwards = [plan.step(step) for step in reversed(range(plan.steps))]
    assert [fresh.step(step) for step in range(plan.steps)] == backwards[::-1]


@given(schedules)
def test_a_unit_of_rows_fits_into_a_row(plan):
    """A row has at most seq_len tokens; a conversation is a unit by itself."""
    units = [unit for step in range(plan.steps_per_epoch) for unit in plan.step(step)]
    if plan.batching == "rows":
        assert all(sum(plan.lengths[i] for i in unit) <= plan.seq_len for unit in units)
    else:
        assert all(len(unit) == 1 for unit in units)


def test_the_order_does_not_know_the_number_of_ranks():
    """It is a function of data, seed and epoch alone; a resume may use other ranks."""
    names = {field.name for field in dataclasses.fields(Schedule)}
    assert not [name for name in names if "world" in name or "rank" in name or "process" in name]


def test_the_batch_size_does_not_change_the_order():
    """Only where it is cut."""
    assert epoch(schedule(), 0) == epoch(schedule(global_batch_size=3), 0)


@pytest.mark.parametrize("batching", ["conversations", "rows"])
def test_epochs_seeds_and_data_have_orders_of_their_own(batching):
    """Forty samples: equal orders would be no accident."""
    lengths = [10] * 40
    plans = [
        schedule(40, lengths=lengths, batching=batching, **change)
        for change in ({}, {"seed": 1}, {"fingerprint": "g"})
    ]
    orders = [tuple(epoch(plan, number)) for plan in plans for number in (0, 1)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_the_same_inputs_give_the_same_order():
    """The order is never stored: a resumed run computes it anew."""
    assert epoch(schedule(), 1) == epoch(schedule(), 1)


def test_the_order_is_the_one_of_earlier_versions():
    """A change of Python or of this code would resume a run with other conversations."""
    plan = schedule()
    assert [samples(plan, step) for step in range(6)] == GOLDEN["conversations"]
    rows = schedule(batching="rows")
    assert [rows.step(step) for step in range(rows.steps)] == GOLDEN["rows"]


def test_steps_are_counted_over_all_epochs():
    """10 samples, 4 a step: 3 steps an epoch, 6 in 2 epochs."""
    plan = schedule()
    assert (plan.units, plan.steps_per_epoch, plan.steps) == (10, 3, 6)
    assert [plan.epoch(done) for done in (0, 3, 6)] == [0, 1, 2]


def test_a_step_may_be_larger_than_an_epoch():
    """All samples are then one step."""
    plan = schedule(global_batch_size=128)
    assert (plan.steps_per_epoch, plan.steps) == (1, 2)
    assert len(plan.step(1)) == 10


def test_max_steps_takes_the_place_of_epochs():
    """Fewer steps than an epoch, or more than num_train_epochs would give."""
    assert schedule(max_steps=2).steps == 2
    plan = schedule(max_steps=8)
    assert plan.steps == 8
    assert [samples(plan, step) for step in range(6)] == GOLDEN["conversations"]
    third = [*samples(plan, 6), *samples(plan, 7)]
    assert len(set(third)) == 8
    assert samples(plan, 6) != samples(plan, 0)


def test_rows_pack_an_epoch_into_fewer_units():
    """55 tokens in rows of 10 are 6 rows, where conversations are 10."""
    plan = schedule(batching="rows")
    assert plan.units == 6
    assert (plan.steps_per_epoch, plan.steps) == (2, 4)


def test_conversations_need_no_lengths():
    """With preprocess: lazy nothing is tokenised yet, and the order is the same."""
    assert epoch(schedule(lengths=None), 0) == epoch(schedule(), 0)


def test_rows_need_lengths():
    """They are packed from them."""
    with pytest.raises(ValueError, match="rows are packed from lengths"):
        schedule(batching="rows", lengths=None)
