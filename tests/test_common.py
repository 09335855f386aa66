"""common.py against independent references: float64 definitions, closed forms, files read back."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
from common import Metrics, Ranks, Run

torch.set_num_threads(1)
torch.ones((), requires_grad=True).backward()  # after torch.compile a first one starts threads: no fork then
TRITON_CHILD = os.environ.get("COMMON_TEST_TRITON") == "1"  # the interpreter run of this file, see the last tests
BACKENDS = ["triton"] if TRITON_CHILD else ["torch"]
if torch.cuda.is_available() and not TRITON_CHILD:
    BACKENDS.append("triton")
DEVICE = {"torch": "cpu", "triton": "cpu" if TRITON_CHILD else "cuda"}
parent_only = pytest.mark.skipif(TRITON_CHILD, reason="kernels only in the interpreter run")


def rollout(T, N, seed, dtype=torch.float64, p=0.25):
    g = torch.Generator().manual_seed(seed)
    rewards, values, final_values = (torch.randn(T, N, generator=g, dtype=dtype) for _ in range(3))
    terminated, truncated = (torch.rand(T, N, generator=g) < p for _ in range(2))
    return rewards, values, terminated, truncated, final_values, torch.randn(N, generator=g, dtype=dtype)


def brute_force(rewards, values, terminated, truncated, final_values, last_value, gamma, lam):
    """The definition, not the recursion: A_t = sum_l (gamma lam)^l delta_{t+l}, up to the end of t's episode."""
    r, v, fin, last = (x.double().cpu().numpy() for x in (rewards, values, final_values, last_value))
    term, trunc = terminated.bool().cpu().numpy(), truncated.bool().cpu().numpy()
    T, N = r.shape
    A = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            ends = [k for k in range(t, T) if term[k, n] or trunc[k, n]]
            for k in range(t, (ends[0] if ends else T - 1) + 1):
                if term[k, n]:
                    after = 0.0
                elif trunc[k, n]:
                    after = fin[k, n]
                else:
                    after = v[k + 1, n] if k + 1 < T else last[n]
                A[t, n] += (gamma * lam) ** (k - t) * (r[k, n] + gamma * after - v[k, n])
    return torch.from_numpy(A)


def run_gae(data, gamma, lam, backend):
    moved = [x.to(DEVICE[backend]) for x in data]
    return tuple(x.cpu() for x in common.gae(*moved, gamma, lam, backend=backend))


