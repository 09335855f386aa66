"""Randomisation: what each axis changes and what it leaves alone, groups that share a draw, refusals, the table of axes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import robustness
from tasks.gr00t import TASKS
from tasks.randomize import AXES, Randomization, parse_axes
from tests.sim import chunk_env

LIFT = TASKS["Tabletop-Lift-Cube-v0"]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Two groups of four; the axes are set by each test."""
    with chunk_env(tmp_path_factory.mktemp("sim"), 8, randomize=("distractor:1-1",)) as env:
        yield env


def episode(env, *values, seed=5, group_size=4, push=None):
    """Observations, states and success of an episode in which groups act alike."""
    if env.varied.axes.keys() & {"camera", "dynamics", "distractor"}:  # what stays for good
        env.varied.axes = {axis: (0.0, 0.0) for axis in env.varied.axes}
        env.varied.draw(0)
    env.varied = Randomization(env.env, env.task, parse_axes(values, env.task))
    obs = [env.reset(seed, group_size).clone()]
    actions = 2 * torch.rand(2, 32, 4, generator=torch.Generator().manual_seed(0)) - 1 if push is None else push
    for chunk in actions.repeat_interleave(4, 0).split(8, 1):
        obs.append(env.step_chunk(chunk).clone())
    return torch.stack(obs)  # (5, N)


def same(a, b, *keys):
    return [torch.equal(a[key], b[key]) for key in keys]


def test_members_of_a_group_share_their_draw(env):
    obs = episode(env, "all:1-1")
    assert all((obs[key][:, :4] == obs[key][:, :1]).all() for key in ("images", "state"))
    assert not torch.equal(obs["images"][0, 0], obs["images"][0, 4])
    assert all(same(obs, episode(env, "all:1-1"), "images", "state"))  # the seed decides
    env.reset(6, 4)
    assert all(same(obs[0], env.reset(5, 4), "images", "state"))  # and nothing that was drawn before
    assert not torch.equal(obs["state"], episode(env, "all:1-1", seed=6)["state"])


@pytest.mark.parametrize(
    "axis, first, later",  # whether the first and the later images and states differ from those without
    [("camera", (1, 0), (1, 0)), ("light", (1, 0), (1, 0)), ("start", (1, 1), (1, 1)), ("noise", (0, 1), (0, 1)),
     ("frames", (0, 0), (1, 0)), ("latency", (0, 0), (1, 1)), ("inference", (0, 0), (1, 1)), ("dynamics", (0, 0), (1, 1)),
     ("distractor", (1, 0), (1, 0))],
)  # fmt: skip
def test_an_axis_changes_what_it_says(env, axis, first, later):
    plain, varied = episode(env), episode(env, f"{axis}:1-1")
    if axis == "distractor":
        plain = episode(env, "distractor:0.01-0.01")
    for when, changed in ((slice(0, 1), first), (slice(1, 5), later)):
        found = [not x for x in same(plain[when], varied[when], "images", "state")]
        assert found == [bool(x) for x in changed]
    assert all(same(plain, episode(env, *(("distractor:0.01-0.01",) if axis == "distractor" else ())), "images", "state"))


def test_actions_come_late(env):
    push = torch.zeros(2, 32, 4)
    push[:, :, 0], push[..., 3] = 1.0, 1.0  # along x, 0.025 m a step, hand open
    x = {lag: episode(env, f"latency:{lag / 4}-{lag / 4}", push=push)["state"][1, 0, 0] for lag in (1, 2, 4)}
    assert x[1] - x[2] == pytest.approx(0.025, abs=2e-3)
    assert x[2] - x[4] == pytest.approx(0.05, abs=2e-3)
    sent = torch.arange(6.0)[None, :, None].expand(8, -1, 4)
    env.varied.draw(1)
    arrived = torch.cat([env.varied.delay(sent[:, :3]), env.varied.delay(sent[:, 3:])], 1)[0]
    assert arrived.tolist() == [[0, 0, 0, 1]] * 4 + [[0.0] * 4, [1.0] * 4]  # at rest, hand open, for four steps


def test_what_a_call_takes_is_lost_to_its_chunk(env):
    episode(env, "inference:0.5-0.5")  # two steps
    env.varied.draw(1)
    closed = torch.tensor([1.0, 2.0, 3.0, -1.0])
    sent = closed.expand(8, 6, 4)
    first, second = env.varied.overtake(sent[:, :3])[0].tolist(), env.varied.overtake(sent[:, 3:])[0].tolist()
    go, open_hand, as_it_was = closed.tolist(), [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, -1.0]
    assert first == [open_hand, open_hand, go] and second == [as_it_was, as_it_was, go]
    assert env.varied.overtake(sent[:, :2])[0].tolist() == [as_it_was, go]  # never all of it
    assert env.varied.overtake(sent[:, :1])[0].tolist() == [go]


