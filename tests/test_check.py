"""`--check`: what is sound passes, and every seeded fault is named by its own line.

`python tests/test_check.py FOLDER` trains a tiny network with two cameras and checks it: there is one simulator per process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import grpo_gr00t
import sft_gr00t
from benchmarks.random_checkpoint import write_random
from common import Noise, Ranks, Run
from gr00t_n1d5.processor import Gr00tProcessor
from tasks.check import check_policy, check_success, check_task
from tasks.gr00t import TASKS
from tests import warm

LIFT, ONE = TASKS["Tabletop-Lift-Cube-v0"], Ranks(0, 1)
FIGURES = {"memory", "time"}


# ---------------------------------------------------------------- faults in the embedded task


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The embedded task and the shipped checkpoint, behind grpo_gr00t.py."""
    args = grpo_gr00t.Args(num_envs=32, group_size=8, device="cpu", epochs=1, minibatches=1)
    policy = grpo_gr00t.Gr00tActor(args)
    with grpo_gr00t.make_env(args, policy.camera_size, tmp_path_factory.mktemp("run"), ONE) as env:
        yield args, env, policy


def look(started) -> dict[str, str]:
    """Verdicts by the checks' names; it stops the run if and only if one has failed."""
    args, env, policy = started
    printed, results = [], {}
    run = SimpleNamespace(event=printed.append, result=results.update, state={})
    try:
        grpo_gr00t.check_run(args, env, policy, run, ONE, "a plan")
        stopped = False
    except SystemExit:
        stopped = True
    found = {check["name"]: check["verdict"] for check in results["checks"]}
    assert stopped == ("FAIL" in found.values()) and len(printed) == len(found)
    return found


def odd(found: dict[str, str]) -> dict[str, str]:
    return {name: verdict for name, verdict in found.items() if verdict in ("WARN", "FAIL")}


def test_what_is_sound_passes_and_nothing_is_learned(started):
    before = [p.clone() for p in started[2].parameters()]
    found = look(started)
    assert odd(found) == {} and found["cameras"] == "skip" and {n for n, v in found.items() if v == "note"} == FIGURES
    assert {n for n, v in found.items() if v == "PASS"} == {
        "start", "ends", "images cam", "states", "actions", "instruction", "groups", "groups' episodes", "success", "ratio"
    }  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(before, started[2].parameters()))


def always(started, monkeypatch, value: bool) -> None:
    """From now on every environment has succeeded, or none."""
    term = type(started[1].terminations.get_term_cfg("success").func)
    monkeypatch.setattr(term, "__call__", lambda self, env, **_: torch.full((env.num_envs,), value))


def test_a_success_that_is_true_of_starts(started, monkeypatch):
    always(started, monkeypatch, True)
    found = odd(look(started))
    assert found["start"] == found["success"] == "FAIL"


def test_a_success_that_nobody_reaches(started, monkeypatch):
    always(started, monkeypatch, False)
    assert odd(look(started)) == {"success": "FAIL"}


def test_a_success_that_is_a_failure_at_once(started, monkeypatch):
    terms = started[1].terminations
    monkeypatch.setattr(terms.get_term_cfg("broken"), "func", lambda env: terms.get_term("success").clone())  # computed before
    assert odd(look(started)) == {"ends": "WARN"}


@pytest.mark.parametrize("changed", [lambda x: x * 0, lambda x: x[:1].expand_as(x) * 0 + 99])
def test_images_that_show_nothing(started, monkeypatch, changed):
    plain = type(LIFT).images
    monkeypatch.setattr(type(LIFT), "images", lambda task, env: changed(plain(task, env)))
    assert odd(look(started))["images cam"] == "FAIL"


def test_images_that_stand_still(started, monkeypatch):
    first = started[1].reset(3)["images"]
    monkeypatch.setattr(type(LIFT), "images", lambda task, env: first)
    assert odd(look(started))["images cam"] == "FAIL"


def test_statistics_of_another_robot(started, monkeypatch):
    policy, g = started[2], torch.Generator().manual_seed(0)
    data = [
        {key: 5 + torch.rand(99, n, generator=g) for key, n in LIFT.state.items()},
        {key: 0.01 * torch.rand(99, n, generator=g) for key, n in LIFT.action.items()},
    ]
    old = policy.processor
    other = Gr00tProcessor.from_statistics(old.config, "new_embodiment", *data, {"cam": {}}, old.tokenizer)
    other.connect(LIFT.modalities)
    monkeypatch.setattr(policy, "processor", other)
    assert odd(look(started)).items() >= {"states": "FAIL", "actions": "FAIL"}.items()


def test_an_instruction_that_is_ignored(started, monkeypatch):
    features = started[2].features
    monkeypatch.setattr(started[2], "features", lambda obs: features(obs.copy().set("prompt", 0 * obs["prompt"])))
    assert odd(look(started)) == {"instruction": "FAIL"}


def test_groups_that_are_not_alike(started, monkeypatch):
    with monkeypatch.context() as patch:  # members keep starts of their own
        patch.setattr(grpo_gr00t, "start_from", lambda *_: None)
        assert odd(look(started)) == {"groups": "FAIL", "groups' episodes": "FAIL"}
    step = started[1].env.step
    monkeypatch.setattr(started[1].env, "step", lambda action: step(action + 1e-3 * torch.randn_like(action)))
    assert odd(look(started)) == {"groups' episodes": "FAIL"}


