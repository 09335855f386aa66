"""Whole runs of the scripts, by their command lines, in the real simulator on a CPU with the shipped tiny checkpoint."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--num-envs 32 --group-size 8 --device cpu --eval-episodes 32 --no-capture-video --wandb-project tests".split()
TIMING = ("sps/", "time/")


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port")


def start(folder: Path, *flags: str, script: str = "grpo_gr00t.py", port: int | None = None):
    """Starts a script in a folder of its own, W&B offline; with a port as two ranks, by torchrun."""
    env = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    launcher = (*TORCHRUN, str(port)) if port else ()
    return warm.start([*launcher, str(ROOT / script), *flags], folder, env, cold=port is not None)


def run(folder: Path, *flags: str, **kwargs) -> str:
    """Runs a script to its end and returns what it printed."""
    process = start(folder, *flags, **kwargs)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out[-3000:] + err[-3000:]
    return out


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete small run: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    flags = "--exp-name whole --iterations 4 --save-every 1 --eval-every 2 --seed 5".split()
    small = [flag for flag in SMALL if flag != "--no-capture-video"]
    return folder, run(folder, *flags, *small)


def test_run_leaves_everything(whole):
    folder, out = whole
    made = folder / "runs" / "whole"
    for name in (
        "args.json provenance.json log.txt metrics.jsonl curves.png summary.json simulator.log videos/before.gif "
        "videos/after.gif source/grpo_gr00t.py source/common.py source/tabletop.py source/gr00t_n1d5.py wandb"
    ).split():
        assert (made / name).exists(), name
    assert (made / "source" / "grpo_gr00t.py").read_text() == (ROOT / "grpo_gr00t.py").read_text()
    args = json.loads((made / "args.json").read_text())["args"]
    assert args["num_envs"] == 32 and args["learning_rate"] > 0  # resolved, no None left where a default was due
    checkpoints = {p.name for p in (made / "checkpoints").iterdir()}
    assert checkpoints == {"best", "step_000003", "step_000004"}
    assert "physics: C MuJoCo" in out and "lift the red cube; lift the blue cube" in out
    assert "group_advantages: torch path" in out


def test_summary_is_complete_and_consistent(whole):
    made = whole[0] / "runs" / "whole"
    summary = json.loads((made / "summary.json").read_text())
    assert summary["algorithm"] == "grpo" and summary["task"] == "Tabletop-Lift-Cube-v0" and summary["seed"] == 5
    assert summary["iterations"] == 4 and summary["env_steps"] == 4 * 32 * 32 and summary["episodes"] == 4 * 32
    for name in ("ode_success_before", "ode_success_after", "sde_success"):
        result = summary[name]
        assert 0 <= result["low"] <= result["mean"] <= result["high"] <= 1 and result["episodes"] == 32
    assert summary["seconds"] > 0 and summary["peak_memory_gb"] > 0 and summary["kl_to_base"] > 0
    assert 0 <= summary["zero_variance_share"] <= 1
    speed = summary["steps_per_second"]
    assert speed["env"] > speed["policy"] > speed["train"] > 0
    rows = metrics(made)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["update/first_ratio_error"] <= 1e-5 and rows[0]["update/kl_base"] == 0
    assert rows[3]["update/kl_base"] == summary["kl_to_base"]
    assert rows[3]["eval/ode_success"] == summary["ode_success_after"]["mean"]


def test_saved_policy_evaluates_to_the_same_success(whole):
    folder, _ = whole
    run(folder, "--evaluate", "--checkpoint", "runs/whole/checkpoints/step_000004", "--exp-name", "again", "--no-track", *SMALL)
    summary = json.loads((folder / "runs/whole/summary.json").read_text())
    again = json.loads((folder / "runs/again/summary.json").read_text())
    assert again["ode_success"] == summary["ode_success_after"]


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    """SIGKILL between two checkpoints; the resumed run's metrics, weights and summary are those of the whole run."""
    folder, _ = whole
    flags = "--exp-name whole --iterations 4 --save-every 2 --eval-every 2 --seed 5 --no-track".split()
    process = start(tmp_path, *flags, *SMALL)
    log = tmp_path / "runs" / "whole" / "metrics.jsonl"
    deadline = time.time() + 600
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs/whole/checkpoints/step_000004").exists(), "it was too fast to be killed in time"
    run(tmp_path, "--resume", "runs/whole")
    assert metrics(tmp_path / "runs/whole") == metrics(folder / "runs/whole")
    a, b = (
        torch.load(path / "runs/whole/checkpoints/step_000004/trainer_state.pt", weights_only=True)["optimizer"]["state"]
        for path in (folder, tmp_path)
    )
    for key in a:
        assert torch.equal(a[key]["exp_avg"], b[key]["exp_avg"])
    weights = [(p / "runs/whole/checkpoints/step_000004/model.safetensors").read_bytes() for p in (folder, tmp_path)]
    assert weights[0] == weights[1]
    summaries = [json.loads((p / "runs/whole/summary.json").read_text()) for p in (folder, tmp_path)]
    for summary in summaries:
        for name in ("seconds", "peak_memory_gb", "steps_per_second"):
            summary.pop(name)
    assert summaries[0] == summaries[1]


