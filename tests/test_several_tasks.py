"""Several tasks at once, over the ranks of torchrun: rows, gradients, figures and files of each; no simulator."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

import grpo_gr00t
import ppo_gr00t_frozen
import ppo_gr00t_lora
import sft_gr00t
from common import Metrics, Noise, Ranks, Run, StageTimer, saved_args
from gr00t_n1d5 import Gr00tN1d5, check_checkpoint
from tasks import gr00t as tasks
from tasks.gr00t import TASKS
from tests.test_common import on_two_ranks

torch.set_num_threads(1)
LIFT, DRAWER, SUITE = "Tabletop-Lift-Cube-v0", "Isaac-Open-Drawer-Franka", "Tabletop-Suite-v0"
BOTH, ALONE = (LIFT, DRAWER), Ranks(0, 1)
ENDS = {LIFT: (1, 99, 3, 99, 2, 99, 99, 4), DRAWER: (2, 99, 1, 99, 99, 99, 99, 99)}  # the drawer's second group is not mixed


def observation(task: str, n: int, seed: int) -> TensorDict:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    state = torch.randn(n, TASKS[task].sizes["state"], generator=g)
    return TensorDict({"images": images, "state": state, "prompt": torch.arange(n) % len(TASKS[task].instructions)}, n)


def demonstrations(task: str) -> tuple[TensorDict, TensorDict]:
    found, g = observation(task, 30 + 10 * BOTH.index(task), 3), torch.Generator().manual_seed(4)
    found["action"] = 1 + BOTH.index(task) + torch.randn(len(found), 8, TASKS[task].sizes["action"], generator=g)
    return found[:20], found[20:]


class Episodes:
    """In the place of ChunkEnv: generated observations, and success of episode i with its ENDS[task][i]-th chunk."""

    terminations = SimpleNamespace(get_term=lambda name: torch.zeros(8, dtype=torch.bool))

    def __init__(self, task: str):
        self.name, self.task, self.ends, self.num_envs = task, TASKS[task], torch.tensor(ENDS[task]), len(ENDS[task])

    def reset(self, seed: int, *_) -> TensorDict:
        self.chunks = 0
        return self.observe()

    def step_chunk(self, actions, last: bool = False) -> TensorDict | None:
        self.chunks += 1
        return None if last else self.observe()

    def observe(self) -> TensorDict:
        obs, time = observation(self.name, self.num_envs, self.chunks), torch.full((self.num_envs, 1), self.chunks / 5)
        return obs.set("critic", torch.cat([obs["state"], time], 1))

    @property
    def ended(self):
        return self.ends <= self.chunks

    success = ended

    @property
    def reward(self):
        return (self.ends == self.chunks).float()


def imitate(ranks: Ranks, folder: Path) -> None:
    """sft_gr00t.py's own `train`, on generated demonstrations of each rank's task."""
    os.environ["WANDB_MODE"] = "disabled"
    os.chdir(folder)
    sft_gr00t.collect = lambda *_: demonstrations(tasks.rank_task(BOTH))
    args = sft_gr00t.check(
        sft_gr00t.Args(BOTH, device="cpu", num_envs=8, steps=3, batch_size=8, eval_episodes=0, exp_name="both")
    )
    policy = sft_gr00t.Gr00tActor(args)
    with Run(vars(args), sft_gr00t.__file__, ranks, args.exp_name, args.steps, "cpu") as run:
        sft_gr00t.train(args, SimpleNamespace(), policy, run, ranks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of two embodiments, as sft_gr00t.py leaves it."""
    folder = tmp_path_factory.mktemp("imitation")
    on_two_ranks(imitate, folder)
    return folder / "runs/both/checkpoints/last"


