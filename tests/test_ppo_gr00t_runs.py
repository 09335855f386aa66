"""Whole runs of the two PPO scripts in the real simulator, on a CPU with the shipped tiny checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tasks.gr00t import TASKS
from tests.test_runs import GROUPS, ROOT, SMALL, assert_same_run, killed, metrics, run, summary

FROZEN, LORA = {"script": "ppo_gr00t_frozen.py"}, {"script": "ppo_gr00t_lora.py"}
CRITIC = TASKS["Tabletop-Lift-Cube-v0"].privileged + 1  # the simulator's state, and time
UPDATE = {f"update/{name}" for name in ("loss", "clip_frac", "approx_kl", "kl_base", "grad_norm", "first_ratio_error")}
WHOLE = "--exp-name whole --iterations 4 --save-every 2 --eval-every 2 --seed 5 --kl-coef 0.01 --learning-rate 1e-3".split()
FLAGS = [*WHOLE, *"--critic-warmup 1 --critic-obs privileged --curriculum learnability --bank-share 0.5".split(), *SMALL]
TARGETS = "dit-attention dit-feed-forward vl-attention llm-attention vision-attention".split()
STAGES = {"head": 1, "vl": 2, "llm": 3, "vision": 3}
UNFREEZE = ["critic", *(f"{name}:{at}" for name, at in STAGES.items())]
LORA_FLAGS = [*WHOLE, "--eval-every", "0", "--lora-targets", *TARGETS, "--unfreeze", *UNFREEZE, *SMALL]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A complete small run of ppo_gr00t_frozen.py: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    out = run(folder, *FLAGS, **FROZEN)
    return folder / "runs" / "whole", out


def test_metrics_summary_and_files(frozen):
    made, out = frozen
    assert {p.name for p in (made / "checkpoints").iterdir()} == {"best", "step_000002", "step_000004"}
    critic = load_file(made / "checkpoints/step_000004/critic.safetensors")
    assert critic["layers.0.weight"].shape == (256, CRITIC) and critic["value.weight"].abs().max() > 0
    assert critic["moments"].dtype == torch.float64 and critic["moments"][0].tolist() == [4 * 4 * 32] * CRITIC
    assert "physics: C MuJoCo" in out and "gae: torch path" in out

    rows, found = metrics(made), summary(made)
    wanted = {f"rollout/{name}" for name in ("success", "samples", "reward", "value", "log_prob")}
    wanted |= {f"update/{name}" for name in ("explained_variance", "value_loss", "critic_grad_norm")}
    per_step = {f"update/{name}_k{k}" for name in ("clip_frac", "approx_kl", "kl_base") for k in range(4)}
    for i, row in enumerate(rows):
        assert wanted <= row.keys() and row["update/critic_grad_norm"] > 0
        assert ((UPDATE | per_step) & row.keys()) == (UPDATE | per_step if i >= 1 else set())  # the critic alone at first
        assert (row["update/learning_rate"] > 0) == (i >= 1) and ("eval/ode_success" in row) == (i in (1, 3))
    assert rows[1]["update/first_ratio_error"] <= 1e-5 and rows[2]["update/kl_base"] > 0
    assert found["script"] == "ppo_gr00t_frozen" and found["iterations"] == 4 and found["env_steps"] == 4 * 32 * 32
    for name in ("ode_success_before", "ode_success_after", "sde_success"):
        assert 0 <= found[name]["low"] <= found[name]["mean"] <= found[name]["high"] <= 1 and found[name]["episodes"] == 32
    assert found["kl_to_base"] == rows[3]["update/kl_base"] > 0 and rows[3]["episodes"] == 4 * 32
    assert found["explained_variance"] == rows[3]["update/explained_variance"] <= 1
    assert rows[3]["eval/ode_success"] == found["ode_success_after"]["mean"]


def test_killed_and_resumed_equals_uninterrupted(frozen, tmp_path):
    """SIGKILL between two checkpoints; the critic and its statistics are those of the whole run, too."""
    killed(tmp_path, *FLAGS, rows=3, before="step_000004", **FROZEN)
    run(tmp_path, "--resume", "runs/whole", **FROZEN)
    assert_same_run(frozen[0], tmp_path / "runs/whole", "step_000004", ["model.safetensors", "critic.safetensors"])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ppo_gr00t_frozen.py", "ppo_gr00t_lora.py"])
def test_two_ranks_train_on_the_dense_reward(script, tmp_path):
    """torchrun splits the environments; one run folder, written by rank 0. The task's own reward ends no attempt."""
    flags = "--exp-name two --iterations 2 --critic-warmup 1 --eval-every 0 --reward dense".split()
    run(tmp_path, *flags, *SMALL, script=script, port=29513)
    made = tmp_path / "runs/two"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"]
    assert summary(made)["world_size"] == 2 and summary(made)["ode_success_before"]["episodes"] == 32
    rows = metrics(made)
    assert not UPDATE & rows[0].keys() and UPDATE <= rows[1].keys()
    assert rows[1]["update/first_ratio_error"] <= 1e-5 and rows[1]["episodes"] == 64
    assert all(row["rollout/samples"] == 32 * 4 and row["rollout/reward"] != 0 for row in rows)
    critic = load_file(made / "checkpoints/step_000002/critic.safetensors")
    assert critic["moments"][0].tolist() == [2 * 4 * 32] * len(critic["moments"][0])
    assert (ROOT / script).read_text() == (made / "source" / script).read_text()