# ---------------------------------------------------------------- gae


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T,N", [(1, 1), (1, 5), (2, 3), (9, 130), (17, 4)])
def test_gae_matches_the_definition(backend, T, N):
    for seed, (gamma, lam) in enumerate([(0.99, 0.95), (0.99**8, 0.95), (1.0, 1.0), (0.9, 0.0), (1, 1)]):
        for dtype in (torch.float64, torch.float32) if backend == "torch" else (torch.float32,):
            data = rollout(T, N, seed, dtype)
            advantages, returns = run_gae(data, gamma, lam, backend)
            tolerance = 1e-12 if dtype == torch.float64 and backend == "torch" else 2e-5
            torch.testing.assert_close(advantages.double(), brute_force(*data, gamma, lam), rtol=0, atol=tolerance)
            torch.testing.assert_close(returns, advantages + data[1].to(returns.dtype), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_lambda_one_is_the_return_minus_the_value(backend):
    data = rewards, values, terminated, truncated, final_values, last_value = rollout(12, 40, 3)
    gamma, G, expected = 0.97, last_value.clone(), torch.zeros(12, 40, dtype=torch.float64)
    for t in reversed(range(12)):  # discounted sum of rewards, restarted at every episode end
        G = torch.where(truncated[t], final_values[t], G)
        G = rewards[t] + gamma * torch.where(terminated[t], 0.0, G)
        expected[t] = G - values[t]
    assert (terminated & truncated).any() and (truncated & ~terminated).any()
    advantages, _ = run_gae(data, gamma, 1.0, backend)
    atol = 1e-12 if backend == "torch" else 2e-5
    torch.testing.assert_close(advantages.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_truncation_and_both_flags_by_hand(backend):
    column = lambda *x: torch.tensor(x, dtype=torch.float64)[:, None]  # noqa: E731
    rewards, values, final = column(1, 2, 3), column(10, 20, 30), column(100, 200, 300)
    none, middle = column(0, 0, 0), column(0, 1, 0)
    last = torch.tensor([40.0], dtype=torch.float64)
    by_hand = {  # gamma = 0.5, lam = 0.5; the last row is always 3 + 20 - 30 = -7
        "none": (none, none, [1 + 10 - 10 + 0.25 * (2 + 15 - 20 + 0.25 * -7), 2 + 15 - 20 + 0.25 * -7]),
        "truncated": (none, middle, [1 + 10 - 10 + 0.25 * 82, 2 + 100 - 20]),
        "terminated": (middle, none, [1 + 10 - 10 + 0.25 * -18, 2 - 20]),
        "both": (middle, middle, [1 + 10 - 10 + 0.25 * -18, 2 - 20]),
    }
    for name, (terminated, truncated, expected) in by_hand.items():  # float masks here, bool ones elsewhere
        advantages, _ = run_gae((rewards, values, terminated, truncated, final, last), 0.5, 0.5, backend)
        assert advantages[:, 0].tolist() == pytest.approx([*expected, -7], abs=1e-5), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_layout_mutation_and_unread_values(backend):
    data = rollout(6, 7, 5, torch.float32)
    expected = run_gae(data, 0.9, 0.9, backend)
    strided = [x.t().contiguous().t() if x.ndim == 2 else torch.stack([x, x], 1)[:, 0] for x in data]
    assert not strided[0].is_contiguous() and not strided[5].is_contiguous()
    for x, y in zip(run_gae(strided, 0.9, 0.9, backend), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    before = [x.clone() for x in data]
    run_gae(data, 0.9, 0.9, backend)
    assert all(torch.equal(x, y) for x, y in zip(data, before, strict=True))
    holes = [x.clone() for x in data]
    holes[4][~data[3] | data[2]] = math.nan  # final_values is read only where truncated and not terminated
    holes[5][data[2][-1] | data[3][-1]] = math.nan  # last_value only where the last step goes on
    for x, y in zip(run_gae(holes, 0.9, 0.9, backend), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_gae_is_detached_and_checks_shapes():
    data = rollout(4, 3, 0, torch.float32)
    values = data[1].clone().requires_grad_()
    advantages, returns = common.gae(data[0], values, *data[2:], 0.9, 0.9)
    assert not advantages.requires_grad and not returns.requires_grad and advantages.dtype == torch.float32
    for i in range(1, 6):  # last_value of another length, a transposed buffer
        wrong = list(data)
        wrong[i] = wrong[i][:-1] if i == 5 else wrong[i].t()
        with pytest.raises(ValueError, match="gae"):
            common.gae(*wrong, 0.9, 0.9)
    with pytest.raises(ValueError):
        common.gae(*(x[:0] if x.ndim == 2 else x for x in data), 0.9, 0.9)
    with pytest.raises(ValueError, match="backend"):
        common.gae(*data, 0.9, 0.9, backend="cuda")


# ---------------------------------------------------------------- group advantages


def brute_force_groups(returns, size, valid, normalize, eps):
    out, keep = [0.0] * len(returns), [False] * len(returns)
    for start in range(0, len(returns), size):
        members = [i for i in range(start, start + size) if valid[i]]
        group = [float(returns[i]) for i in members]
        if len(set(group)) < 2:
            continue
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / len(group))
        for i, x in zip(members, group, strict=True):
            out[i], keep[i] = (x - mean) / ((std + eps) if normalize else 1.0), True
    return torch.tensor(out, dtype=torch.float64), torch.tensor(keep)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size,groups", [(1, 3), (2, 9), (6, 10), (8, 5)])
def test_group_advantages_match_the_definition(backend, size, groups):
    for seed, normalize in ((0, False), (1, True)):
        for binary in (True, False):
            g = torch.Generator().manual_seed(seed)
            returns = torch.randn(size * groups, generator=g)
            returns = (returns > 0).float() if binary else returns
            valid = torch.rand(size * groups, generator=g) < 0.7
            returns[~valid] = math.nan  # a broken episode: never read
            moved = returns.to(DEVICE[backend]), size, valid.to(DEVICE[backend])
            advantages, keep = (x.cpu() for x in common.group_advantages(*moved, normalize, 1e-4, backend))
            expected, expected_keep = brute_force_groups(returns, size, valid, normalize, 1e-4)
            assert torch.equal(keep, expected_keep)
            torch.testing.assert_close(advantages.double(), expected, rtol=0, atol=2e-5)
            assert (advantages[~keep] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_advantages_equal_returns_are_exactly_zero(backend):
    # the float32 mean of seven times 0.1 need not be 0.1: a std threshold would call this group alive
    returns = torch.tensor([0.1] * 7 + [1.0] * 7 + [0.0] * 6 + [1e-3] + [16777216.0] * 7).to(DEVICE[backend])
    advantages, keep = (x.cpu() for x in common.group_advantages(returns, 7, normalize_std=True, backend=backend))
    assert keep.tolist() == [False] * 14 + [True] * 7 + [False] * 7
    assert (advantages[~keep] == 0).all() and (advantages[keep] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_advantages_binary_closed_form(backend):
    returns = torch.tensor([1.0, 0, 0, 0]).to(DEVICE[backend])  # p = 1/4: sqrt(3) and -1/sqrt(3), population std
    advantages, _ = common.group_advantages(returns, 4, normalize_std=True, eps=0.0, backend=backend)
    assert advantages.tolist() == pytest.approx([3**0.5] + [-(3**-0.5)] * 3, abs=1e-6)
    strided = torch.stack([returns, returns], 1)[:, 0]
    assert not strided.is_contiguous()
    mean_only, _ = common.group_advantages(strided, 4, backend=backend)
    assert mean_only.tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_group_advantages_checks_shapes():
    for returns, size, valid in ((torch.zeros(5), 2, None), (torch.zeros(4, 1), 2, None), (torch.zeros(0), 2, None),
                                 (torch.zeros(4), 0, None), (torch.zeros(4), 2, torch.ones(3))):  # fmt: skip
        with pytest.raises(ValueError, match="group_advantages"):
            common.group_advantages(returns, size, valid)


# ---------------------------------------------------------------- choice of path


@parent_only
def test_triton_kernels_in_the_interpreter():
    """The same tests, with the Triton kernels run on the CPU: the variable must be set before Triton is imported."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "COMMON_TEST_TRITON": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "14 passed" in done.stdout, done.stdout[-500:]


@parent_only
def test_triton_that_does_not_launch_is_replaced_by_torch(caplog, monkeypatch):
    """As in an image without a C compiler: one line, and the same numbers."""

    class Broken:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **kwargs):
            raise RuntimeError("Failed to find C compiler.")

    inputs = [x.float() if x.is_floating_point() else x for x in rollout(3, 4, 0)]
    expected = common.gae(*inputs, 0.9, 0.9), common.group_advantages(torch.arange(4.0), 2)
    monkeypatch.setattr(common, "_no_compiler", False)
    monkeypatch.setattr(common, "_named", set())
    monkeypatch.setattr(common, "_triton", lambda: dict.fromkeys(("gae", "group_advantages"), Broken()))
    kernel = common._kernel
    # "auto" asks for Triton on a GPU alone
    monkeypatch.setattr(common, "_kernel", lambda name, backend, x: None if common._no_compiler else kernel(name, "triton", x))
    for _ in range(2):
        found = common.gae(*inputs, 0.9, 0.9), common.group_advantages(torch.arange(4.0), 2)
        assert all(torch.equal(a, b) for x, y in zip(found, expected) for a, b in zip(x, y))
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line == "gae: torch path from now on, Triton does not launch (Failed to find C compiler.)"
    monkeypatch.setattr(common, "_no_compiler", False)
    with pytest.raises(RuntimeError, match="C compiler"):  # who asks for it is told
        common.gae(*inputs, 0.9, 0.9, backend="triton")


@parent_only
def test_path_is_named_once_and_triton_may_be_missing(caplog, monkeypatch):
    monkeypatch.setattr(common, "_named", set())
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton -> ImportError, as on a Mac
    common._triton.cache_clear()
    with caplog.at_level(logging.INFO, "common"):
        for _ in range(3):
            common.gae(*rollout(2, 2, 0), 0.9, 0.9)
            common.group_advantages(torch.arange(4.0), 2)
    assert [r.getMessage() for r in caplog.records] == ["gae: torch path (cpu)", "group_advantages: torch path (cpu)"]
    with pytest.raises(RuntimeError, match="not installed"):
        common.gae(*rollout(2, 2, 0), 0.9, 0.9, backend="triton")
    common._triton.cache_clear()


@parent_only
def test_import_is_light():
    code = "import sys, common; print([m for m in 'torch triton wandb matplotlib rich'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- Wilson, statistics, files


def test_success_rates_of_several_instructions():
    notes = {"b": "never seen", "c": "nor this"}
    found = common.success_rates(["a", "b", "c", "d"], [3.0, 0.0, 0.0, 0.0], [4.0, 6.0, 0.0, 6.0], notes)  # of c there was none
    assert found["mean"] == 0.3 and found["episodes"] == 10 and (found["low"], found["high"]) == common.wilson_interval(3, 10)
    each = {name: (x["mean"], x["episodes"], x.get("note")) for name, x in found["instructions"].items()}
    assert each == {"a": (0.75, 4, None), "b": (0.0, 6, "never seen"), "d": (0.0, 6, None)}
    low, high = common.wilson_interval(1, 2)
    assert common.success_rates(["a", "b"], [0.0, 1.0], [0.0, 2.0], notes)["episodes"] == 0
    assert common.success_rates(["b"], [1.0], [2.0], notes) == {"mean": 0.5, "low": low, "high": high, "episodes": 2}
    with make() as run:
        run.result(ode_success=found)
    assert "ode success: 0.300 " in (text := (run.dir / "log.txt").read_text()) and "    a: 0.750 [" in text
    assert "    b (never seen): 0.000 [" in text


def test_wilson_interval():
    # the bounds solve (p - q)^2 = z^2 q (1 - q) / n: checked by substitution, not by the same formula
    for k, n in ((1, 10), (39, 100), (9, 10)):
        for q in common.wilson_interval(k, n):
            assert (k / n - q) ** 2 == pytest.approx(1.96**2 * q * (1 - q) / n)
    low, high = common.wilson_interval(39, 100)
    assert low < 0.39 < high
    assert common.wilson_interval(0, 0) == (0.0, 1.0)
    assert common.wilson_interval(0, 20)[0] == 0.0 and common.wilson_interval(20, 20)[1] == 1.0
    for bad in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError):
            common.wilson_interval(*bad)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_and_the_old_folder(tmp_path):
    path, folder = tmp_path / "state.json", tmp_path / "step_000001"

    def half(tmp):
        assert tmp.parent == tmp_path and tmp.suffix == ".json"
        tmp.write_text("ha")
        full()

    common.atomic_write(path, lambda tmp: tmp.write_text("old"))
    common.replace_folder(folder, lambda partial: (partial / "old").touch())
    for attempt in (lambda: common.atomic_write(path, half), lambda: common.replace_folder(folder, full)):
        with pytest.raises(OSError, match="No space left"):
            attempt()
    assert path.read_text() == "old" and (folder / "old").exists()
    common.atomic_write(path, lambda tmp: tmp.write_text("new"))
    os.replace(folder, tmp_path / ".step_000001.old")  # killed between the two renames
    with pytest.raises(OSError):
        common.replace_folder(folder, full)
    assert path.read_text() == "new" and (folder / "old").exists()
    common.replace_folder(folder, lambda partial: (partial / "new").touch())
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["state.json", "step_000001", "step_000001/new"]


# ---------------------------------------------------------------- Metrics

ALONE = Ranks(0, 1)


def test_metrics_are_means_over_calls_groups_and_masks():
    log = Metrics("cpu", ALONE)
    x, groups = torch.tensor([[1.0, 2], [3, math.nan]]), torch.tensor([[0, 2], [2, 0]])
    inside = torch.tensor([[True, True], [True, False]])
    log.mean("x", x, where=inside, by=(groups, 4))
    log.mean("x", torch.tensor([10.0, 20.0]), by=(torch.tensor([2, 2]), 4))
    log.mean("share", torch.tensor([True, False, False, False]))
    log.mean("nothing", x, where=torch.zeros(2, 2, dtype=torch.bool))
    for part in ([1.0, -5.0], [4.0]):
        log.sum("sum", torch.tensor(part))
        log.max("max", torch.tensor(part))
    expected = {"x": 36 / 5, "x_k0": 1, "x_k2": 35 / 4, "share": 0.25, "sum": 0, "max": 4}  # group 1, 3: nobody
    assert log.read() == pytest.approx(expected)
    assert Metrics("cpu", ALONE).read() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["mean", "sum", "max"])
def test_a_number_that_is_not_finite_stops_the_run(kind, value):
    log = Metrics("cpu", ALONE)
    log.mean("update/fine", torch.ones(3))
    getattr(log, kind)("update/loss", torch.tensor([1.0, value]))
    with pytest.raises(SystemExit, match="^update/loss became nan or inf: lower --learning-rate"):
        log.read()


def on_two_ranks(target, *args) -> None:
    """Calls target(rank, *args) in two processes that are a gloo group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # a forked process need not import torch again; after CUDA has started it may not be forked
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    children = [context.Process(target=as_rank, args=(r, port, target, *args)) for r in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]


def as_rank(rank: int, port: int, target, *args) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    target(Ranks.start("cpu"), *args)


def metrics_of_a_rank(ranks: Ranks, folder: Path) -> None:
    log = Metrics("cpu", ranks)
    log.mean("both", torch.arange(2.0) + 10 * ranks.rank)
    log.max("max", torch.tensor(-1.0 - ranks.rank))
    if ranks.rank == 1:  # rank 0 has no samples, hence no such names
        log.mean("update/a", torch.tensor([1.0, 3.0]), by=(torch.tensor([0, 1]), 2))
        log.sum("sum", torch.tensor(4.0))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(log.read()))


def test_metrics_over_ranks_of_which_one_lacks_names(tmp_path):
    on_two_ranks(metrics_of_a_rank, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0] == pytest.approx({"both": 5.5, "max": -1, "update/a": 2, "update/a_k0": 1, "update/a_k1": 3, "sum": 4})


def drawn_groups() -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (6, 8) and their groups (4, 6, 8): one is empty, one has nothing among the last 4 columns, some are in none."""
    g = torch.Generator().manual_seed(3)
    x, of = 5 + torch.randn(6, 8, generator=g), torch.randint(0, 4, (6, 8), generator=g)  # 3: in none
    of[:, 4:][of[:, 4:] == 1] = 0
    return x, torch.stack([of == k for k in (0, 1, 9, 2)])


def moments_of_a_rank(ranks: Ranks, folder: Path) -> None:
    x, groups = drawn_groups()
    own = slice(4 * ranks.rank, 4 * ranks.rank + 4)
    torch.save(common.group_moments(x[:, own], groups[..., own], ranks), folder / f"{ranks.rank}.pt")


def test_moments_of_groups_match_numpy_on_one_rank_and_on_two(tmp_path):
    x, groups = drawn_groups()
    on_two_ranks(moments_of_a_rank, tmp_path)
    for found in (common.group_moments(x, groups, Ranks(0, 1)), *(torch.load(tmp_path / f"{r}.pt") for r in range(2))):
        for k, group in enumerate(groups):
            own = x[group].double().numpy()
            expected = [len(own), own.mean(), own.var()] if len(own) else [0, 0, 0]
            assert [float(y[k]) for y in found] == pytest.approx(expected, rel=1e-5), k


# ---------------------------------------------------------------- names and arguments of runs


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", "", "a b", "x\n"])
def test_a_name_is_that_of_a_folder_under_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        common.run_name(name)
    assert str(refused.value).startswith(f"--exp-name {name}: is the name of a folder under runs/")


def test_names_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.time, "strftime", lambda *_: "20260101-000000")
    assert common.run_name("mine-1.0@x=2") == "mine-1.0@x=2"
    names = []
    for _ in range(3):
        names.append(common.run_name(None, "grpo", "Task", 1))
        (tmp_path / "runs" / names[-1]).mkdir(parents=True)
    assert names == [f"grpo__Task__1__20260101-000000{end}" for end in ("", "_2", "_3")]
    (tmp_path / "runs/mine").mkdir()
    assert common.run_name("mine") == "mine"  # nothing in it yet
    (tmp_path / "runs/mine/metrics.jsonl").touch()
    assert common.run_name("mine") == "mine"  # it ended before its first iteration
    (tmp_path / "runs/mine/metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="^--exp-name mine: that run exists; take another name$"):
        common.run_name("mine")
    assert common.run_name(None, "grpo", resume="runs/mine/") == "mine"


def test_devices(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.pick_device("auto") == common.pick_device("cpu") == "cpu"
    for device, why in (("cuda:1", "torch sees no CUDA GPU here; use --device cpu"), ("gpu", "must be cpu, cuda")):
        with pytest.raises(SystemExit, match=f"^--device {device}: {why}"):
            common.pick_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.pick_device("auto") == "cuda:0" and common.pick_device("cuda:3") == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "1")  # every rank takes its own, though rank 0's is in a resumed run's arguments
    assert common.pick_device("cuda:0") == common.pick_device("auto") == "cuda:1" and common.pick_device("cpu") == "cpu"


@dataclass
class Flags:
    rate: float = 0.1
    hidden: tuple[int, ...] = (1, 2)
    resume: str | None = None


def test_saved_arguments_are_those_of_the_latest_checkpoint(tmp_path):
    def write(name: str, args):
        (tmp_path / name).write_text(json.dumps({"args": args}))

    run = str(tmp_path)
    with pytest.raises(SystemExit, match="^--resume .*: no args.json there"):
        common.saved_args(run, Flags)
    write("args.json", {"rate": 0.2, "hidden": [3]})
    with pytest.raises(SystemExit, match="no complete checkpoint"):
        common.saved_args(run, Flags)
    (tmp_path / "checkpoints/step_000001").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no complete checkpoint"):  # cut short
        common.saved_args(run, Flags)
    (tmp_path / "checkpoints/step_000001/trainer_state.pt").touch()
    assert common.saved_args(run, Flags) == Flags(0.2, (3,), run)
    write("args.resume1.json", {"rate": 0.9})  # of an attempt that went no further
    write("checkpoints/step_000001/args.json", {"rate": 0.4, "hidden": [3], "resume": "elsewhere"})
    assert common.saved_args(run, Flags) == Flags(0.4, (3,), run)
    for wrong in ({"group": 1}, [1]):
        write("checkpoints/step_000001/args.json", wrong)
        with pytest.raises(SystemExit, match="^--resume .*: its args.json is not of this version .*--checkpoint"):
            common.saved_args(run, Flags)


# ---------------------------------------------------------------- Run

METRICS = {
    "rollout/success": 0.25, "eval/ode_success": 0.5, "eval/episodes": 64, "update/kl_base": 0.0123, "update/clip_frac": 0.125,
    "update/loss": -0.5,
}  # fmt: skip
STAGES = {"env": 0.4, "policy": 0.4, "update": 0.2}  # of 1000 steps


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs are made in runs/ of the working directory; W&B only where a test asks for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def make(name="mine", ranks=ALONE, console=None, resume=None, **args) -> Run:
    args = {"seed": 1, "lr": 1e-4, "task": Path("a/b"), **args}
    return Run(args, __file__, ranks, name, 10, "cpu", resume, console)


def rows(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]


def save(run: Run, iteration: int, optimizer=None) -> None:
    optimizer = optimizer or torch.optim.SGD([torch.zeros(1)], 0.1)
    run.save(f"step_{iteration:06d}", lambda folder: (folder / "weights").write_text(str(iteration)), optimizer)


def test_provenance(tmp_path):
    with make() as run:
        made = run.dir
    args = json.loads((made / "args.json").read_text())
    assert args["args"] == {"seed": 1, "lr": 1e-4, "task": "a/b"} and args["command"] == shlex.join(sys.orig_argv)
    for name in ("common.py", "tests/test_common.py", "tasks/tabletop.py"):  # tasks are imported with the simulator
        assert (made / "source" / name).read_bytes() == (ROOT / name).read_bytes()
    text = (made / "provenance.json").read_text()
    provenance = json.loads(text)
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0] and provenance["cpu_count"] >= 1
    assert os.uname().nodename not in text
    outside = common.provenance(tmp_path, "cpu")  # in no repository
    assert outside["git_sha"] is None and outside["git_dirty"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "repo").mkdir()
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path / "repo", check=True)
    clean = common.provenance(tmp_path / "repo", "cpu")
    (tmp_path / "repo/s.py").write_text("")
    assert len(clean["git_sha"]) == 40 and clean["git_dirty"] is False
    assert common.provenance(tmp_path / "repo", "cpu")["git_dirty"] is True


def test_resume_goes_on_in_the_files_of_the_old_run(tmp_path, monkeypatch):
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], 0.1)
    with make() as run:
        for i in range(4):
            weight.sum().backward()
            optimizer.step()
            run.log(i, {"update/loss": float(i), "bad": math.nan}, STAGES, 1000)
            assert len(rows(run)) == i + 1  # flushed: a run killed now has lost nothing
            if i == 2:
                run.improved(0.5)
                run.result(before={"mean": 0.1, "low": 0.0, "high": 0.2, "episodes": 4})
                save(run, 3, optimizer)
                first = optimizer.state[weight]["exp_avg"].clone()
    assert rows(run)[0]["bad"] is None
    with open(run.dir / "metrics.jsonl", "a") as f:
        f.write('{"iteration": 4, "update/lo')  # SIGKILL in the middle of a line
    again, loaded = torch.optim.AdamW([weight], 0.1), []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with make(resume=str(tmp_path / "runs/mine"), lr=0.5) as run:
        assert not (tmp_path / "elsewhere/runs").exists()
        assert run.restore(lambda folder: loaded.append((folder / "weights").read_text())) == 3 and loaded == ["3"]
        run.restore_optimizer(again)
        assert torch.equal(again.state[weight]["exp_avg"], first)
        assert run.state["best"] == 0.5 and not run.improved(0.4) and run.improved(0.6)
        assert run.state["stages"]["env"] == pytest.approx(1.2) and run.state["elapsed"] > 0
        assert [row["iteration"] for row in rows(run)] == [0, 1, 2]
        run.log(3, {"update/loss": 7.0}, STAGES, 1000)
        run.result(after=1)
    assert [row["update/loss"] for row in rows(run)] == [0, 1, 2, 7]
    assert json.loads((run.dir / "args.resume3.json").read_text())["args"]["lr"] == 0.5
    assert json.loads((run.dir / "args.json").read_text())["args"]["lr"] == 1e-4
    assert json.loads((run.dir / "checkpoints/step_000003/args.json").read_text())["args"]["lr"] == 1e-4
    assert (run.dir / "source.resume3/common.py").exists() and (run.dir / "provenance.resume3.json").exists()
    summary = json.loads((run.dir / "summary.json").read_text())
    assert summary["before"]["mean"] == 0.1 and summary["after"] == 1 and summary["iterations"] == 4


@pytest.mark.parametrize("what", ["trainer_state.pt", "weights"])
def test_a_damaged_checkpoint_is_refused(what):
    with make() as run:
        run.log(0, {}, STAGES, 1000)
        save(run, 1)
    (run.dir / "checkpoints/step_000001" / what).write_text("")
    with pytest.raises(SystemExit, match="^--resume runs/mine: step_000001 does not load .*moving it away$") as refused:
        with make(resume="runs/mine") as run:
            run.restore(lambda folder: int((folder / "weights").read_text()))
    assert "\n" not in str(refused.value)


def test_checkpoints_are_whole_and_the_latest_two_stay():
    with make() as run:
        folder = run.dir / "checkpoints"
        assert common.latest_checkpoint(run.dir) is None
        for i in (1, 2, 3):
            run.log(i - 1, {}, STAGES, 1000)
            save(run, i)
        run.save("best", lambda partial: (partial / "weights").write_text("best"))
        assert sorted(p.name for p in folder.iterdir()) == ["best", "step_000002", "step_000003"]
        assert common.latest_checkpoint(run.dir) == folder / "step_000003" and not (folder / "best/trainer_state.pt").exists()
        for name in ("step_000004", "best"):
            run.save(name, lambda partial: ((partial / "weights").write_text("half"), full()))  # the run goes on
            said = (run.dir / "log.txt").read_text().splitlines()[-1]
            assert f"checkpoint {name} could not be written, earlier ones are kept" in said and "No space left" in said
        assert (folder / "best/weights").read_text() == "best"
    (folder / "step_000009").mkdir()  # partial ones: without the trainer's state, or not yet renamed
    (folder / ".step_000010.partial").mkdir()
    (folder / ".step_000010.partial/trainer_state.pt").touch()
    assert common.latest_checkpoint(run.dir) == folder / "step_000003"


def test_plain_line_and_events(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    with make() as run:
        run._loop, clock[0] = run._start, 1100.0
        run.log(0, METRICS | {"rollout/broken": 0.0}, STAGES, 1000)  # the first iteration took 100 s: 9 more are 900 s
        run.event("saved [checkpoint]")
        run.log(1, {"update/loss": 1.0, "rollout/broken": 0.25}, {}, 1000)
    first, event, second = capsys.readouterr().out.splitlines()
    for part in ("iteration 1/10", "steps 1k", "env/s 2.5k", "+policy/s 1.25k", "+train/s 1k", "success 0.250",
                 "eval 0.500", "KL 0.012", "clip 0.125", "loss -0.5", "elapsed 0:01:40", "ETA 0:15:00"):  # fmt: skip
        assert part in first, part
    assert event == "saved [checkpoint]" and event in (run.dir / "log.txt").read_text()
    assert "ETA 0:06:40" in second  # 100 s for two iterations, eight to go
    assert "loss 1" in second and "success" not in second and "\x1b" not in first
    assert "broken 25.00%" in second and "broken" not in first  # worlds that blew up are shown, their absence is not


def test_live_display():
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with make(console=console) as run:
        run.log(0, METRICS, STAGES, 1000)
        run.event("above the block")
        run.log(1, {"update/loss": 0.75}, STAGES, 1000)
    text = console.file.getvalue()
    for part in ("iteration 1/10", "iteration 2/10", "steps 1k", "env/s 2.5k", "+policy/s 1.25k", "+train/s 1k",
                 "success 0.250", "eval 0.500", "KL 0.012", "clip 0.125", "loss 0.75", "elapsed 0:00:0", "ETA",
                 "above the block", "━", "mine"):  # fmt: skip
        assert part in text, part
    assert "eval 0.500" in text[text.rindex("iteration 2/10") :]  # an evaluation stays on display until the next one
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_kernel_path_line_reaches_the_log(monkeypatch, capsys):
    monkeypatch.setattr(common, "_named", set())
    with make() as run:
        common.group_advantages(torch.arange(4.0), 2)
    common.gae(*rollout(2, 2, 0), 0.9, 0.9)  # after the run: nobody listens, nothing breaks
    assert (run.dir / "log.txt").read_text().endswith("group_advantages: torch path (cpu)\n")


def test_summary_of_a_run_and_a_full_disk(monkeypatch):
    with make(num_envs=4) as run:
        run.log(0, METRICS, STAGES, 1000)
        run.result(success=np.float32(0.5), nan=math.nan, list=torch.tensor([1, 2]))
        summary = json.loads((run.dir / "summary.json").read_text())
        assert {key: summary[key] for key in ("success", "nan", "list")} == {"success": 0.5, "nan": None, "list": [1, 2]}
        assert summary["script"] == "test_common" and summary["num_envs"] == 4 and summary["env_steps"] == 1000
        assert summary["steps_per_second"] == {"env": 2500, "policy": 1250, "train": 1000}
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run.result(success=1.0)
        assert json.loads((run.dir / "summary.json").read_text()) == summary and not list(run.dir.glob(".*.tmp*"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(SystemExit, match=r"^--exp-name mine: cannot write runs/mine \("):
        make().__enter__()


def test_an_exception_is_logged_and_passes():
    with pytest.raises(RuntimeError), make() as run:
        raise RuntimeError("broken")
    assert "stopped: RuntimeError: broken" in (run.dir / "log.txt").read_text()


def test_other_ranks_write_nothing(tmp_path, capsys):
    run = Run({}, __file__, ALONE, "mine", 10, "cpu")  # as rank 1 of 2, after the name was agreed on
    run.is_main = False
    with run:
        run.event("x")
        run.log(0, METRICS, STAGES, 1000)
        save(run, 1)
        run.gif("x", None)
        run.result(success=1)
    assert run.state["iteration"] == 1 and not (tmp_path / "runs").exists() and capsys.readouterr().out == ""


# ---------------------------------------------------------------- pictures


def test_curves(capsys):
    from PIL import Image

    with make() as run:
        run.curves()
        assert not (run.dir / "curves.png").exists()  # nothing to draw yet
        run.log(0, {"update/loss": 1.0}, {}, 100)
        run.curves()
        small = Image.open(run.dir / "curves.png").size
        for i in range(1, 4):
            run.log(i, {**METRICS, "eval/ode_success": i / 3}, STAGES, 100)
        run.curves()
        assert Image.open(run.dir / "curves.png").size[1] > small[1]  # one row of panels against three


def tiles(run: Run, name: str, **given):
    """Frames of a GIF of 4 frames of 5 episodes, as numbers: (frame, its 5 tiles (144, 192, 3))."""
    from PIL import Image

    frames = torch.full((4, 5, 48, 64, 3), 128, dtype=torch.uint8)
    frames += 10 * torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1, 1)
    run.gif(name, frames, **given)
    gif = Image.open(run.dir / f"videos/{name}.gif")
    strip = 14 + 14 * (len(set(given.get("texts", ()))) > 1)
    h, w, top = 48 * 3 + strip - 14, 64 * 3, 14  # 48 px -> x3 -> 144 >= 128
    assert gif.size == (3 * w, 2 * h + top)
    for f in range(gif.n_frames):
        gif.seek(f)
        pixels = np.asarray(gif.convert("RGB")).astype(int)
        yield pixels, [pixels[n // 3 * h + top + strip - 14 :, n % 3 * w :][:144, :192] for n in range(5)]


def test_a_film_stands_still_after_the_first_success():
    success = torch.zeros(4, 5, dtype=torch.bool)
    success[2:, 0], success[0, 2] = True, True
    with make() as run:
        shown = list(tiles(run, "group", success=success, texts=["lift the red cube"] * 5, every=8))
        assert len(shown) == 4
        for f, (pixels, five) in enumerate(shown):
            assert pixels[:14].max() > 200  # step and instruction
            for n, tile in enumerate(five):
                first = {0: 2, 2: 0}.get(n, 4)
                assert (tile[1, 96, 1] > tile[1, 96, 0] + 100) == (f >= first), (n, f)  # a green frame
                assert np.abs(tile[72, 96] - (128 + 10 * min(f, first))).max() < 5
        for _, five in tiles(run, "several", texts=["red", "blue", "red", "a very long instruction " * 9, "blue"]):
            assert all(np.abs(tile[2:4, 90] - 40).max() < 12 for tile in five)  # each below its own line of text
        for bad in ({"frames": torch.zeros(2, 1, 8, 8, 3)}, {"frames": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)},
                    {"frames": torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8), "success": success}):  # fmt: skip
            with pytest.raises(ValueError, match="gif"):
                run.gif("bad", **bad)


# ---------------------------------------------------------------- W&B


def test_wandb_offline_resume_and_failure(monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with make() as run:
        run_id = (run.dir / "wandb_id.txt").read_text().strip()
        assert run.wandb is not None and run.wandb.id == run_id
        run.log(0, METRICS, STAGES, 1000)
        run.gif("clip", np.zeros((2, 1, 8, 8, 3), np.uint8))
        run.result(success=1.0)
        save(run, 1)
    assert list(run.dir.glob("wandb/offline-run-*/run-*.wandb")) and list(run.dir.glob("wandb/**/*.gif"))
    out, err = capfd.readouterr()
    assert "wandb" not in out + err  # quiet: the terminal is the display's

    def broken(*_, **__):
        raise RuntimeError("no wandb today")

    with make(resume="runs/mine") as run:
        assert run.wandb.id == run_id
        run.wandb.finish()
        run.wandb = type("Broken", (), {"log": broken})()
        for i in (1, 2):
            run.log(i, METRICS, STAGES, 1000)
    assert [row["iteration"] for row in rows(run)] == [0, 1, 2]
    assert (run.dir / "log.txt").read_text().count("no wandb today") == 1


def test_wandb_that_does_not_start(monkeypatch, capsys):
    import wandb

    modes = []

    def init(**kwargs):
        modes.append(kwargs["mode"])
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.delenv("WANDB_MODE")
    with make() as run:
        run.log(0, METRICS, STAGES, 1000)
    assert modes == ["online", "offline"] and len(rows(run)) == 1
    assert "W&B did not start: RuntimeError: no network" in capsys.readouterr().out


@parent_only
@pytest.mark.parametrize("message", [5, 1 << 26])
def test_gradients_are_summed_in_messages(message, monkeypatch):
    """Of as many numbers as fit; a parameter without a gradient, or larger than a message, is among them."""
    monkeypatch.setattr(common, "MESSAGE", message)
    sent = []

    class Two(common.Ranks):  # whose other rank has the same gradients
        def reduce(self, x, maximum=False):
            sent.append(len(x))
            return x.mul_(2)

    parameters = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 2), (1,), (7,), (3,))]
    for i, p in enumerate(parameters):
        p.grad = None if i == 1 else torch.full_like(p, i + 1.0)
    Two(0, 2).sum_gradients(iter(parameters))
    assert [p.grad.unique().tolist() for p in parameters] == [[2.0], [0.0], [6.0], [8.0]]
    assert sent == ([5, 7, 3] if message == 5 else [15])
