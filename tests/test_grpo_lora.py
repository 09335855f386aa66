"""grpo_gr00t_lora.py: what neither of its parents' tests sees. What it shares with them is the same text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from grpo_gr00t_lora import FULL, HEAD_TARGETS, STAGES, TARGETS, Args, Gr00tActor, Stage, check, parse_schedule, train
from tests.test_grpo_math import ALONE, Episodes, collect, loss_of, perturb
from tests.test_runs import SMALL, assert_same_run, killed, metrics, run, summary

torch.set_num_threads(1)
ALL = tuple(TARGETS)
BEGIN = {"head": 0, "vl": 1, "llm": 2, "vision": 2}
UNFREEZE = tuple(f"{name}:{at}" for name, at in BEGIN.items())


def make(checkpoint, **overrides) -> tuple[Args, Gr00tActor]:
    args = Args(checkpoint=str(checkpoint), device="cpu", num_envs=8, group_size=4, lora_targets=ALL, **overrides)
    return args, Gr00tActor(args)


def test_schedules():
    """No stage is the critic's, and the first one begins at once: nothing else learns."""
    assert parse_schedule(Args(unfreeze=(), learning_rate=1e-3)) == [Stage(name, 0, 1e-3) for name in STAGES]
    assert [stage.name for stage in parse_schedule(Args())] == list(STAGES) and len(parse_schedule(FULL)) == 2
    found = parse_schedule(Args(lora_targets=HEAD_TARGETS, unfreeze=("vl:9:1e-4", "head"), learning_rate=1e-3))
    assert found == [Stage("head", 0, 1e-3), Stage("vl", 9, 1e-4)]
    for flags, remedy in ((("critic", "head"), "has the stages head, vl"), (("head:3", "vl:5"), "begin a stage at 0")):
        with pytest.raises(SystemExit, match="^--unfreeze.*" + remedy):
            check(Args(device="cpu", lora_targets=HEAD_TARGETS, unfreeze=flags))


def test_stages_of_a_run(tiny_checkpoint):
    """`train` without a simulator: who learns in which iteration; all groups carry a gradient."""
    args, policy = make(tiny_checkpoint, iterations=3, eval_episodes=0, unfreeze=UNFREEZE, lr_warmup=0)
    own, rows, changed, thawed, nothing = policy.groups(), [], [], [], lambda *_, **__: None
    env = Episodes((1, 99) * 4)
    env.terminations = SimpleNamespace(get_term=lambda name: torch.zeros(8))

    def log(iteration, metrics, stages, steps):
        rows.append(metrics)
        now = {name: torch.cat([p.detach().flatten() for p in group]) for name, group in own.items()}
        changed.append({name for name in own if not torch.equal(before[0][name], now[name])})
        thawed.append({name for name in own if any(p.requires_grad for p in own[name])})
        before[0] = now

    before = [{name: torch.cat([p.detach().flatten() for p in group]) for name, group in own.items()}]
    run = SimpleNamespace(restore_optimizer=nothing, result=nothing, save=nothing, log=log, event=nothing)
    run.state = {"iteration": 0}
    train(args, env, policy, run, ALONE)
    assert changed == thawed == [{name for name, at in BEGIN.items() if at <= i} for i in range(3)]
    assert [row["update/stage"] for row in rows] == [1, 2, 4]
    assert rows[0]["update/first_ratio_error"] == 0 and rows[2]["update/kl_base"] > 0


def test_the_ratio_is_one_and_the_kl_is_to_the_base_in_every_stage(tiny_checkpoint):
    for count in range(1, len(STAGES) + 1):
        args, policy = make(tiny_checkpoint)
        policy.unfreeze(STAGES[:count])
        assert loss_of(policy, collect(args, policy)[0].flatten(0, 1)[:8].clone(), args, True)[1]["update/kl_base"] == 0
        perturb(policy)
        samples = collect(args, policy)[0]
        assert ("features" in samples.keys()) == (count <= 2)  # computed again once the backbone learns
        _, figures = loss_of(policy, samples.flatten(0, 1)[:8].clone(), args, True)
        assert figures["update/first_ratio_error"] < 1e-5 and figures["update/kl_base"] > 0


# ---------------------------------------------------------------- whole runs

LORA = {"script": "grpo_gr00t_lora.py"}
FLAGS = "--exp-name whole --iterations 4 --save-every 2 --eval-every 0 --seed 5 --group-size 8 --lora-targets".split()
FLAGS += [*ALL, "--unfreeze", *UNFREEZE, *SMALL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run through all stages: its folder."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *FLAGS, **LORA)
    return folder / "runs/whole"


def test_a_run_through_all_stages(whole):
    found, rows = summary(whole), metrics(whole)
    assert [row["update/stage"] for row in rows] == [1, 2, 4, 4]
    assert rows[0]["update/first_ratio_error"] <= 1e-5 and found["kl_to_base"] > 0 and found["trainable_parameters"] > 0
    for step, merged in ((2, False), (4, True)):  # adapters alone in between, the merged network in the end
        folder = whole / f"checkpoints/step_{step:06d}"
        assert (folder / "model.safetensors").exists() == merged
        adapter = load_file(folder / "adapter/adapter_model.safetensors")
        for stage, place in (("head", "action_head.model"), ("vl", "vl_self_attention"), ("vision", "vision_model")):
            moved = [bool(x.abs().max() > 0) for name, x in adapter.items() if "lora_B" in name and place in name]
            assert moved and set(moved) == {BEGIN[stage] < step}, (stage, step)  # a LoRA's second factor begins at zero


def test_killed_in_a_stage_and_resumed_equals_uninterrupted(whole, tmp_path):
    killed(tmp_path, *FLAGS, rows=3, before="step_000004", **LORA)
    run(tmp_path, "--resume", "runs/whole", **LORA)
    assert_same_run(whole, tmp_path / "runs/whole", "step_000004", ["adapter/adapter_model.safetensors", "model.safetensors"])