def test_imitation_writes_an_entry_of_each_task(checkpoint):
    metadata = json.loads((checkpoint / "experiment_cfg/metadata.json").read_text())
    assert set(metadata) == set(BOTH) and Gr00tN1d5.from_pretrained(checkpoint).config.num_embodiments == 2
    assert {metadata[task]["data_config"]["embodiment_id"] for task in BOTH} == {0, 1}
    for task in BOTH:
        check_checkpoint(str(checkpoint), None, None, task, TASKS)  # no tag is needed
        action = demonstrations(task)[0]["action"].flatten(0, 1)
        found = [x for key in TASKS[task].action for x in metadata[task]["statistics"]["action"][key]["mean"]]
        torch.testing.assert_close(torch.tensor(found), action.mean(0))
    with pytest.raises(SystemExit, match=f"^--embodiment-tag: needed for .*{DRAWER}, {LIFT}; none fits Isaac-Lift-Franka"):
        check_checkpoint(str(checkpoint), None, None, "Isaac-Lift-Franka", TASKS)
    metadata["again"] = metadata[LIFT]
    copy = checkpoint.parent / "again"
    (copy / "experiment_cfg").mkdir(parents=True)
    (copy / "config.json").write_text((checkpoint / "config.json").read_text())
    (copy / "experiment_cfg/metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(SystemExit, match=f"^--embodiment-tag: needed for .*; {LIFT} and again fit {LIFT}$"):
        check_checkpoint(str(copy), None, None, LIFT, TASKS)


def gradients(policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.net.named_parameters() if p.grad is not None}


def grpo_update(ranks: Ranks, checkpoint: Path, folder: Path) -> None:
    """A rank's first update, of both tasks, and of its own alone with the same samples."""
    TASKS[DRAWER] = replace(TASKS[DRAWER], horizon=40)  # 5 chunks beside the lift's 4
    task, given = tasks.rank_task(BOTH), {"checkpoint": str(checkpoint), "device": "cpu", "group_size": 4, "minibatches": 1}
    given |= {"epochs": 1, "kl_coef": 0.01, "num_envs": 16}
    torch.nn.utils.clip_grad_norm_ = lambda parameters, most: torch.stack([p.grad.norm() for p in parameters]).norm()
    found = {}
    for name, tasks_, world in (("both", BOTH, ranks), ("alone", task, ALONE)):
        args = grpo_gr00t.Args(tasks_, **given)
        policy, env, log = grpo_gr00t.Gr00tActor(args), Episodes(task), Metrics("cpu", world)
        if name == "both":
            episodes = grpo_gr00t.rollout(env, policy, args, 0, ranks, StageTimer("cpu"))
        samples, success = episodes.clone(), env.ends <= len(episodes)
        keep = grpo_gr00t.advantages(samples, success, args, world, log)
        optimizer = torch.optim.AdamW(policy.trainable(), 1e-2)
        plan = grpo_gr00t.plan_minibatches(keep, args, 0, world)
        grpo_gr00t.update(policy, optimizer, samples, plan, args, world, log)
        mixed = int((success.view(-1, 4).sum(1) % 4 > 0).sum()) * 4
        found[name] = {"gradients": gradients(policy), "metrics": log.read(), "episodes": mixed}
        if name == "both":
            found["weights"] = dict(policy.net.named_parameters())
            obs = observation(task, 6, 9)
            found["actions"] = policy.act(obs, Noise("cpu", ALONE, 1))["action"]
            args.eval_episodes, args.num_envs = 16, 16
            found["evaluation"] = grpo_gr00t.evaluate(args, env, policy, ranks)
            if ranks.rank == 0:
                policy.save(folder / "saved")
    torch.save(found, folder / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def updated(checkpoint, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A folder with what rank 0 saved, and what each rank noted in `grpo_update`."""
    folder = tmp_path_factory.mktemp("update")
    on_two_ranks(grpo_update, checkpoint, folder)
    return folder / "saved", [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_first_update_is_the_sum_of_the_tasks(checkpoint, updated):
    """Of the single tasks' gradients, each by its episodes that carry one; an embodiment's layers see their task alone."""
    _, ranks = updated
    assert ranks[0]["both"]["metrics"] == ranks[1]["both"]["metrics"]
    weights = [x["weights"] for x in ranks]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
    episodes = [x["alone"]["episodes"] for x in ranks]
    assert episodes == [8, 4]
    metadata = json.loads((checkpoint / "experiment_cfg/metadata.json").read_text())
    first = 0 if metadata[LIFT]["data_config"]["embodiment_id"] == 0 else 1  # rank whose task has row 0
    total, off = 0.0, 0.0
    for name, found in ranks[0]["both"]["gradients"].items():
        parts = [x["alone"]["gradients"][name] * n / sum(episodes) for x, n in zip(ranks, episodes)]
        if len(found) == 2 and len(parts[0]) == 1:  # of an embodiment: one row of both tasks', all of one task's
            expected = torch.cat([parts[first], parts[1 - first]])
            assert all(part.norm() > 0 for part in parts), name
        else:
            expected = parts[0] + parts[1]
        total, off = total + expected.square().sum(), off + (found - expected).square().sum()
    assert total > 0 and (off / total).sqrt() < 1e-5
    for x in ranks:  # with the rows of both tasks it acts as with its own
        assert x["alone"]["metrics"]["update/first_ratio_error"] < 1e-5


def test_figures_and_files_are_of_both_tasks(updated):
    saved, ranks = updated
    found = ranks[0]["both"]["metrics"]
    assert [found[f"rollout/success_k{i}"] for i in range(3)] == pytest.approx([3 / 4, 1 / 4, 2 / 8])
    assert found["rollout/success"] == pytest.approx(6 / 16)
    assert ranks[0]["evaluation"] == ranks[1]["evaluation"]
    assert ranks[0]["evaluation"]["mean"] == pytest.approx(6 / 16)
    each = ranks[0]["evaluation"]["instructions"]
    names = [f"{text} ({task})" for task in BOTH for text in TASKS[task].instructions]
    assert list(each) == names and [each[name]["episodes"] for name in names] == [4, 4, 8]
    for rank, task in enumerate(BOTH):  # one checkpoint, for each of them alone, too
        args = grpo_gr00t.Args(task, checkpoint=str(saved), device="cpu")
        again = grpo_gr00t.Gr00tActor(args).act(observation(task, 6, 9), Noise("cpu", ALONE, 1))["action"]
        assert torch.equal(again, ranks[rank]["actions"])


# ---------------------------------------------------------------- whole runs


def train(ranks: Ranks, script, checkpoint: Path, folder: Path) -> None:
    """Two iterations of a script, and the second one again, resumed."""
    TASKS[DRAWER] = replace(TASKS[DRAWER], horizon=40)
    os.environ["WANDB_MODE"] = "disabled"
    os.chdir(folder)
    own = {"group_size": 4} if script is grpo_gr00t else {"critic_warmup": 1, "critic_epochs": 2}
    own |= {"category_layers": "lora"} if script is ppo_gr00t_lora else {}
    own |= {"exp_name": "both", "num_envs": 16, "iterations": 2, "save_every": 1, "eval_episodes": 0, "epochs": 1}
    args = script.Args(BOTH, checkpoint=str(checkpoint), device="cpu", **own)
    for resumed in (False, True):
        if resumed:
            ranks.gather(None)  # rank 0 has moved the last checkpoint away
            args = saved_args("runs/both", script.Args)
        policy = script.Gr00tActor(args)
        with Run(vars(args), script.__file__, ranks, "both", 2, "cpu", args.resume) as run:
            assert run.restore(policy.load) == resumed and args.task == BOTH
            script.train(args, Episodes(tasks.rank_task(BOTH)), policy, run, ranks)
        critics = [x for critic in getattr(policy, "critics", ()) for x in critic.state_dict().values()]
        torch.save([*policy.trainable(), *critics], folder / f"{ranks.rank}{resumed:d}.pt")
        if ranks.rank == 0 and not resumed:
            shutil.move("runs/both/checkpoints/step_000002", folder / "whole")


@pytest.mark.parametrize(
    "script", [grpo_gr00t, pytest.param(ppo_gr00t_frozen, marks=pytest.mark.slow), ppo_gr00t_lora], ids=lambda x: x.__name__
)
def test_runs_of_both_tasks(script, checkpoint, tmp_path):
    """Weights, critics and their moments are the same on both ranks, resumed or not, and are saved."""
    on_two_ranks(train, script, checkpoint, tmp_path)
    one, *others = (torch.load(tmp_path / f"{x}.pt") for x in ("00", "10", "01", "11"))
    assert all(len(one) == len(other) and all(map(torch.equal, one, other)) for other in others)
    before, after = (Gr00tN1d5.from_pretrained(x).action_head for x in (checkpoint, tmp_path / "whole"))
    changed = (before.action_decoder.layer2.W != after.action_decoder.layer2.W).flatten(1).any(1)
    assert changed.tolist() == [True, True]
    saved = [(folder / "experiment_cfg/metadata.json").read_text() for folder in (checkpoint, tmp_path / "whole")]
    assert json.loads(saved[0]) == json.loads(saved[1])
    row = json.loads((tmp_path / "runs/both/metrics.jsonl").read_text().splitlines()[0])
    assert row["env_steps"] == 8 * 32 + 8 * 40 and row["rollout/success_k2"] == 2 / 8
    if script is grpo_gr00t:
        return
    critics = [load_file(tmp_path / f"whole/critic{i}.safetensors") for i in ("", "1")]
    # each has seen its own task: 8 episodes of 4 and of 5 chunks, twice
    assert [float(critic["moments"][0, 0]) for critic in critics] == [2 * 8 * 4, 2 * 8 * 5]
    width = Gr00tN1d5.from_pretrained(checkpoint).config.text_hidden_size
    assert [critic["moments"].shape[1] for critic in critics] == [width + TASKS[x].sizes["state"] + 1 for x in BOTH]


# ---------------------------------------------------------------- the command line


def test_ranks_take_tasks_in_turn(monkeypatch):
    assert tasks.find_tasks(LIFT, 3) == LIFT == tasks.rank_task(LIFT) and tasks.task_names(LIFT) == (LIFT,)
    found = tasks.find_tasks((LIFT, "Isaac-Open-Drawer-Franka-v0", LIFT), 6)  # one of them twice: it gets more environments
    assert found == (LIFT, DRAWER, LIFT) and tasks.task_names(found) == BOTH
    monkeypatch.setenv("RANK", "4")
    assert tasks.rank_task(found) == DRAWER and tasks.rank_task(BOTH) == LIFT
    for ranks, names in ((1, BOTH), (3, BOTH), (2, (*BOTH, SUITE))):
        way = f"^--task {' '.join(names)}: ranks take tasks in turn; start torchrun --nproc-per-node {len(names)} or a multiple"
        with pytest.raises(SystemExit, match=f"{way}, not {ranks}$"):
            tasks.find_tasks(names, ranks)
    with pytest.raises(SystemExit, match="^--task: name one"):
        tasks.find_tasks((), 1)


def test_instructions_have_one_numbering(monkeypatch):
    """That of a single task is its own; of several, names and notes are the same on every rank."""
    assert tasks.all_instructions(SUITE, None) == (TASKS[SUITE].instructions, TASKS[SUITE].kept_out, 0)
    assert tasks.all_instructions(LIFT, "lift cube") == (("lift cube",), {}, 0)
    found = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found.append(tasks.all_instructions((LIFT, SUITE, DRAWER), None))
    assert [x.first for x in found] == [0, 2, 12] and len({x.names for x in found}) == 1 and len(found[0].names) == 13
    assert found[0].names[2] == f"lift the red cube ({SUITE})"  # which the other task asks for, too
    assert all(x.notes == {f"{text} ({SUITE})": note for text, note in TASKS[SUITE].kept_out.items()} for x in found)
    prompt, number = found[1].number(torch.tensor([0, 3]))
    assert prompt.tolist() == [2, 5] and number == 13


@pytest.mark.parametrize("script", [grpo_gr00t, ppo_gr00t_frozen, ppo_gr00t_lora, sft_gr00t])
def test_command_lines(script, checkpoint, tmp_path, monkeypatch):
    def parsed(*flags: str):
        monkeypatch.setattr("sys.argv", ["script.py", "--checkpoint", str(checkpoint), "--device", "cpu", *flags])
        return script.parse()

    monkeypatch.setenv("WORLD_SIZE", "2")
    found = parsed("--task", *BOTH)
    assert found.task == BOTH and f"{LIFT}+{DRAWER}" in found.exp_name
    assert parsed("--task", DRAWER, *(["--evaluate"] if script is sft_gr00t else [])).task == DRAWER
    if script is not sft_gr00t:
        with pytest.raises(SystemExit, match="; none fits Isaac-Lift-Franka: sft_gr00t.py makes one$"):
            parsed("--task", LIFT, "Isaac-Lift-Franka")
        return
    for flags, why in (
        (("--task", *BOTH, "--embodiment-tag", "gr1"), "^--embodiment-tag gr1: the tasks are of 2 embodiments"),
        (("--task", *BOTH, "--expert", "x"), "^--expert x: is one task's"),
        (("--task", LIFT, "Isaac-Humanoid"), "^--task Isaac-Humanoid: has no scripted expert"),
    ):
        with pytest.raises(SystemExit, match=why):
            parsed(*flags)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="has fewer embodiments than the tasks, 3; leave it out"):
        parsed("--task", *BOTH, "Isaac-Lift-Franka", "--num-envs", "9", "--batch-size", "9")
    assert (
        parsed("--task", LIFT, SUITE, LIFT, "--embodiment-tag", "gr1", "--num-envs", "9", "--batch-size", "9").task[1] == SUITE
    )
