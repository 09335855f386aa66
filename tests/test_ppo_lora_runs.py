"""Whole runs of ppo_gr00t_lora.py through all stages, in the real simulator on a CPU with the shipped tiny checkpoint."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.test_runs import SMALL, metrics, run, start

SCRIPT = "ppo_gr00t_lora.py"
TARGETS = "dit-attention dit-feed-forward vl-attention llm-attention vision-attention"
# llm begins when success has not improved for two iterations, in the fifth at the earliest; a checkpoint is in between
STAGES = f"--lora-targets {TARGETS} --unfreeze critic head:1 vl:2 llm:plateau:1e-4 vision:7 --plateau 2".split()
FLAGS = ["--exp-name", "whole", "--iterations", "10", "--eval-every", "0", "--seed", "5", "--kl-coef", "0.01", *STAGES]
OWN = [flag for flag in SMALL if flag not in ("--group-size", "8")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run through all stages: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *FLAGS, "--save-every", "4", "--keep-checkpoints", "9", *OWN, script=SCRIPT)


def plateau(success: list[float], since: int, patience: int) -> int:
    """The first iteration by which the moving average of success has not risen by half a point for `patience` of them."""
    average = highest = success[since]
    risen = since + 1
    for i in range(since + 1, len(success)):
        if i - risen >= patience:
            return i
        average = 0.9 * average + 0.1 * success[i]
        if average > highest + 0.005:
            highest, risen = average, i + 1
    raise AssertionError(f"no plateau in {success}")


def test_all_stages(whole):
    folder, out = whole
    made = folder / "runs" / "whole"
    summary, rows = json.loads((made / "summary.json").read_text()), metrics(made)
    begun = summary["stages_begun"]
    waited = plateau([row["rollout/success"] for row in rows], 2, 2)
    assert 5 <= waited < 10 and begun == {"critic": 0, "head": 1, "vl": 2, "llm": waited, "vision": max(7, waited)}
    for i, row in enumerate(rows):
        assert row["update/stage"] == sum(at <= i for at in begun.values()) - 1
        assert ("update/loss" in row) == (i >= 1)
    for name, at in begun.items():
        assert f"iteration {at}: stage {name} begins" in out
    assert rows[1]["update/first_ratio_error"] <= 1e-5
    assert summary["algorithm"] == "ppo_lora" and summary["kl_to_base"] > 0 and summary["peak_memory_gb"] > 0
    assert "gradients and AdamW" in out and "activations" in out  # the estimate at the start

    # what a stage trains is as it was made before it begins: a LoRA's second factor is zero
    for step in (4, 8, 10):
        adapter = load_file(made / "checkpoints" / f"step_{step:06d}" / "adapter" / "adapter_model.safetensors")
        moved = {name for name, x in adapter.items() if "lora_B" in name and x.abs().max() > 0}
        for stage, place in (("vl", "vl_self_attention"), ("llm", "language_model"), ("vision", "vision_model")):
            own = {name for name in adapter if "lora_B" in name and place in name}
            assert own and (own <= moved) == (begun[stage] < step), (stage, step)
            assert own <= moved or not own & moved


def test_the_merged_policy_is_the_policy(whole):
    folder, _ = whole
    flags = "--evaluate --checkpoint runs/whole/checkpoints/step_000010 --exp-name again --no-track".split()
    run(folder, *flags, *SMALL)  # by grpo_gr00t.py, which knows nothing of adapters
    summary = json.loads((folder / "runs/whole/summary.json").read_text())
    again = json.loads((folder / "runs/again/summary.json").read_text())
    assert abs(again["ode_success"]["mean"] - summary["ode_success_after"]["mean"]) <= 1 / 32  # weights rounded differently


def test_killed_in_a_stage_and_resumed_equals_uninterrupted(whole, tmp_path):
    """SIGKILL after the checkpoint of iteration 4, while llm waits for a plateau: what it has seen so far counts."""
    folder, _ = whole
    state = torch.load(folder / "runs/whole/checkpoints/step_000004/trainer_state.pt", weights_only=True)
    assert list(state["begun"]) == ["critic", "head", "vl"] and 2 < state["peak_at"] <= 4 and state["smooth"] is not None
    flags = [*FLAGS, "--save-every", "4", "--keep-checkpoints", "9", "--no-track", *OWN]
    process = start(tmp_path, *flags, script=SCRIPT)
    log = tmp_path / "runs" / "whole" / "metrics.jsonl"
    deadline = time.time() + 600
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs/whole/checkpoints/step_000008").exists(), "it was too fast to be killed in time"
    run(tmp_path, "--resume", "runs/whole", script=SCRIPT)
    assert metrics(tmp_path / "runs/whole") == metrics(folder / "runs/whole")
    last = "runs/whole/checkpoints/step_000010"
    for file in ("adapter/adapter_model.safetensors", "critic.safetensors", "model.safetensors"):
        a, b = (load_file(path / last / file) for path in (folder, tmp_path))
        assert all(torch.equal(a[name], b[name]) for name in a), file
    a, b = (torch.load(p / last / "trainer_state.pt", weights_only=True)["optimizer"]["state"] for p in (folder, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k]["exp_avg_sq"], b[k]["exp_avg_sq"]) for k in a)


def test_two_ranks_train(tmp_path):
    flags = "--exp-name two --iterations 2 --save-every 2 --eval-every 0 --critic-warmup 1 --no-track --no-merged-export"
    run(tmp_path, *flags.split(), *OWN, script=SCRIPT, port=29515)
    summary = json.loads((tmp_path / "runs/two/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["episodes"] == 64 and summary["stages_begun"]["vl"] == 1
    assert metrics(tmp_path / "runs/two")[1]["update/first_ratio_error"] <= 1e-5
    assert not (tmp_path / "runs/two/checkpoints/step_000002/model.safetensors").exists()