def test_a_ratio_that_is_off(started, monkeypatch):
    plain = started[2].evaluate
    monkeypatch.setattr(started[2], "evaluate", lambda *a: (lambda x, *rest: (x + 1e-3, *rest))(*plain(*a)))
    assert odd(look(started)) == {"ratio": "FAIL"}


@pytest.mark.parametrize("won, expert, group, verdict, says", [
    ([0, 0, 0, 0], None, 1, "FAIL", "no success was ever reached"),
    ([0, 0, 0, 0], [1, 0, 0, 0], 1, "FAIL", "imitate first"),
    ([1, 1, 0, 0], [1, 1, 1, 1], 2, "FAIL", "all groups fare alike"),
    ([1, 0, 0, 0], [1, 1, 1, 1], 2, "WARN", "never: push"),
    ([1, 0, 1, 0], [0, 0, 0, 0], 2, "WARN", "the expert never succeeds"),
    ([1, 0, 1, 1], [1, 1, 1, 1], 2, "PASS", "mixed groups 0.500"),
])  # fmt: skip
def test_what_rl_would_live_on(won, expert, group, verdict, says):
    expert = None if expert is None else torch.tensor(expert).bool()
    prompt = torch.tensor([0, 0, 1, 1])
    found = check_success(expert, torch.tensor(won).bool(), prompt, ("lift", "push"), group)
    assert found.verdict == verdict and says in found.text


# ---------------------------------------------------------------- by command line, and with two cameras


def start(folder: Path, *command: str) -> tuple[int, str]:
    process = warm.start(list(command), folder, os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"})
    out, err = process.communicate(timeout=900)
    assert process.returncode in (0, 1), err[-3000:]
    return process.returncode, out + err


@pytest.mark.parametrize("script, flags, status, odd", [
    ("ppo_gr00t_lora", "--num-envs 32", 0, {}),
    ("sft_gr00t", "--num-envs 32", 0, {}),
    # no camera, no expert, one instruction, random weights
    ("grpo_gr00t", "--num-envs 8 --group-size 4 --task Isaac-Humanoid --checkpoint random", 1, {"success": "FAIL"}),
])  # fmt: skip
def test_the_flag(script, flags, status, odd, tmp_path):
    if "random" in flags:
        write_random("Isaac-Humanoid", tmp_path / "random")
    done, printed = start(tmp_path, str(ROOT / f"{script}.py"), "--check", "--exp-name", "c", "--device", "cpu", *flags.split())
    checks = json.loads((tmp_path / "runs/c/summary.json").read_text())["checks"]
    assert done == status and {x["name"]: x["verdict"] for x in checks if x["verdict"] in ("WARN", "FAIL")} == odd
    assert all(f"{x['verdict']:4} {x['name']}: {x['text']}" in printed for x in checks)
    assert not (tmp_path / "runs/c/checkpoints").exists()
    skipped = {"images", "actions", "cameras", "instruction"} if "random" in flags else {"cameras"}
    assert script == "sft_gr00t" or {x["name"] for x in checks if x["verdict"] == "skip"} == skipped


def test_cameras_in_another_order_than_the_checkpoint_was_trained_with(tmp_path):
    start(tmp_path, str(ROOT / "tests/test_check.py"), str(tmp_path))
    right, swapped, same = json.loads((tmp_path / "found.json").read_text())
    assert right["cameras"] == "PASS" and swapped["cameras"] == "FAIL"
    assert same["images side_cam"] == "FAIL" and right["images side_cam"] == "PASS"


def two_cameras(folder: Path) -> None:
    """Imitates with two cameras, then looks with the row as it was, with cameras swapped, and with one for both keys."""
    row, swapped, same = (
        dict(zip(("cam", "side_cam"), names)) for names in (("cam", "side_cam"), ("side_cam", "cam"), 2 * ("cam",))
    )
    view = {"side_cam": ((0.5, 0.5, 0.4), (0.0, 0.0, 0.05))}
    TASKS["Two"] = dataclasses.replace(LIFT, isaac="Tabletop-Lift-Cube-v0", cameras=row, views=view)
    args = sft_gr00t.Args(
        task="Two", checkpoint=str(ROOT / "checkpoints/tiny"), demos=128, steps=60, batch_size=64, num_envs=64,
        eval_episodes=0, device="cpu", frames=4, exp_name="two",
    )  # fmt: skip
    policy, found = sft_gr00t.Gr00tActor(sft_gr00t.check(args)), []

    def act(obs, draw, explore=False):
        return policy.act(obs, Noise("cpu", ONE, 1, draw))["action"]

    with Run(vars(args), sft_gr00t.__file__, ONE, args.exp_name, args.steps, "cpu") as run:
        with sft_gr00t.make_env(args, policy.camera_size, run.dir, ONE) as env:
            sft_gr00t.train(args, env, policy, run, ONE)
            for cameras in (row, swapped, same):
                env.task = dataclasses.replace(env.task, cameras=cameras)
                episode, lines = check_task(env, env.task.expert, None, policy.chunk, 3)
                lines += check_policy(env, episode, act, policy.processor, policy.texts, True)
                found.append({line.name: line.verdict for line in lines})
                print(*lines, sep="\n")
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    two_cameras(Path(sys.argv[1]))