# ---------------------------------------------------------------- adapters and stages


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A run of ppo_gr00t_lora.py through all stages: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    out = run(folder, *LORA_FLAGS, **LORA)
    return folder / "runs" / "whole", out


def test_all_stages(stages):
    made, out = stages
    found, rows = summary(made), metrics(made)
    for i, row in enumerate(rows):
        assert row["update/stage"] == sum(at <= i for at in STAGES.values()) and ("update/loss" in row) == (i >= 1)
    for name, at in STAGES.items():
        assert f"iteration {at}: stage {name} begins" in out
    assert rows[1]["update/first_ratio_error"] <= 1e-5 and found["kl_to_base"] > 0 and found["trainable_parameters"] > 0
    for step, merged in ((2, False), (4, True)):  # adapters alone in between, the merged network in the end
        folder = made / f"checkpoints/step_{step:06d}"
        assert (folder / "model.safetensors").exists() == merged
        adapter = load_file(folder / "adapter/adapter_model.safetensors")
        for stage, place in (("head", "action_head.model"), ("vl", "vl_self_attention"), ("vision", "vision_model")):
            moved = [bool(x.abs().max() > 0) for name, x in adapter.items() if "lora_B" in name and place in name]
            assert moved and set(moved) == {STAGES[stage] < step}, (stage, step)  # a LoRA's second factor begins at zero


def test_killed_in_a_stage_and_resumed_equals_uninterrupted(stages, tmp_path):
    killed(tmp_path, *LORA_FLAGS, rows=3, before="step_000004", **LORA)
    run(tmp_path, "--resume", "runs/whole", **LORA)
    files = ["adapter/adapter_model.safetensors", "critic.safetensors", "model.safetensors"]
    assert_same_run(stages[0], tmp_path / "runs/whole", "step_000004", files)


@pytest.mark.slow
def test_the_merged_policy_is_the_policy(stages):
    """By grpo_gr00t.py, which knows nothing of adapters."""
    made, _ = stages
    flags = ["--evaluate", "--checkpoint", f"{made}/checkpoints/step_000004", "--exp-name", "again"]
    run(made.parents[1], *flags, *SMALL, *GROUPS)
    before, after = summary(made)["ode_success_after"], summary(made.with_name("again"))["ode_success"]
    assert abs(after["mean"] - before["mean"]) <= 1 / 32  # weights rounded differently
    assert json.loads((made.with_name("again") / "args.json").read_text())["args"]["evaluate"]
