"""Whole runs of the scripts, by their command lines, in the real simulator on a CPU with the shipped tiny checkpoint."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--num-envs 32 --device cpu --eval-episodes 32".split()
GROUPS = ["--group-size", "8"]
BANK = "--curriculum learnability --bank-share 0.5 --midway".split()
WHOLE = [*"--exp-name whole --iterations 4 --eval-every 2 --seed 5".split(), *BANK]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port")


def start(folder: Path, *flags: str, script: str = "grpo_gr00t.py", port: int | None = None, wandb: str = "disabled"):
    """Starts a script in a folder of its own; with a port as two ranks, by torchrun."""
    env = os.environ | {"WANDB_MODE": wandb, "OMP_NUM_THREADS": "1"}
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
    return [{k: v for k, v in row.items() if not k.startswith(("sps/", "time/"))} for row in rows]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def killed(folder: Path, *flags: str, rows: int, before: str, **kwargs) -> None:
    """Starts a run called `whole` and kills it when it has logged so many iterations, before a checkpoint."""
    process, made = start(folder, *flags, **kwargs), folder / "runs/whole"
    deadline = time.time() + 600
    while not ((made / "metrics.jsonl").exists() and len((made / "metrics.jsonl").read_text().splitlines()) >= rows):
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (made / "checkpoints" / before).exists(), "it was too fast to be killed in time"


def assert_same_run(a: Path, b: Path, last: str, files: list[str]) -> None:
    """Metrics, weights, optimizer, bank of starts and summary are equal to the bit."""
    assert metrics(a) == metrics(b)
    one, two = (torch.load(made / "checkpoints" / last / "trainer_state.pt", weights_only=True) for made in (a, b))
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(x, two["optimizer"]["state"][key][name]) for name, x in state.items())
    for own, other in zip(one["bank"] or (), two["bank"] or (), strict=True):
        assert torch.equal(own["counts"], other["counts"]) and own["entries"].keys() == other["entries"].keys()
        assert all(torch.equal(x, other["entries"][key]) for key, x in own["entries"].items() if key != "scene")
    for file in files:
        own, other = (load_file(made / "checkpoints" / last / file) for made in (a, b))
        assert own.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in own.items()), file
    clock = ("seconds", "peak_memory_gb", "steps_per_second")
    one, two = ({k: v for k, v in summary(made).items() if k not in clock} for made in (a, b))
    assert one == two


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete small run: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    out = run(folder, *WHOLE, "--save-every", "1", *SMALL, *GROUPS, wandb="offline")
    return folder / "runs" / "whole", out


def test_run_leaves_everything(whole):
    made, out = whole
    for name in (
        "args.json provenance.json log.txt metrics.jsonl curves.png summary.json simulator.log videos/before.gif "
        "videos/after.gif source/grpo_gr00t.py source/common.py source/tasks/tabletop.py source/gr00t_n1d5/network.py wandb"
    ).split():
        assert (made / name).exists(), name
    assert (made / "source" / "grpo_gr00t.py").read_text() == (ROOT / "grpo_gr00t.py").read_text()
    args = json.loads((made / "args.json").read_text())["args"]
    assert args["num_envs"] == 32 and args["learning_rate"] > 0
    assert {p.name for p in (made / "checkpoints").iterdir()} == {"best", "step_000003", "step_000004"}
    assert "physics: C MuJoCo" in out and "lift the red cube; lift the blue cube" in out
    assert "group_advantages: torch path" in out


def test_summary_is_complete_and_consistent(whole):
    made, _ = whole
    found, rows = summary(made), metrics(made)
    assert found["script"] == "grpo_gr00t" and found["task"] == "Tabletop-Lift-Cube-v0" and found["seed"] == 5
    assert found["iterations"] == 4 and found["env_steps"] == 4 * 32 * 32
    for name in ("ode_success_before", "ode_success_after", "sde_success"):
        result = found[name]
        assert 0 <= result["low"] <= result["mean"] <= result["high"] <= 1 and result["episodes"] == 32
        own = result["instructions"]
        assert set(own) == {"lift the red cube", "lift the blue cube"} and sum(x["episodes"] for x in own.values()) == 32
        assert math.isclose(sum(x["mean"] * x["episodes"] for x in own.values()), 32 * result["mean"])
    assert found["seconds"] > 0 and found["peak_memory_gb"] > 0 and 0 <= found["zero_variance_share"] <= 1
    speed = found["steps_per_second"]
    assert speed["env"] > speed["policy"] > speed["train"] > 0
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3] and rows[3]["episodes"] == 4 * 32
    assert rows[0]["update/first_ratio_error"] <= 1e-5 and rows[0]["update/kl_base"] == 0
    assert rows[3]["update/kl_base"] == found["kl_to_base"] > 0
    assert {"rollout/success_k0", "rollout/success_k1", "rollout/zero_variance_share_k1"} <= set().union(*rows)
    assert all(math.isclose(row["curriculum/share_k0"] + row["curriculum/share_k1"], 1, rel_tol=1e-6) for row in rows)
    assert all(0 < row["curriculum/chance_k1"] < 1 for row in rows) and rows[0]["curriculum/midway"] == 0
    assert rows[3]["eval/ode_success"] == found["ode_success_after"]["mean"]


def test_saved_policy_evaluates_to_the_same_success(whole):
    made, _ = whole
    flags = ["--evaluate", "--checkpoint", f"{made}/checkpoints/step_000004", "--exp-name", "again"]
    run(made.parents[1], *flags, *SMALL, *GROUPS)
    assert summary(made.with_name("again"))["ode_success"] == summary(made)["ode_success_after"]


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    """SIGKILL between two checkpoints; what the run had printed by then is cut back."""
    killed(tmp_path, *WHOLE, "--save-every", "2", *SMALL, *GROUPS, rows=3, before="step_000004")
    run(tmp_path, "--resume", "runs/whole")
    assert_same_run(whole[0], tmp_path / "runs/whole", "step_000004", ["model.safetensors"])


@pytest.mark.slow
def test_two_ranks_train(tmp_path):
    """torchrun splits environments and groups; one run folder, written by rank 0."""
    flags = "--exp-name two --iterations 2 --save-every 2 --eval-every 0".split()
    run(tmp_path, *flags, *BANK, *SMALL, *GROUPS, port=29511)
    made = tmp_path / "runs/two"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"] and (made / "simulator1.log").exists()
    assert summary(made)["world_size"] == 2 and summary(made)["ode_success_before"]["episodes"] == 32
    assert metrics(made)[0]["update/first_ratio_error"] <= 1e-5 and metrics(made)[0]["episodes"] == 32
    state = torch.load(made / "checkpoints/step_000002/trainer_state.pt", weights_only=True)
    one, two = state["bank"]  # a rank's own starts, both ranks' counts
    assert torch.equal(one["counts"], two["counts"]) and one["counts"][1].sum() > 0
    cubes = [bank["entries"]["scene"]["rigid_object"]["red"]["root_pose"] for bank in (one, two)]
    assert not torch.equal(*cubes)


@pytest.mark.slow
def test_the_large_command_line_fits(tmp_path):
    """4096 environments in groups of 16 with the tiny policy: shaped right, within a laptop's memory."""
    flags = "--num-envs 4096 --group-size 16 --iterations 1 --epochs 1 --eval-episodes 0 --exp-name large --device cpu"
    out = run(tmp_path, *flags.split(), "--micro-batch-size", "512")
    assert "16384 samples an iteration" in out
    found = summary(tmp_path / "runs/large")
    assert found["env_steps"] == 4096 * 32 and found["ode_success_after"] == {} and found["peak_memory_gb"] < 20


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(tmp_path):
    flags = "--exp-name nan --iterations 6 --save-every 1 --eval-every 0 --minibatches 1 --epochs 1 --learning-rate 1e30"
    process = start(tmp_path, *flags.split(), *SMALL, *GROUPS)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "nan or inf" in err and "Traceback" not in err, out[-2000:] + err[-2000:]
    kept = {p.name for p in (tmp_path / "runs/nan/checkpoints").iterdir()}
    assert kept == {"step_000001"}  # the next iteration's numbers were not finite: nothing was written after them


