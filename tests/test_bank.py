"""The bank of starts: what is drawn, what is counted, what is kept; without a simulator."""

import pytest
import torch
from tensordict import TensorDict

from common import Metrics, Ranks, StartBank
from tests.test_common import on_two_ranks

ALONE = Ranks(0, 1)


def fresh(prompts, at: float = 0.0) -> TensorDict:
    """Starts with these instructions, whose one coordinate is `at`, `at` + 1, ..."""
    n = len(prompts)
    scene = {"cube": {"pose": at + torch.arange(float(n))[:, None]}}
    return TensorDict({"scene": scene, "prompt": torch.tensor(prompts)}, n)


def where(states: TensorDict) -> list[float]:
    return states["scene", "cube", "pose"][:, 0].tolist()


def play(bank: StartBank, starts: TensorDict, won: list[int], group: int = 4, seed: int = 0, noted=None) -> tuple:
    """An iteration in which the groups have so many successes: (where they began, its figures)."""
    begun, log = bank.draw(starts, seed), Metrics("cpu", bank.ranks)
    success = torch.arange(group).repeat(len(won)) < torch.tensor(won).repeat_interleave(group)
    if noted is not None:
        bank.note(*noted)
    bank.record(success, group, log)
    return begun, log.read()


def entry(bank: StartBank, at: float) -> dict[str, float]:
    row = where(bank.entries).index(at)
    return {name: float(bank.entries[name][row]) for name in ("prompt", "successes", "attempts", "midway")}


def test_counts_and_chances():
    """By hand: counts fade by 0.9; p of an instruction has the prior (1, 2), that of an entry its instruction's."""
    bank = StartBank(3, 2, 0.0, "cpu", ALONE)
    assert bank.chances.tolist() == [0.5] * 3
    _, figures = play(bank, fresh([0, 1], at=1.0), [3, 0])
    play(bank, fresh([0, 0], at=11.0), [4, 0])
    counts = torch.tensor([[0.9 * 3 + 4, 0.0, 0.0], [0.9 * 4 + 8, 0.9 * 4, 0.0]])
    torch.testing.assert_close(bank.counts, counts)
    q = (0.9 * 3 + 4 + 1) / (0.9 * 4 + 8 + 2)
    assert bank.chances[0] == pytest.approx(q) and bank.chances[2] == 0.5
    assert entry(bank, 1.0) == pytest.approx({"prompt": 0, "successes": 2.7, "attempts": 3.6, "midway": 0})
    p = (2.7 + 2 * q) / (3.6 + 2)
    row = where(bank.entries).index(1.0)
    assert bank.value(bank.entries)[row] == pytest.approx(p * (1 - p))
    assert figures["curriculum/share_k0"] == figures["curriculum/share_k1"] == 0.5 and figures["curriculum/share_k2"] == 0
    assert figures["curriculum/chance_k0"] == pytest.approx(4 / 6) and figures["curriculum/midway"] == 0


def test_instructions_are_asked_for_by_what_can_be_learned():
    bank = StartBank(3, 3, 0.0, "cpu", ALONE)
    play(bank, fresh([0, 1, 2]), [8, 4, 0], group=8)
    p = torch.tensor([9 / 10, 5 / 10, 1 / 10])
    value = p * (1 - p)
    torch.testing.assert_close(bank.asked(), 0.8 * value / value.sum() + 0.2 / 3)


def test_entries_are_drawn_in_proportion_and_never_twice():
    """An exponential race: the first of an ordered draw without replacement has exactly the weights."""
    bank = StartBank(1, 4, 0.5, "cpu", ALONE)
    play(bank, fresh([0] * 4, at=1.0), [0, 2, 3, 4])
    weights, n = bank.weights(bank.value(bank.entries)), 1000
    assert (weights > 0).sum() == 4 and float(weights.sum()) == pytest.approx(1)
    draws = torch.zeros(16)
    for seed in range(n):
        begun = bank.draw(fresh([0] * 4, at=100.0), seed)
        assert where(begun)[2:] == [102.0, 103.0] and len(set(where(begun)[:2])) == 2
        draws[bank.drawn[0]] += 1
    error = (weights * (1 - weights) / n).sqrt()
    assert ((draws / n - weights).abs() <= 4 * error).all() and (draws[weights == 0] == 0).all()
    again = bank.draw(fresh([0] * 4, at=100.0), 7)
    assert where(bank.draw(fresh([0] * 4, at=100.0), 7)) == where(again)  # a function of the seed


