"""common.py against independent references: float64 definitions, closed forms, files read back."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

torch.set_num_threads(1)
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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "14 passed" in done.stdout, done.stdout[-500:]


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


# ---------------------------------------------------------------- Wilson, files


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


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    path = tmp_path / "state.json"
    common.atomic_write_text(path, "old")

    def full(tmp):
        assert tmp.parent == tmp_path and tmp.suffix == ".json"
        tmp.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        common.atomic_write(path, full)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["state.json"]
    common.atomic_write_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["state.json"]


# ---------------------------------------------------------------- RunLogger

METRICS = {
    "env_steps": 12345, "sps/env": 2500.0, "sps/policy": 1500.0, "sps/train": 900.0, "rollout/success": 0.25,
    "eval/ode_success": 0.5, "eval/episodes": 64, "update/kl_base": 0.0123, "update/clip_frac": 0.125,
    "update/loss": -0.5, "time/elapsed": 3725.0,
}  # fmt: skip


def make(run_dir, **kwargs):
    kwargs = {"script": __file__, "total_iterations": 10, "track": False, **kwargs}
    return common.RunLogger(run_dir, {"seed": 1, "lr": 1e-4, "task": Path("a/b")}, **kwargs)


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_provenance(tmp_path):
    other = tmp_path / "net.py"
    other.write_text("x = 1\n")
    make(tmp_path / "run", sources=[other]).close()
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert args["args"] == {"seed": 1, "lr": 1e-4, "task": "a/b"} and args["command"] == shlex.join(sys.orig_argv)
    for name, origin in (("test_common.py", __file__), ("common.py", common.__file__), ("net.py", other)):
        assert (tmp_path / "run/source" / name).read_bytes() == Path(origin).read_bytes()
    text = (tmp_path / "run/provenance.json").read_text()
    provenance = json.loads(text)
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0] and provenance["cpu_count"] >= 1
    assert os.uname().nodename not in text
    outside = common._provenance(other, "cpu")  # tmp_path is in no repository
    assert outside["git_sha"] is None and outside["git_dirty"] is None
    repo = tmp_path / "repo"
    repo.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], cwd=repo, check=True)
    clean = common._provenance(repo / "s.py", "cpu")
    (repo / "s.py").write_text("")
    assert len(clean["git_sha"]) == 40 and clean["git_dirty"] is False
    assert common._provenance(repo / "s.py", "cpu")["git_dirty"] is True


def test_metrics_resume_and_partial_line(tmp_path, capsys):
    logger = make(tmp_path)
    for i in range(4):
        logger.log(i, {**METRICS, "update/loss": torch.tensor(float(i)), "bad": math.nan, "none": None})
        assert len(rows(tmp_path)) == i + 1  # flushed: a run killed now has lost nothing
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"iteration": 4, "update/lo')  # SIGKILL in the middle of a line
    logger = make(tmp_path, resume_iteration=3)
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1, 2]
    logger.log(3, {"update/loss": 7.0})
    logger.close()
    assert [row["update/loss"] for row in rows(tmp_path)] == [0, 1, 2, 7]
    assert rows(tmp_path)[0]["bad"] is None and "none" not in rows(tmp_path)[0]
    assert (tmp_path / "args.resume3.json").exists() and (tmp_path / "source.resume3/common.py").exists()
    make(tmp_path).close()  # a fresh start in the same folder loses nothing
    assert rows(tmp_path) == [] and len(list(tmp_path.glob("metrics.*.old.jsonl"))) == 1


def test_plain_line_and_events(tmp_path, capsys):
    logger = make(tmp_path, total_iterations=5)
    logger._start -= 100.0  # as if the first iteration had taken 100 s: 4 more are 400 s
    logger.log(0, METRICS)
    logger.event("saved [checkpoint]")
    logger.log(1, {"update/loss": math.inf})
    logger.close()
    first, event, second = capsys.readouterr().out.splitlines()
    for part in ("iteration 1/5", "steps 12.3k", "env/s 2.5k", "+policy/s 1.5k", "+train/s 900", "success 0.250",
                 "eval 0.500", "KL 0.012", "clip 0.125", "loss -0.5", "elapsed 1:02:05", "ETA 0:06:4"):  # fmt: skip
        assert part in first, part
    assert event == "saved [checkpoint]" and event in (tmp_path / "log.txt").read_text()
    assert "ETA 0:02:3" in second  # 100 s for two iterations, three to go
    assert "loss inf" in second and "success" not in second and "\x1b" not in first


def test_live_display(tmp_path):
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    logger = make(tmp_path, console=console)
    logger.log(0, METRICS)
    logger.event("above the block")
    logger.log(1, {"update/loss": 0.75})
    logger.close()
    text = console.file.getvalue()
    for part in ("iteration 1/10", "iteration 2/10", "steps 12.3k", "env/s 2.5k", "+policy/s 1.5k", "+train/s 900",
                 "success 0.250", "eval 0.500", "KL 0.012", "clip 0.125", "loss 0.75", "elapsed 1:02:05", "ETA",
                 "above the block", "━", tmp_path.name[:20]):  # fmt: skip
        assert part in text, part
    last = text[text.rindex("iteration 2/10") :]
    assert "eval 0.500" in last  # an evaluation stays on display until the next one
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_kernel_path_line_reaches_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "_named", set())
    logger = make(tmp_path)
    common.group_advantages(torch.arange(4.0), 2)
    logger.close()
    common.gae(*rollout(2, 2, 0), 0.9, 0.9)  # after close: nobody listens, nothing breaks
    assert (tmp_path / "log.txt").read_text().endswith("group_advantages: torch path (cpu)\n")


def test_curves(tmp_path, capsys):
    from PIL import Image

    logger = make(tmp_path)
    logger.curve_png()
    assert not (tmp_path / "curves.png").exists()  # nothing to draw yet
    logger.log(0, {"update/loss": 1.0})
    logger.curve_png()
    small = Image.open(tmp_path / "curves.png").size
    for i in range(1, 4):
        logger.log(i, {**METRICS, "env_steps": i * 100, "eval/ode_success": i / 3})
    logger.curve_png()
    large = Image.open(tmp_path / "curves.png").size
    logger.close()
    assert large[1] > small[1]  # one row of panels against three


def test_gif(tmp_path):
    from PIL import Image

    logger = make(tmp_path)
    frames = torch.full((4, 5, 48, 64, 3), 128, dtype=torch.uint8)
    frames += torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1, 1)  # all frames differ: pillow merges equal ones
    success = torch.tensor([True, False, True, False, False])
    path = logger.save_gif("group", frames, success, torch.tensor([2, 0, 0, -1, -1]))
    gif = Image.open(path)
    h, w = 48 * 3, 64 * 3  # 48 px -> x3 -> 144 >= 128
    assert path == tmp_path / "videos/group.gif" and gif.n_frames == 4 and gif.size == (3 * w, 2 * h)
    for f in range(4):
        gif.seek(f)
        pixels = np.asarray(gif.convert("RGB")).astype(int)
        for n in range(5):
            y, x = n // 3 * h, n % 3 * w
            edge, middle = pixels[y + 1, x + w // 2], pixels[y + h // 2, x + w // 2]
            assert (edge[1] > edge[0] + 100) == ((n, f) in {(0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)}), (n, f)
            assert np.abs(middle - (128 + f)).max() < 12
    for bad in (frames.float(), frames[0], frames[..., :2]):
        with pytest.raises(ValueError, match="save_gif"):
            logger.save_gif("bad", bad, success)
    with pytest.raises(ValueError, match="save_gif"):
        logger.save_gif("bad", frames, success[:3])
    logger.close()


def test_summary_and_full_disk(tmp_path, monkeypatch):
    logger = make(tmp_path)
    logger.summary({"success": np.float32(0.5), "nan": math.nan, "list": torch.tensor([1, 2])})
    expected = {"success": 0.5, "nan": None, "list": [1, 2]}
    assert json.loads((tmp_path / "summary.json").read_text()) == expected

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        logger.summary({"success": 1.0})
    assert json.loads((tmp_path / "summary.json").read_text()) == expected
    assert not list(tmp_path.glob(".*.tmp*"))
    logger.close()


def test_unwritable_run_dir(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write the run directory .*file"):
        make(tmp_path / "file/run")
    if os.geteuid():  # root writes anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError, match="cannot write the run directory"):
            make(tmp_path / "locked/run")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", read_only)
    with pytest.raises(OSError, match="cannot write the run directory .*Read-only"):
        make(tmp_path / "run")


def test_other_ranks_do_nothing(tmp_path, capsys):
    logger = make(tmp_path / "run", is_main=False, track=True)
    logger.event("x")
    logger.log(0, METRICS)
    logger.curve_png()
    assert logger.save_gif("x", None, None) is None
    logger.summary({})
    logger.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_wandb_mode_without_network(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert common._wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert common._wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert common._wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert common._wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert common._wandb_mode() == "disabled"


def test_wandb_offline_resume_and_failure(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = make(tmp_path, track=True)
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert logger.wandb is not None and logger.wandb.id == run_id
    logger.log(0, METRICS)
    logger.save_gif("clip", np.zeros((2, 1, 8, 8, 3), np.uint8), [True])
    logger.summary({"success": 1.0})
    logger.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) and list(tmp_path.glob("wandb/**/*.gif"))
    out, err = capfd.readouterr()
    assert "wandb" not in out + err  # quiet: the terminal is the display's

    logger = make(tmp_path, track=True, resume_iteration=1)
    assert logger.wandb.id == run_id

    def broken(*_, **__):
        raise RuntimeError("no wandb today")

    logger.wandb.finish()
    logger.wandb = type("Run", (), {"log": broken})()
    for i in (1, 2):
        logger.log(i, METRICS)
    logger.close()
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1, 2]
    assert (tmp_path / "log.txt").read_text().count("no wandb today") == 1


def test_wandb_that_does_not_start(tmp_path, monkeypatch, capsys):
    import wandb

    modes = []

    def init(**kwargs):
        modes.append(kwargs["mode"])
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    logger = make(tmp_path, track=True)
    logger.log(0, METRICS)
    logger.close()
    assert modes == ["online", "offline"] and len(rows(tmp_path)) == 1
    assert "W&B (online) did not start: RuntimeError: no network" in capsys.readouterr().out