# ---------------------------------------------------------------- imitation


def test_imitation_from_scratch(tmp_path):
    """sft_gr00t.py: demonstrations, training, evaluation, a checkpoint that grpo_gr00t.py loads."""
    flags = "--demos 64 --steps 120 --batch-size 64 --exp-name sft".split()
    out = run(tmp_path, *flags, *SMALL, script="sft_gr00t.py")
    assert "expert success" in out
    rows, made = metrics(tmp_path / "runs/sft"), tmp_path / "runs/sft"
    assert rows[-1]["update/loss"] < 0.75 * rows[0]["update/loss"]
    checkpoint = made / "checkpoints/last"
    statistics = json.loads((checkpoint / "experiment_cfg/metadata.json").read_text())["new_embodiment"]["statistics"]
    assert list(statistics["action"]) == ["gripper_delta", "gripper_open"]
    assert statistics["action"]["gripper_open"]["max"] == [1.0]
    run(tmp_path, "--evaluate", "--checkpoint", str(checkpoint), "--exp-name", "e", *SMALL, *GROUPS)
    assert summary(made)["ode_success"] == summary(tmp_path / "runs/e")["ode_success"]


@pytest.mark.slow
def test_imitation_by_two_ranks_with_shared_weights(tmp_path):
    """torchrun splits environments and demonstrations, FSDP the network; the checkpoint is whole."""
    flags = "--fsdp --demos 64 --steps 12 --batch-size 32 --exp-name two".split()
    run(tmp_path, *flags, *SMALL, script="sft_gr00t.py", port=29519)
    rows, found = metrics(tmp_path / "runs/two"), summary(tmp_path / "runs/two")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"]
    assert [row["iteration"] for row in rows] == [11] and 0 < rows[0]["update/loss"] == found["loss"]
    assert found["world_size"] == 2 and found["ode_success"]["episodes"] == 32
    assert 0.5 * 64 * 8 < found["samples"] <= 64 * 8  # of both ranks
    run(tmp_path, "--evaluate", "--checkpoint", "runs/two/checkpoints/last", "--exp-name", "e", *SMALL, *GROUPS)
