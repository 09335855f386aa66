"""Policies of ppo_isaac.py as ONNX and TorchScript: onnxruntime and torch.jit against the network itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import ppo_isaac
from tasks import stock
from tasks.stock import Spaces

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.05  # on actions of KINDS["normalised and clipped"], which random networks exceed
FREE = gym.spaces.Box(-np.inf, np.inf, (2,))
KINDS = {  # action space, size of an observation, settings
    "plain": (FREE, 5, {"activation": "tanh"}),
    "normalised and clipped": (gym.spaces.Box(-LIMIT, 7.0, (2,)), 5, {"normalize_obs": True, "clip_actions": 2 * LIMIT}),
    "recurrent": (FREE, 3, {"recurrent": True, "lstm_size": 7, "normalize_obs": True}),
    "numbered actions": (gym.spaces.MultiDiscrete([3, 2]), 5, {"activation": "relu"}),
}


def saved_policy(folder: Path, spaces: Spaces, **flags) -> tuple[ppo_isaac.ActorCritic, ppo_isaac.Args]:
    """A checkpoint with random weights and statistics."""
    torch.manual_seed(0)
    args = ppo_isaac.Args(checkpoint=str(folder), device="cpu", hidden=(16, 8), **flags)
    policy = ppo_isaac.ActorCritic(spaces, args)
    policy.actor.layers[-1].weight.data.normal_()
    if args.normalize_obs:
        policy.obs_norm.update(3 + 5 * torch.randn(50, *spaces.obs), ppo_isaac.Ranks(0, 1))
    folder.mkdir(parents=True)
    policy.save(folder)
    return policy, args


@pytest.mark.parametrize("kind", KINDS)
def test_both_files_act_like_the_network(kind, tmp_path):
    space, size, flags = KINDS[kind]
    box = isinstance(space, gym.spaces.Box)
    spaces = Spaces((size,), (), 2 if box else 0, () if box else (3, 2))
    policy, args = saved_policy(tmp_path / "best", spaces, **flags)
    cfg = stock.parse_config("Isaac-Cartpole-Direct", "cpu", 1, ())
    cfg.action_space = space
    folder = ppo_isaac.export(args, cfg)
    assert sorted(path.name for path in folder.iterdir()) == ["deployment.json", "policy.onnx", "policy.pt"]
    session, script = onnxruntime.InferenceSession(folder / "policy.onnx"), torch.jit.load(folder / "policy.pt")
    for n in (1, 6):
        state = torch.zeros(2, n, args.lstm_size) if args.recurrent else None
        inputs = [state] * 2  # of each file
        for _ in range(4):
            obs = 3 + 5 * torch.randn(n, size)
            action, _, state = policy.act(obs, None, state, torch.zeros(n, dtype=torch.bool))
            if box and space.bounded_below.all():
                assert (action < -LIMIT).any() or (action > 2 * LIMIT).any()
                action = action.clamp(-LIMIT, 2 * LIMIT)
            more = [{"state": x} if args.recurrent else {} for x in inputs]
            found = [
                session.run(None, {"obs": obs.numpy()} | {k: v.numpy() for k, v in more[0].items()}),
                script(obs, **more[1]),
            ]
            found[1] = found[1] if args.recurrent else (found[1],)
            for result in found:
                np.testing.assert_allclose(result[0], action.numpy(), rtol=0, atol=1e-5)
            if args.recurrent:
                inputs = [torch.as_tensor(result[1]) for result in found]
                assert all((x - state).abs().max() < 1e-5 for x in inputs) and state.abs().max() > 0.1
        assert len(action.unique(dim=0)) > 1 or n == 1
    names = {x.name for x in onnx.load(folder / "policy.onnx").graph.initializer} | set(script.state_dict())
    assert not [name for name in names for word in ("critic", "moments", "return", "log_std") if word in name]
    told = json.loads((folder / "deployment.json").read_text())
    assert told["control_period"] == pytest.approx(2 / 120) and told["observation"]["size"] == size
    assert told["action"]["scale"] == 100.0 and told["action"]["size"] == 2
    assert told["inputs"] == [x.name for x in session.get_inputs()] and told["outputs"] == [
        x.name for x in session.get_outputs()
    ]
    low, high = ([-LIMIT] * 2, [2 * LIMIT] * 2) if "clip" in kind else (None, None)
    assert (told["action"]["low"], told["action"]["high"]) == (pytest.approx(low), pytest.approx(high))


def test_export_starts_no_simulator_and_tells_a_tasks_terms(tmp_path):
    """By the command line, where no asset can be found."""
    saved_policy(tmp_path / "best", Spaces((32,), (), 7, ()), task="Isaac-Reach-Franka", clip_actions=3.0)
    command = [sys.executable, str(ROOT / "ppo_isaac.py"), "--export", "--checkpoint", "best", "--device", "cpu"]
    env = os.environ | {"ISAACSIM_ASSET_ROOT": str(tmp_path / "nowhere")}
    done = subprocess.run([*command, "--overrides", "env.decimation=4"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "exported: best/exported\n", done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    told = json.loads((tmp_path / "best/exported/deployment.json").read_text())
    assert told["control_period"] == pytest.approx(4 / 120)
    assert [x["name"] for x in told["observation"]["terms"]["policy"]] == ["joint_pos", "joint_vel", "pose_command", "actions"]
    (term,) = told["action"]["terms"]
    assert term["joint_names"] == ["panda_joint.*"] and term["scale"] == 0.5 and term["use_default_offset"] is True