def test_every_task_with_a_gripper_keeps_it_as_it_was():
    """And nothing else of the action, whichever of its two names the key has."""
    for name in ("Tabletop-Lift-Cube-v0", "RLinf-Stack-Cube", "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor"):
        task = dataclasses.replace(TASKS[name], cameras={})
        hand = Randomization(SimpleNamespace(device="cpu", scene=None), task, {}).hand
        assert hand.tolist() == [False] * (task.sizes["action"] - 1) + [True], name


def test_dynamics_are_what_was_drawn(env):
    episode(env, "dynamics:1-1")
    mass = env.env.scene["red"].data.body_mass.torch[:, 0]
    assert sorted({round(x, 4) for x in (mass / 0.2).tolist()}) in ([0.5], [2.0], [0.5, 2.0])
    solver = env.env.sim.physics_manager._solver
    assert len(solver.models) == 8  # C MuJoCo has one for each world
    gravity = [abs(model.opt.gravity[2]) / 9.81 for model in solver.models]
    assert all(min(abs(g - 1.15), abs(g - 1 / 1.15)) < 1e-4 for g in gravity) and gravity[0] == gravity[3]
    gain = {round(float(model.actuator_gainprm[0, 0]), 1) for model in solver.models}
    assert gain <= {6000.0, 2666.7}
    assert {round(float(model.geom_friction[:, 0].max()), 3) for model in solver.models} <= {1.0, 4.0}


def test_cameras_are_moved_and_turned_by_as_much(env):
    pose = []
    for values in ((), ("camera:1-1",)):
        episode(env, *values)
        data = env.env.scene.sensors["cam"].data
        pose.append((data.pos_w.torch.clone(), data.quat_w_world.torch.clone()))
    (position, quat), (moved, turned) = pose
    assert (moved - position).norm(dim=1).tolist() == pytest.approx([LIFT.ranges.camera[0]] * 8, abs=1e-5)
    angle = 2 * (quat * turned).sum(1).abs().clamp(max=1).acos()
    assert angle.tolist() == pytest.approx([LIFT.ranges.camera[1]] * 8, abs=2e-3)


def test_refusals():
    for value, why in (
        ("wind:1", "no such axis here"), ("camera:2", "strengths are from 0 to 1"), ("camera:1-0.5", "lower one first"),
        ("camera", "must be axis:strength"), ("camera:x", "must be axis:strength"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=f"--randomize {value}: .*{why}"):
            parse_axes((value,), LIFT)
    with pytest.raises(SystemExit, match="camera:1: no such axis here"):
        parse_axes(("camera:1",), TASKS["Isaac-Humanoid"])  # which has none
    assert parse_axes(("0.5", "camera:0"), LIFT) == dict.fromkeys(AXES[1:], (0.0, 0.5))
    assert parse_axes(("latency:0.5-1", "camera:0.2"), LIFT) == {"camera": (0.0, 0.2), "latency": (0.5, 1.0)}


def test_other_words_ask_for_the_same(env):
    from tasks.gr00t import Prompts

    prompts = Prompts(env.env, LIFT, "the blue cube")
    env.env.target[:] = 0
    prompts.fix()
    assert env.env.target.tolist() == [1] * 8


def test_table_of_conditions(tmp_path, monkeypatch):
    """Its flags, its cells, what is finished and kept."""
    ran = []

    def call(command, cwd, **kwargs):
        flags = command[2:]
        name, won = flags[flags.index("--exp-name") + 1], 0.9 if "latency:1-1" not in flags else 0.25
        ran.append(flags)
        (cwd / "runs" / name).mkdir(parents=True)
        (cwd / "runs" / name / "summary.json").write_text(json.dumps({"ode_success": {"mean": won, "episodes": 40}}))
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robustness.subprocess, "call", call)
    args = {"checkpoints": ("a", "b"), "axes": ("latency", "wording"), "strengths": (0.5, 1.0), "physics": ("newton_mjwarp",)}
    robustness.main(robustness.Args(**args))
    table = (tmp_path / "runs/robustness/table.md").read_text().splitlines()
    assert len(ran) == 2 * (1 + 2 + 2 * 3 + 1)
    assert "| latency 1 | 0.250 [" in table[4] and "| physics newton_mjwarp | 0.900 [" in table[8]
    cells = json.loads((tmp_path / "runs/robustness/table.json").read_text())
    assert cells['wording 2: "the red cube"'] == [[72, 80], [72, 80]]  # both instructions
    assert (tmp_path / "runs/robustness/robustness.png").stat().st_size > 5000
    robustness.main(robustness.Args(**args))
    assert len(ran) == 20
    with pytest.raises(SystemExit, match="other --eval-seed"):
        robustness.main(robustness.Args(**args, eval_seed=1))
    with pytest.raises(SystemExit, match="--axes wind: .* has camera"):
        robustness.main(robustness.Args(("a",), axes=("wind",)))
