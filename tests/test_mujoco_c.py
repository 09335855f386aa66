"""C MuJoCo in place of Warp's kernels on a CPU: the same physics, each world's own and current parameters, what it refuses.

Two solvers, one of float32 and one of float64, agree to rounding until contacts amplify it. They also turn the friction
pyramid of a capsule on a plane differently. So tasks without contacts are held to a bound in all worlds and steps, tasks with
contacts in the median world, over the worlds whose first episode still runs.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
N, STEPS, CHANGE = 16, 30, 10  # environments, steps, and the step before which a second reset changes parameters

# task: bound on observations' differences, about ten times what was seen; quantile of the worlds it holds for; steps
AGREEMENT = {
    "Isaac-Cartpole-Direct": (3e-5, 1.0, STEPS),
    "Isaac-Reach-Franka": (2e-4, 1.0, STEPS),
    "Isaac-Open-Drawer-Franka": (3e-5, 1.0, STEPS),
    "Isaac-Ant-Direct": (3e-4, 0.5, STEPS),
    "Isaac-Humanoid-Direct": (5e-4, 0.5, 20),  # afterwards most have fallen
    "IsaacContrib-Stack-Cube-Franka-IK-Rel": (1e-3, 0.5, STEPS),
}


# ---------------------------------------------------------------- in a process of its own
def randomise(cfg) -> None:
    """Masses, frictions and gains that differ between environments and change at every reset."""
    from isaaclab.envs import mdp
    from isaaclab.managers import EventTermCfg, SceneEntityCfg

    robot = SceneEntityCfg("robot", body_names=".*")
    joints = SceneEntityCfg("robot", joint_names=".*")
    scale = {"operation": "scale"}
    cfg.events.mass = EventTermCfg(
        func=mdp.randomize_rigid_body_mass, mode="reset",
        params={"asset_cfg": robot, "mass_distribution_params": (0.5, 2.0), **scale},
    )  # fmt: skip
    cfg.events.armature = EventTermCfg(
        func=mdp.randomize_joint_parameters, mode="reset",
        params={"asset_cfg": joints, "armature_distribution_params": (0.5, 2.0), **scale},
    )  # fmt: skip
    cfg.events.gains = EventTermCfg(
        func=mdp.randomize_actuator_gains, mode="reset",
        params={"asset_cfg": joints, "damping_distribution_params": (0.1, 0.5), "operation": "abs"},
    )  # fmt: skip
    friction = {"static_friction_range": (0.3, 1.2), "dynamic_friction_range": (0.3, 1.2), "restitution_range": (0.0, 0.0)}
    cfg.events.friction = EventTermCfg(
        func=mdp.randomize_rigid_body_material, mode="reset", params={"asset_cfg": robot, "num_buckets": 64, **friction}
    )


def simulate(task: str, physics: str | None, kind: str, out: Path) -> None:
    """Steps a task with random actions; leaves observations, rewards, ends and facts about the solver in a file."""
    import logging

    import gymnasium as gym
    import numpy as np
    from isaaclab.sensors import ContactSensorCfg

    from tasks.stock import flatten, start_simulator, task_config

    logger, lines = logging.getLogger("tasks"), []
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    cfg = task_config(task, "cpu", N, physics, (), {})
    if kind == "random":
        randomise(cfg)
    if kind == "contacts":
        cfg.scene.contact = ContactSensorCfg(prim_path="{ENV_REGEX_NS}/Robot/.*")
    with start_simulator(cfg, "cpu", False, out.with_suffix(".log")) as ready:
        env = gym.make(task, cfg=cfg).unwrapped
        env.reset(seed=0)
        ready()
        from isaaclab_newton.physics import NewtonManager

        solver, generator, found = NewtonManager._solver, torch.Generator().manual_seed(0), []
        facts = {"lines": [line for line in lines if line.startswith("physics:")], "models": len(getattr(solver, "models", []))}
        for step in range(STEPS if kind != "contacts" else 1):
            if kind == "random" and step == CHANGE:
                env.reset(seed=1)
            action = torch.rand(N, env.single_action_space.shape[0], generator=generator) * 2 - 1
            groups, reward, terminated, truncated, _ = env.step(action)
            found.append((flatten(groups["policy"]).clone(), reward.clone(), terminated | truncated))
        if getattr(solver, "rollout", None):
            facts["models"] = len(solver.models)
            # stepped with what Newton's model holds now, in every world
            worlds = [solver.models[i % len(solver.models)] for i in range(N)]
            names = ("body_mass", "body_inertia", "geom_friction", "dof_armature", "dof_damping", "actuator_gainprm")
            for name in names:
                warp = np.broadcast_to(getattr(solver.mjw_model, name).numpy(), (N, *getattr(worlds[0], name).shape))
                facts[name] = {
                    "current": all(np.array_equal(getattr(m, name).astype("f"), x) for m, x in zip(worlds, warp)),
                    "differs": len({x.tobytes() for x in warp}),
                }
            # a step depends on the state and the inputs alone
            state, results = (solver.qpos.copy(), solver.qvel.copy()), []
            for _ in range(2):
                solver.qpos[:], solver.qvel[:] = state
                solver._mujoco_warp_step()
                results.append(np.concatenate([solver.qpos, solver.qvel], 1))
                for _ in range(3):
                    solver._mujoco_warp_step()
            facts["repeats"] = bool(np.array_equal(*results)) and not np.array_equal(
                results[0][:, : solver.qpos.shape[1]], state[0]
            )
        obs, reward, ended = (torch.stack(x) for x in zip(*found))
        torch.save({"obs": obs, "reward": reward, "ended": ended}, out)
        out.with_suffix(".json").write_text(json.dumps(facts))
        env.close()


# ---------------------------------------------------------------- tests
def start(folder: Path, task: str, physics: str | None = None, kind: str = "plain"):
    """The process of a simulation, and where it leaves its tensors."""
    out = folder / f"{task}-{physics}-{kind}.pt"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return warm.start([__file__, task, str(physics), kind, str(out)], folder, env), out


def run(folder: Path, *args) -> tuple[dict, dict]:
    """Tensors (STEPS, N, ...) of a simulation, and facts about its solver."""
    process, out = start(folder, *args)
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-2000:] + err[-3000:]
    return torch.load(out), json.loads(out.with_suffix(".json").read_text())


def check_agreement(warp: dict, c: dict, bound: float, quantile: float, steps: int) -> None:
    """Observations and rewards agree over the first episodes, which end at the same steps where all worlds are compared."""
    ended = (warp["ended"] | c["ended"])[:steps].cumsum(0) > 0  # an end shows the next episode's start
    assert (~ended).float().mean() > 0.5
    for name in ("obs", "reward"):
        difference = (warp[name] - c[name])[:steps].abs().reshape(steps, N, -1).amax(2)
        for row, over in zip(difference, ended):
            assert over.all() or torch.quantile(row[~over], quantile) < bound, (name, row)
    assert warp["obs"][:steps].std(0).max() > 0.05  # something moves
    if quantile == 1.0:
        assert torch.equal(warp["ended"][:steps], c["ended"][:steps])


@pytest.mark.slow
@pytest.mark.parametrize("task", AGREEMENT)
def test_the_same_physics(task, tmp_path):
    """Ant and Humanoid have contacts, and joint wrenches among their observations."""
    (warp, by_warp), (c, by_c) = run(tmp_path, task, "newton_mjwarp"), run(tmp_path, task)
    assert not by_warp["lines"] and by_warp["models"] == 0
    assert len(by_c["lines"]) == 1 and by_c["lines"][0].startswith("physics: C MuJoCo on the CPU") and by_c["repeats"]
    assert by_c["models"] == (
        1 if task.endswith("Direct") else N
    )  # Franka's drawers differ in friction, its tables in position
    check_agreement(warp, c, *AGREEMENT[task])


def test_every_world_has_its_own_and_current_parameters(tmp_path):
    """Masses, frictions, armatures and gains that each reset draws anew: as Warp steps them, in both halves of the run."""
    (warp, _), (c, facts) = (
        run(tmp_path, "Isaac-Ant", "newton_mjwarp", "random"),
        run(tmp_path, "Isaac-Ant", "mujoco_c", "random"),
    )
    assert facts["models"] == N and facts["repeats"] and facts["lines"][0].startswith("physics: C MuJoCo on the CPU")
    for name in ("body_mass", "body_inertia", "geom_friction", "dof_armature"):
        assert facts[name] == {"current": True, "differs": N}, (name, facts[name])
    assert all(facts[name]["current"] for name in ("dof_damping", "actuator_gainprm"))
    for half in (slice(CHANGE), slice(CHANGE, 2 * CHANGE)):
        check_agreement({k: v[half] for k, v in warp.items()}, {k: v[half] for k, v in c.items()}, 3e-4, 0.5, CHANGE)


def test_contact_sensors_are_left_to_warp_or_refused(tmp_path):
    _, facts = run(tmp_path, "Isaac-Ant", None, "contacts")
    assert facts["lines"] == [
        "physics: Newton MuJoCo-Warp on the CPU: a sensor reads contacts, which only Warp's solver reports"
    ]
    assert facts["models"] == 0
    process, _ = start(tmp_path, "Isaac-Ant", "mujoco_c", "contacts")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "--physics mujoco_c: cannot step this task (a sensor reads contacts" in err and "use --physics newton_mjwarp" in err
    assert "Traceback" not in err


def test_a_gpu_is_refused_before_the_simulator_starts():
    from tasks import gr00t, stock

    for config in (
        lambda: stock.task_config("Isaac-Cartpole-Direct", "cuda:0", 2, "mujoco_c", (), {}),
        lambda: gr00t.task_config("Isaac-Open-Drawer-Franka", "cuda:0", 2, 64, "mujoco_c", None),
        lambda: gr00t.task_config("Tabletop-Lift-Cube-v0", "cuda:0", 2, 64, "mujoco_c", None),
    ):
        with pytest.raises(SystemExit) as error:
            config()
        assert str(error.value).startswith("--physics mujoco_c: steps on a CPU only, not on cuda:0; use --device cpu")


def test_who_steps_is_in_the_configuration():
    from tasks import stock
    from tasks.stock import C_MANAGERS

    def manager(device: str, physics: str | None) -> str:
        return str(stock.task_config("Isaac-Cartpole-Direct", device, 2, physics, (), {}).sim.physics.class_type)

    assert manager("cpu", None) == C_MANAGERS[0] and manager("cpu", "mujoco_c") == C_MANAGERS[1]
    for device, physics in (("cpu", "newton_mjwarp"), ("cuda:0", None), ("cuda:0", "newton_mjwarp")):
        assert manager(device, physics).endswith("NewtonMJWarpManager")


if __name__ == "__main__":
    simulate(sys.argv[1], None if sys.argv[2] == "None" else sys.argv[2], sys.argv[3], Path(sys.argv[4]))