def test_two_ranks_train(tmp_path):
    """torchrun splits environments and groups; one run folder, written by rank 0."""
    flags = "--exp-name two --iterations 1 --save-every 1 --eval-every 0 --noise flow-cps-all --no-track".split()
    run(tmp_path, *flags, *SMALL, port=29511)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"]
    summary = json.loads((tmp_path / "runs/two/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["episodes"] == 32 and summary["ode_success_before"]["episodes"] == 32
    assert metrics(tmp_path / "runs/two")[0]["update/first_ratio_error"] <= 1e-5


def test_the_large_command_line_fits(tmp_path):
    """4096 environments in groups of 16 with the tiny policy: shaped right, within a laptop's memory."""
    flags = "--num-envs 4096 --group-size 16 --iterations 1 --epochs 1 --eval-episodes 0 --exp-name large".split()
    out = run(tmp_path, *flags, *"--device cpu --no-capture-video --no-track --micro-batch-size 512".split())
    assert "16384 samples an iteration" in out
    summary = json.loads((tmp_path / "runs/large/summary.json").read_text())
    assert summary["env_steps"] == 4096 * 32 and summary["ode_success_after"] == {} and summary["peak_memory_gb"] < 20


def test_imitation_from_scratch(tmp_path):
    """sft_gr00t.py: demonstrations, training, evaluation, a checkpoint that grpo_gr00t.py loads."""
    flags = "--num-envs 32 --demos 64 --steps 120 --batch-size 64 --device cpu --eval-episodes 32 --exp-name sft --no-track"
    out = run(tmp_path, *flags.split(), script="sft_gr00t.py")
    assert "expert success" in out
    rows = metrics(tmp_path / "runs/sft")
    assert rows[-1]["update/loss"] < 0.75 * rows[0]["update/loss"]
    checkpoint = tmp_path / "runs/sft/checkpoints/last"
    statistics = json.loads((checkpoint / "experiment_cfg/metadata.json").read_text())["new_embodiment"]["statistics"]
    assert list(statistics["action"]) == ["gripper_delta", "gripper_open"]
    assert statistics["action"]["gripper_open"]["max"] == [1.0]
    run(tmp_path, "--evaluate", "--checkpoint", str(checkpoint), "--exp-name", "e", "--no-track", *SMALL)
    a = json.loads((tmp_path / "runs/sft/summary.json").read_text())["ode_success"]
    b = json.loads((tmp_path / "runs/e/summary.json").read_text())["ode_success"]
    assert a == b


def test_imitation_by_two_ranks_with_shared_weights(tmp_path):
    """torchrun splits environments and demonstrations, FSDP the network; the checkpoint is whole."""
    flags = "--fsdp --num-envs 32 --demos 64 --steps 12 --batch-size 32 --eval-episodes 32 --device cpu --exp-name two".split()
    out = run(tmp_path, *flags, "--no-track", script="sft_gr00t.py", port=29519)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"] and out.count("step 12:") == 1
    rows, summary = metrics(tmp_path / "runs/two"), json.loads((tmp_path / "runs/two/summary.json").read_text())
    assert [row["iteration"] for row in rows] == [11] and 0 < rows[0]["update/loss"] == summary["loss"]
    assert summary["world_size"] == 2 and summary["ode_success"]["episodes"] == 32
    assert 0.5 * 64 * 8 < summary["samples"] <= 64 * 8  # of both ranks
    run(tmp_path, "--evaluate", "--checkpoint", "runs/two/checkpoints/last", "--exp-name", "e", "--no-track", *SMALL)


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(tmp_path):
    flags = "--exp-name nan --iterations 6 --save-every 1 --eval-every 0 --minibatches 1 --epochs 1 --learning-rate 1e30"
    process = start(tmp_path, *flags.split(), "--no-track", *SMALL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "nan or inf" in err and "Traceback" not in err, out[-2000:] + err[-2000:]
    kept = {p.name for p in (tmp_path / "runs/nan/checkpoints").iterdir()}
    assert kept == {"step_000001"}  # the next iteration's numbers were not finite: nothing was written after them
