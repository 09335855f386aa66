"""Whole runs of ppo_gr00t_frozen.py in the real simulator, on a CPU with the shipped tiny checkpoint."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppo_gr00t_frozen import TASKS
from tests import test_runs
from tests.test_runs import ROOT, metrics

SMALL = "--num-envs 32 --device cpu --eval-episodes 32 --wandb-project tests".split()
# two of an episode's four chunks per rollout; checkpoints and an evaluation fall into the middle of an episode
WHOLE = (
    "--exp-name whole --iterations 7 --save-every 3 --eval-every 4 --seed 5 --critic-warmup 2 --critic-obs privileged "
    "--rollout-chunks 2 --kl-coef 0.01 --kl-target 0.001 --learning-rate 1e-3"
).split()
PRIVILEGED = TASKS["Tabletop-Lift-Cube-v0"].privileged  # numbers of the simulator's state
UPDATE = {f"update/{name}" for name in ("loss", "clip_frac", "approx_kl", "kl_base", "grad_norm", "first_ratio_error")}


def start(folder: Path, *flags: str, **kwargs):
    return test_runs.start(folder, *flags, *SMALL, script="ppo_gr00t_frozen.py", **kwargs)


def run(folder: Path, *flags: str, **kwargs) -> str:
    return test_runs.run(folder, *flags, script="ppo_gr00t_frozen.py", **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete small run: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *WHOLE, *SMALL)


def test_run_leaves_everything(whole):
    folder, out = whole
    made = folder / "runs" / "whole"
    for name in (
        "args.json provenance.json log.txt metrics.jsonl curves.png summary.json simulator.log videos/before.gif "
        "videos/after.gif source/ppo_gr00t_frozen.py source/common.py source/tabletop.py source/gr00t_n1d5.py wandb"
    ).split():
        assert (made / name).exists(), name
    args = json.loads((made / "args.json").read_text())["args"]
    assert args["num_envs"] == 32 and args["clip"] > 0  # resolved, no None left where a default was due
    checkpoints = {p.name for p in (made / "checkpoints").iterdir()}
    assert checkpoints == {"best", "step_000006", "step_000007"}
    for name in checkpoints:
        critic = load_file(made / "checkpoints" / name / "critic.safetensors")
        assert critic["layers.0.weight"].shape == (256, PRIVILEGED + 1)  # the simulator's state, and time
        assert critic["moments"][0, 0] % 64 == 0 and critic["value.weight"].abs().max() > 0
    assert critic["moments"].dtype == torch.float64
    newest = made / "checkpoints/step_000007"
    assert load_file(newest / "critic.safetensors")["moments"][0].tolist() == [7 * 2 * 32] * (PRIVILEGED + 1)
    assert "physics: C MuJoCo" in out and "gae: torch path" in out


def test_metrics_and_summary(whole):
    made = whole[0] / "runs" / "whole"
    rows, summary = metrics(made), json.loads((made / "summary.json").read_text())
    assert [row["iteration"] for row in rows] == list(range(7))
    wanted = {f"rollout/{name}" for name in ("samples", "reward", "value", "log_prob")}
    wanted |= {f"update/{name}" for name in ("explained_variance", "value_loss", "critic_grad_norm", "kl_coef")}
    per_step = {f"update/{name}_k{k}" for name in ("clip_frac", "ratio", "approx_kl", "kl_base") for k in range(4)}
    coefficient, halves = 0.01, []
    for i, row in enumerate(rows):
        assert wanted <= row.keys() and row["update/critic_grad_norm"] > 0
        moved = i >= 2
        assert ((UPDATE | per_step) & row.keys()) == (UPDATE | per_step if moved else set())
        assert (row["update/learning_rate"] > 0) == moved
        assert math.isclose(row["update/kl_coef"], coefficient)
        if moved:
            share = row["update/kl_base"] / 0.001
            coefficient *= 1.5 if share > 2 else 1 / 1.5 if share < 0.5 else 1
        if "rollout/success" in row:  # an episode ended
            halves.append(i)
        assert ("eval/ode_success" in row) == (i in (3, 6))
    # the checkpoint after iteration 2 and the evaluation after iteration 3 leave an episode unfinished
    assert halves == [1, 5] and coefficient != 0.01
    assert rows[2]["update/first_ratio_error"] <= 1e-5 and rows[2]["update/kl_base"] > 0
    assert summary["algorithm"] == "ppo_frozen" and summary["task"] == "Tabletop-Lift-Cube-v0" and summary["seed"] == 5
    assert summary["iterations"] == 7 and summary["env_steps"] == 7 * 2 * 8 * 32 and summary["episodes"] == 7 * 2 * 8
    for name in ("ode_success_before", "ode_success_after", "sde_success"):
        result = summary[name]
        assert 0 <= result["low"] <= result["mean"] <= result["high"] <= 1 and result["episodes"] == 32
    assert summary["seconds"] > 0 and summary["peak_memory_gb"] > 0
    assert summary["kl_to_base"] == rows[6]["update/kl_base"] > 0
    assert summary["explained_variance"] == rows[6]["update/explained_variance"] <= 1
    assert rows[6]["eval/ode_success"] == summary["ode_success_after"]["mean"]
    speed = summary["steps_per_second"]
    assert speed["env"] > speed["policy"] > speed["train"] > 0


def test_saved_policy_evaluates_to_the_same_success(whole):
    folder, _ = whole
    run(folder, "--evaluate", "--checkpoint", "runs/whole/checkpoints/step_000007", "--exp-name", "again", "--no-track", *SMALL)
    summary = json.loads((folder / "runs/whole/summary.json").read_text())
    again = json.loads((folder / "runs/again/summary.json").read_text())
    assert again["ode_success"] == summary["ode_success_after"]


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    """SIGKILL between two checkpoints: metrics, weights, optimizer, critic and summary are those of the whole run.

    The KL's coefficient has adapted by then, and the first checkpoint falls into the middle of an episode.
    """
    folder, _ = whole
    process = start(tmp_path, *WHOLE, "--no-track", "--no-capture-video")
    log = tmp_path / "runs" / "whole" / "metrics.jsonl"
    deadline = time.time() + 600
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs/whole/checkpoints/step_000006").exists(), "it was too fast to be killed in time"
    run(tmp_path, "--resume", "runs/whole")
    assert metrics(tmp_path / "runs/whole") == metrics(folder / "runs/whole")
    last = [path / "runs/whole/checkpoints/step_000007" for path in (folder, tmp_path)]
    a, b = (torch.load(path / "trainer_state.pt", weights_only=True) for path in last)
    assert a["kl_coef"] == b["kl_coef"]
    a, b = (state["optimizer"]["state"] for state in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        assert all(torch.equal(a[key][name], b[key][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    for name in ("model.safetensors", "critic.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    summaries = [json.loads((path / "runs/whole/summary.json").read_text()) for path in (folder, tmp_path)]
    for summary in summaries:
        for name in ("seconds", "peak_memory_gb", "steps_per_second"):
            summary.pop(name)
    assert summaries[0] == summaries[1]


def test_two_ranks_train_on_the_dense_reward(tmp_path):
    """torchrun splits the environments; one run folder, written by rank 0. The task's own reward ends no attempt."""
    flags = "--exp-name two --iterations 2 --critic-warmup 1 --eval-every 0 --noise flow-cps-all --reward dense --no-track"
    run(tmp_path, *flags.split(), "--no-capture-video", *SMALL, port=29513)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"]
    summary = json.loads((tmp_path / "runs/two/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["episodes"] == 64 and summary["ode_success_before"]["episodes"] == 32
    rows = metrics(tmp_path / "runs/two")
    assert not UPDATE & rows[0].keys() and UPDATE <= rows[1].keys()
    assert rows[1]["update/first_ratio_error"] <= 1e-5
    for row in rows:
        assert row["rollout/samples"] == 32 * 4 and row["rollout/reward"] != 0
    critic = load_file(tmp_path / "runs/two/checkpoints/step_000002/critic.safetensors")
    assert critic["moments"][0].tolist() == [2 * 4 * 32] * len(critic["moments"][0])
    assert (ROOT / "ppo_gr00t_frozen.py").read_text() == (tmp_path / "runs/two/source/ppo_gr00t_frozen.py").read_text()