def test_what_teaches_more_takes_the_place_of_what_teaches_least():
    bank = StartBank(1, 1, 0.0, "cpu", ALONE)  # four entries
    for at, won in ((1.0, 0), (2.0, 5), (3.0, 4), (4.0, 8)):
        play(bank, fresh([0], at), [won], group=8)
    assert sorted(where(bank.entries)) == [1.0, 2.0, 3.0, 4.0]
    least = where(bank.entries)[int(bank.value(bank.entries).argmin())]
    play(bank, fresh([0], 5.0), [4], group=8)
    assert set(where(bank.entries)) == {1.0, 2.0, 3.0, 4.0, 5.0} - {least}
    before = bank.entries.clone()
    play(bank, fresh([0], 6.0), [0] if bank.chances[0] < 0.5 else [8], group=8)
    assert where(bank.entries) == where(before)  # nothing to learn there

    bank = StartBank(1, 2, 0.0, "cpu", ALONE)  # eight
    for i, won in enumerate(([1, 4], [4, 5], [3, 4], [5, 4])):
        play(bank, fresh([0, 0], at=10.0 * i), won, group=8)
    play(bank, fresh([0, 0], at=100.0), [0, 3], group=8)  # the better one meets the worst entry
    assert set(where(bank.entries)) == {1.0, 10.0, 11.0, 20.0, 21.0, 30.0, 31.0, 101.0}


def test_only_fresh_starts_tell_how_an_instruction_does():
    bank = StartBank(1, 2, 0.5, "cpu", ALONE)
    play(bank, fresh([0, 0], at=1.0), [2, 2])
    counts = bank.counts.clone()
    begun, _ = play(bank, fresh([0, 0], at=11.0), [4, 1])
    torch.testing.assert_close(bank.counts, 0.9 * counts + torch.tensor([[1.0], [4.0]]))
    assert entry(bank, where(begun)[0]) == pytest.approx({"prompt": 0, "successes": 1.8 + 4, "attempts": 3.6 + 4, "midway": 0})


def test_states_in_mid_episode_of_mixed_groups_become_entries():
    """The one whose outcome surprises most, of those still running; it counts as one attempt."""
    bank = StartBank(2, 3, 0.0, "cpu", ALONE)
    play(bank, fresh([0, 1, 0], at=1.0), [1, 3, 0])  # instruction 0 succeeds in 1 of 8, instruction 1 in 3 of 4
    middle = fresh([0] * 4 + [1] * 4 + [0] * 4, at=100.0)
    running = torch.ones(12, dtype=torch.bool)
    running[7] = False  # the one failure of its group: over before its state was noted
    _, figures = play(bank, fresh([0, 1, 0], at=11.0), [1, 3, 0], noted=(middle, running))
    midway = {at for at, x in zip(where(bank.entries), bank.entries["midway"].tolist()) if x}
    assert midway == {100.0, 104.0}  # the success where most fail, the first success of the others; no group without both
    assert entry(bank, 100.0) == {"prompt": 0, "successes": 1, "attempts": 1, "midway": 1}
    assert entry(bank, 104.0) == {"prompt": 1, "successes": 1, "attempts": 1, "midway": 1}
    play(bank, fresh([0, 1, 0], at=21.0), [0, 3, 0], noted=(fresh([0] * 4 + [1] * 4 + [0] * 4, at=200.0), torch.ones(12) > 0))
    assert entry(bank, 207.0) == {"prompt": 1, "successes": 0, "attempts": 1, "midway": 1}  # the failure where most succeed
    assert bank.noted is None and figures["curriculum/midway"] == 0


def test_a_loaded_bank_goes_on_alike(tmp_path):
    bank, twin = (StartBank(2, 4, 0.5, "cpu", ALONE) for _ in range(2))
    for i in range(3):
        play(bank, fresh([0, 1, 0, 1], at=10.0 * i), [1, 3, 0, 2], seed=i)
    torch.save(bank.state(), tmp_path / "bank.pt")
    twin.load(torch.load(tmp_path / "bank.pt", weights_only=True))
    for i in range(3, 6):
        starts = fresh([0, 1, 0, 1], at=10.0 * i)
        one, two = (play(b, starts, [1, 2, 3, 4], seed=i) for b in (bank, twin))
        assert where(one[0]) == where(two[0]) and one[1] == two[1]
    assert all(torch.equal(x, y) for x, y in zip(bank.entries.values(True, True), twin.entries.values(True, True)))


def of_a_rank(ranks: Ranks) -> None:
    bank = StartBank(2, 1, 0.0, "cpu", ranks)
    play(bank, fresh([ranks.rank], at=1.0 + ranks.rank), [1 + ranks.rank])
    assert bank.counts.tolist() == [[1.0, 2.0], [4.0, 4.0]]  # of both
    assert where(bank.entries)[:] == [1.0 + ranks.rank, 0.0, 0.0, 0.0]  # its own


def test_ranks_count_together_and_keep_their_own():
    on_two_ranks(of_a_rank)
