"""benchmarks/ppo_vs_peers.py without a simulator: the recorder, the curves, the table."""

import importlib.util
import json
from pathlib import Path

import gymnasium as gym
import pytest
import torch

from benchmarks import ppo_vs_peers as peers

# (reward, terminated, truncated) of 2 environments, step by step
STEPS = [
    ([1.0, 10.0], [0, 0], [0, 0]),
    ([2.0, 20.0], [1, 0], [0, 0]),  # env 0: return 3, length 2
    ([4.0, 30.0], [0, 0], [0, 1]),  # env 1: return 60, length 3
    ([8.0, 40.0], [0, 0], [0, 0]),
    ([16.0, 50.0], [0, 0], [0, 0]),
    ([32.0, 60.0], [0, 0], [0, 0]),  # no end in these three
    ([64.0, 70.0], [1, 0], [1, 0]),  # env 0: both flags, one episode: 4+8+16+32+64 = 124, length 5
    ([0.5, 80.0], [1, 1], [0, 0]),  # env 0: 0.5, length 1; env 1: 40+50+60+70+80 = 300, length 5
    ([0.25, 90.0], [0, 0], [0, 0]),
]


class Clock:
    """A clock that moves when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Fake(gym.Env):
    """Plays STEPS, out of tensors that it writes again at every step; a step takes 0.25 s."""

    def __init__(self, clock: Clock):
        self.clock, self.t = clock, 0
        self.buffers = torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)

    def reset(self, **kwargs):
        return {}, {}

    def step(self, action):
        self.clock.now += 0.25
        for buffer, values in zip(self.buffers, STEPS[self.t % len(STEPS)]):
            buffer.copy_(torch.tensor(values))
        self.t += 1
        return {}, *self.buffers, {}


def record(steps: int, T: int = 3, sync=None, think: float = 0.5) -> list[dict]:
    """Rows of an agent that takes `think` seconds before each step."""
    clock, rows = Clock(), []

    def write(row: dict) -> None:
        rows.append(row)
        clock.now += 1000  # the recorder's own work must not count

    env = peers.Recorder(Fake(clock), T, write, sync, clock)
    env.reset()
    for _ in range(steps):
        clock.now += think
        env.step(None)
    return rows


def test_recorder_adds_up_episodes():
    rows = record(9)
    assert [(row["iteration"], row["env_steps"]) for row in rows] == [(1, 6), (2, 12), (3, 18)]
    assert [row["episodes"] for row in rows] == [2, 0, 3]
    assert [row["return_mean"] for row in rows] == [(3 + 60) / 2, None, (124 + 0.5 + 300) / 3]
    assert [row["length_mean"] for row in rows] == [(2 + 3) / 2, None, (5 + 1 + 5) / 3]


def test_recorder_writes_full_rollouts_only():
    assert len(record(8)) == 2


def test_recorder_clock():
    """The clock starts after the first step: two steps in the first row, three in the others."""
    rows = record(9)
    assert [row["env_seconds"] for row in rows] == [0.5, 0.75, 0.75]
    assert [row["wall"] for row in rows] == [2 * 0.75, 5 * 0.75, 8 * 0.75]
    assert not any(row["synced"] for row in rows)


def test_recorder_waits_for_a_device_in_every_second_row():
    waits = []
    rows = record(9, sync=lambda: waits.append(1))
    assert [row["synced"] for row in rows] == [False, True, False]
    assert [row["env_seconds"] for row in rows] == [None, 0.75, None]
    assert len(waits) == 3 + 2 * 3  # once per row, and around each step of the second


def test_recorder_in_and_out_of_inference_mode():
    clock, rows = Clock(), []
    env = peers.Recorder(Fake(clock), 3, rows.append, clock=clock)
    with torch.inference_mode():
        for _ in range(3):
            env.step(None)
    env.reset()
    for _ in range(3):
        env.step(None)
    assert [row["episodes"] for row in rows] == [2, 0]


def test_recorder_forgets_running_episodes_at_a_reset():
    clock, rows = Clock(), []
    env = peers.Recorder(Fake(clock), 3, rows.append, clock=clock)
    for t in range(9):
        if t == 6:
            env.reset()  # env 0 had 4+8+16+32 in 4 steps, env 1 40+50+60 in 3
        env.step(None)
    assert rows[2]["return_mean"] == pytest.approx((64 + 0.5 + 150) / 3)
    assert rows[2]["length_mean"] == pytest.approx((1 + 1 + 2) / 3)


def test_recorder_refuses_a_reset_inside_a_rollout():
    env = peers.Recorder(Fake(Clock()), 3, print)
    for _ in range(4):
        env.step(None)
    with pytest.raises(RuntimeError, match="middle of a rollout"):
        env.reset()


def test_recorder_begins_anew_at_a_reset_before_its_first_row():
    clock, rows = Clock(), []
    env = peers.Recorder(Fake(clock), 3, rows.append, clock=clock)
    env.step(None)
    clock.now += 100
    env.reset()
    for _ in range(3):
        env.step(None)
    assert [row["env_steps"] for row in rows] == [6] and rows[0]["wall"] < 100


# ---------------------------------------------------------------- curves


def rows_of(returns: list[float | None], episodes: list[int], wall: float = 2.0, env: float = 1.5, steps: int = 100) -> list:
    """Rows of equal length: `wall` seconds each, `env` of them in the environment."""
    return [
        {
            "iteration": i + 1, "env_steps": steps * (i + 1), "wall": wall * (i + 1), "env_seconds": env, "synced": False,
            "episodes": n, "return_mean": r, "length_mean": None if r is None else 5.0,
        }
        for i, (r, n) in enumerate(zip(returns, episodes))
    ]  # fmt: skip


def test_smoothing_weighs_by_episodes():
    points = peers.smooth(rows_of([1.0, 4.0, None, 10.0], [3, 1, 0, 9]), 2)
    assert points == [
        (200, 4.0, (3 * 1 + 1 * 4) / 4),
        (300, 6.0, 4.0),  # the empty row adds nothing
        (400, 8.0, 10.0),
    ]
    assert peers.smooth(rows_of([1.0, None, None, 2.0], [1, 0, 0, 1]), 2) == [(200, 4.0, 1.0), (400, 8.0, 2.0)]
    assert peers.smooth(rows_of([1.0, 3.0], [1, 1]), 10) == [(200, 4.0, 2.0)]  # shorter than the window
    assert peers.smooth([], 3) == []


def test_reach_is_the_first_point_at_the_target():
    points = peers.smooth(rows_of([1.0, 5.0, 2.0, 5.0], [1, 1, 1, 1]), 1)
    assert peers.reach(points, 5.0) == (200, 4.0, 5.0)
    assert peers.reach(points, 5.0001) is None
    assert peers.reach([], 0.0) is None


def test_window_is_the_same_in_env_steps():
    assert peers.window_rows(10, 16, 16) == 10
    assert peers.window_rows(10, 32, 16) == 5
    assert peers.window_rows(10, 8, 16) == 20
    assert peers.window_rows(1, 64, 16) == 1


def test_speed_leaves_the_first_rows_out():
    rows = rows_of([None] * 6, [0] * 6)
    for row, seconds in zip(rows, (90.0, 100.0, 110.0, 112.0, 115.0, 119.0)):
        row["wall"] = seconds
    assert peers.speed(rows) == ([1.5] * 3, [2.0, 3.0, 4.0], [0.5, 1.5, 2.5])
    rows[4] |= {"synced": True, "env_seconds": 2.75}
    rows[3]["env_seconds"] = rows[5]["env_seconds"] = None
    assert peers.speed(rows) == ([2.75], [2.0, 4.0], [0.25])
    assert peers.speed(rows_of([None] * 2, [0] * 2)) == ([1.5], [2.0], [0.5])  # too short to leave out three


@pytest.mark.parametrize(
    "x, text", [(0.0, "0"), (12345.6, "12,350"), (1234567.0, "1,235,000"), (3.14159, "3.142"), (-0.012345, "-0.01235")]
)
def test_number(x, text):
    assert peers.number(x) == text


# ---------------------------------------------------------------- table


def save(folder: Path, lib: str, seed: int, rows: list, T: int = 16, done: bool = True) -> None:
    meta = {
        "lib": lib, "version": "1.2", "task": "Isaac-Fake", "seed": seed, "num_envs": 100, "T": T, "same_settings": False,
        "assets": "stand-in assets", "machine": "a machine",
    }  # fmt: skip
    lines = [{"meta": meta}, *rows, *([{"done": True}] if done else [])]
    (folder / f"{lib}-s{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def results(tmp_path) -> Path:
    """rsl_rl reaches 100 with seed 1 and 90 with seed 2; skrl, of double rollout length, 98 and 97.9.

    Each row of rsl_rl is 2 s, 0.5 s of it overhead; of skrl 4 s and 0.5 s: half the overhead per step.
    """
    ones = [1] * 5
    save(tmp_path, "rsl_rl", 1, rows_of([0.0, 50.0, 98.0, 100.0, 95.0], ones, 2.0, 1.5, 1600))
    save(tmp_path, "rsl_rl", 2, rows_of([0.0, 50.0, 60.0, 90.0, 85.0], ones, 2.0, 1.5, 1600))
    save(tmp_path, "skrl", 1, rows_of([0.0, 0.0, 0.0, 98.0, 98.0], ones, 4.0, 3.5, 3200), T=32)
    save(tmp_path, "skrl", 2, rows_of([0.0, 0.0, 0.0, 97.9, 20.0], ones, 4.0, 3.5, 3200), T=32)
    save(tmp_path, "rl_games", 1, rows_of([1000.0], [1]), done=False)
    return tmp_path


def cells(text: str, lib: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {lib}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table(results, capsys):
    runs = peers.load(results)
    assert list(runs) == ["rsl_rl", "skrl"]
    assert "rl_games-s1.jsonl: not finished" in capsys.readouterr().out
    text = peers.table(runs, window=1)
    assert text.startswith("Isaac-Fake, N = 100, stand-in assets\n")
    assert "env steps to 98.00" in text  # of rsl_rl's best, 100
    assert cells(text, "rsl_rl") == [
        "rsl_rl 1.2", "1, 2", "16", "1,067", "800.0", "500.0 (500.0-500.0)", "1.00x", "100.0",
        "90.00 ± 7.071", "4,800, not reached", "6.0, not reached",
    ]  # fmt: skip
    assert cells(text, "skrl") == [
        "skrl 1.2", "1, 2", "32", "914.3", "800.0", "500.0 (500.0-500.0)", "0.50x", "98.00",
        "59.00 ± 55.15", "12,800, not reached", "16.0, not reached",
    ]  # fmt: skip


def test_table_of_negative_returns(tmp_path):
    """98% of a negative best is below it."""
    save(tmp_path, "rsl_rl", 1, rows_of([-80.0, -51.0, -50.0], [1] * 3, 2.0, 1.5, 1600))
    text = peers.table(peers.load(tmp_path), window=1)
    assert "env steps to -51.00" in text
    assert cells(text, "rsl_rl")[-2:] == ["3,200", "4.0"]


def test_table_without_the_reference_or_episodes(tmp_path):
    save(tmp_path, "skrl", 1, rows_of([None] * 5, [0] * 5, 2.0, 1.5, 1600))
    assert cells(peers.table(peers.load(tmp_path), window=1), "skrl")[-5:] == ["-", "-", "-", "not reached", "not reached"]


def test_report_writes_table_and_plot(results):
    (results / "command.txt").write_text("python benchmarks/ppo_vs_peers.py --num-envs 100\n")
    peers.report(results, window=2)
    text = (results / "table.md").read_text()
    assert "a machine" in text and "--num-envs 100" in text
    assert (results / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_an_empty_folder(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        peers.report(tmp_path, 10)


def test_missing_peers_are_skipped(monkeypatch, capsys):
    there = {"ppo_isaac", "rsl_rl"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    assert peers.available(("ppo_isaac", "rsl_rl", "skrl", "rl_games")) == ["ppo_isaac", "rsl_rl"]
    assert capsys.readouterr().out.splitlines() == ["skrl: not installed, skipped", "rl_games: not installed, skipped"]
