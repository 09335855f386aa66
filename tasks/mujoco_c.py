"""C MuJoCo steps Newton's tasks on a CPU, several times faster than Warp's kernels do there.

`--physics mujoco_c` asks for it, and on a CPU it is the default. An Isaac Lab configuration carries it as the manager of
its physics (`tasks/stock.py`, `step_in_c`): environments are made as ever, by `gym.make`. Newton compiles one `mjModel` as
the template of all worlds, and C MuJoCo steps that model from each world's positions, velocities and inputs, which are
numpy views of the Warp arrays (shared memory on a CPU). The constraint solver starts cold: a step depends on state and
action alone, so replays are exact. What Newton computes with Warp after a step still comes from Warp: bodies' poses,
observations, images. Contacts are found by MuJoCo, also where a task would have Newton find them.

Isaac Lab reads joint wrenches from the solver, which C MuJoCo's sensors deliver. Contacts and accelerations it does not
get (`missing`): such a task is stepped by Warp, as the log says, or refused where C MuJoCo was asked for.
"""

from __future__ import annotations

import copy
import logging

import mujoco
import numpy as np
import torch
from isaaclab_newton.physics import NewtonManager, NewtonMJWarpManager
from mujoco.rollout import Rollout
from newton.solvers import SolverMuJoCo

log = logging.getLogger(__name__)

PARAMETERS = ("actuator_", "body_", "dof_", "eq_", "geom_", "jnt_", "pair_", "qpos", "site_", "tendon_")
SENSOR, STATE = mujoco.mjtSensor, mujoco.mjtState
# of a site in a body's centre of mass: force and torque of the joint that holds it, in axes that are themselves in the world's
WRENCH = (
    SENSOR.mjSENS_FORCE, SENSOR.mjSENS_TORQUE, SENSOR.mjSENS_FRAMEXAXIS, SENSOR.mjSENS_FRAMEYAXIS, SENSOR.mjSENS_FRAMEZAXIS,
)  # fmt: skip


class MujocoCSolver(SolverMuJoCo):
    """Newton's solver, whose steps C MuJoCo takes once `start` was called."""

    rollout, stale = None, True

    def _init_actuators(self, model, spec, *args):
        """Adds sensors to the specification, which is complete but for actuators when Newton calls this."""
        if "body_parent_f" in model.get_requested_state_attributes():
            for body in spec.bodies[1:]:
                site = body.add_site(name=f"wrench/{body.name}")
                for kind in WRENCH:
                    spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_SITE, objname=site.name)
        return super()._init_actuators(model, spec, *args)

    def start(self, substeps: int, threads: int) -> None:
        """Hands the steps to C MuJoCo.

        Args:
            substeps: steps of C MuJoCo per step of this solver, all with the same inputs.
            threads: worlds stepped at once.
        """
        model, data = self.mj_model, self.mjw_data
        self.models, self.rows, self.dt = [copy.copy(model)], None, None
        self.data, self.rollout = [mujoco.MjData(model) for _ in range(threads)], Rollout(nthread=threads)
        self.qpos, self.qvel = data.qpos.numpy(), data.qvel.numpy()  # (N, nq), (N, nv)
        self.update_data_interval = 1  # tasks count substeps; here, what is written between two steps would be lost
        worlds = len(self.qpos)
        inputs = {  # in MuJoCo's order
            STATE.mjSTATE_CTRL: data.ctrl, STATE.mjSTATE_QFRC_APPLIED: data.qfrc_applied,
            STATE.mjSTATE_XFRC_APPLIED: data.xfrc_applied, STATE.mjSTATE_EQ_ACTIVE: data.eq_active,
            STATE.mjSTATE_MOCAP_POS: data.mocap_pos, STATE.mjSTATE_MOCAP_QUAT: data.mocap_quat,
        }  # fmt: skip
        self.inputs = [x.numpy().reshape(worlds, -1) for x in inputs.values()]
        self.input_spec = sum(int(kind) for kind in inputs)
        width = mujoco.mj_stateSize(model, int(STATE.mjSTATE_FULLPHYSICS))
        self.before, self.after = np.zeros((worlds, width)), np.zeros((worlds, substeps, width))  # time, positions, velocities
        self.control = np.zeros((worlds, substeps, sum(x.shape[1] for x in self.inputs)))
        self.sensed = np.zeros((worlds, substeps, model.nsensordata)) if model.nsensordata else None
        self.wrench_sites = model.sensor_objid[:: len(WRENCH)]
        self.wrench_bodies = self.mjc_body_to_newton.numpy()[:, model.site_bodyid[self.wrench_sites]]  # (N, bodies)
        bound = np.ones(model.nq, bool)  # where a free body began has no part in its dynamics, but differs between worlds
        for start in model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]:
            bound[start : start + 7] = False
        self.fields = [(name, bound if name.startswith("qpos") else slice(None)) for name in dir(model) if self.batched(name)]

    def batched(self, name: str) -> bool:
        """Whether Newton may give a field of the model other values in each world."""
        own, warp = getattr(self.mj_model, name), getattr(self.mjw_model, name, None)
        if not name.startswith(PARAMETERS) or name == "geom_rgba" or not isinstance(own, np.ndarray) or own.dtype.kind != "f":
            return False
        return hasattr(warp, "numpy") and warp.numpy().shape[1:] == own.shape

    def notify_model_changed(self, flags):
        super().notify_model_changed(flags)
        self.stale = True  # randomised masses, frictions, gains: Isaac Lab hands all of them to Newton by this call

    def refresh(self) -> None:
        """Copies what Newton changed in the Warp model into C MuJoCo's models: one for all worlds while they are equal."""
        worlds = len(self.qpos)
        values = [getattr(self.mjw_model, name).numpy()[:, where] for name, where in self.fields]
        values.append(self.mjw_model.opt.gravity.numpy())
        rows = [np.broadcast_to(x, (worlds, *x.shape[1:])).reshape(worlds, -1) for x in values]
        rows = np.concatenate(rows, 1)
        # derived constants, as inverse weights, are rounded differently where environments stand apart
        if len(self.models) == 1 and not np.isclose(rows, rows[:1], 1e-4, 1e-9).all():
            self.models, self.rows = [copy.copy(self.mj_model) for _ in range(worlds)], None
        changed = np.ones(worlds, bool) if self.rows is None else (rows != self.rows).any(1)
        for i in np.flatnonzero(changed[: len(self.models)]):
            self.write(self.models[i], [x[i if len(x) > 1 else 0] for x in values])
        self.rows, self.stale, self.dt = rows, False, None

    def write(self, model: mujoco.MjModel, values: list[np.ndarray]) -> None:
        """Gives a model the parameters of one world; what MuJoCo compiled from others is switched off."""
        for (name, where), value in zip(self.fields, values):
            getattr(model, name)[where] = value
        model.opt.gravity[:] = values[-1]
        if (model.dof_armature > 1e6).any():  # how Newton holds kinematic bodies: by islands, such a table throws cubes
            model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
        model.site_pos[self.wrench_sites] = model.body_ipos[model.site_bodyid[self.wrench_sites]]
        model.site_sameframe[self.wrench_sites] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE

        def other(name):
            return ~np.isclose(getattr(model, name), getattr(self.mj_model, name), atol=1e-6).all(1)

        inertia = model.body_inertia
        round_body = np.ptp(inertia, axis=1) <= 1e-5 * inertia.max(1)  # all axes are its principal ones
        model.body_sameframe[other("body_ipos") | (other("body_iquat") & ~round_body)] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE
        moved = other("geom_pos") | other("geom_quat")
        model.geom_sameframe[moved] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE
        if (moved | (other("geom_size") & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE))).any():
            model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_MIDPHASE  # its bounding boxes are the compiled ones

    def _mujoco_warp_step(self):
        """Advances every world."""
        if self.rollout is None:
            return super()._mujoco_warp_step()
        if self.stale:
            self.refresh()
        dt, nq = float(self.mjw_model.opt.timestep.numpy()[0]) / self.after.shape[1], self.qpos.shape[1]
        if dt != self.dt:
            for model in self.models:
                model.opt.timestep = dt
            self.dt = dt
        self.before[:, 1 : 1 + nq], self.before[:, 1 + nq :] = self.qpos, self.qvel
        self.control[:] = np.concatenate(self.inputs, 1)[:, None]
        self.rollout.rollout(
            self.models * (len(self.qpos) // len(self.models)), self.data, self.before, self.control, skip_checks=True,
            nstep=self.after.shape[1], control_spec=self.input_spec, state=self.after, sensordata=self.sensed,
        )  # fmt: skip
        self.qpos[:], self.qvel[:] = self.after[:, -1, 1 : 1 + nq], self.after[:, -1, 1 + nq :]

    def _update_newton_state(self, model, state, mj_data, state_prev):
        super()._update_newton_state(model, state, mj_data, state_prev)
        if self.rollout is not None and state.body_parent_f is not None:
            force_torque_axes = self.sensed[:, -1].reshape(*self.wrench_bodies.shape, 5, 3)
            wrench = (force_torque_axes[:, :, :2] @ force_torque_axes[:, :, 2:]).reshape(*self.wrench_bodies.shape, 6)
            known = self.wrench_bodies >= 0
            state.body_parent_f.numpy()[self.wrench_bodies[known]] = wrench[known]


def missing(solver: MujocoCSolver, state) -> str | None:
    """What a task needs that C MuJoCo does not do here, or None.

    Args:
        state: of Newton, with the attributes that sensors have asked for.
    """
    model = solver.mj_model
    if NewtonManager._report_contacts:
        return "a sensor reads contacts, which only Warp's solver reports"
    if state.body_qdd is not None:
        return "a sensor reads accelerations, which only Warp's solver reports"
    if getattr(getattr(state, "mujoco", None), "qfrc_actuator", None) is not None:
        return "actuator forces are read, which only Warp's solver reports"
    if mujoco.mj_stateSize(model, int(STATE.mjSTATE_FULLPHYSICS)) != 1 + model.nq + model.nv:
        return "its actuators have activations, histories or plugins, which are not carried over"
    if model.dof_simplenum.any():
        return "it has bodies whose mass C MuJoCo compiles into the model"
    return None


class NewtonMujocoCManager(NewtonMJWarpManager):
    """Isaac Lab's manager of Newton with MuJoCo, which lets C MuJoCo step on a CPU if it can."""

    required = False

    @classmethod
    def _create_solver(cls, model, solver_cfg):
        kwargs = cls._filter_solver_kwargs(SolverMuJoCo, solver_cfg)
        kwargs.pop("ls_parallel", None)  # deprecated
        return MujocoCSolver(model, **kwargs)

    @classmethod
    def _build_solver(cls, model, solver_cfg) -> None:
        super()._build_solver(model, solver_cfg)
        solver, device = NewtonManager._solver, str(cls.get_device())
        if "cpu" not in device:
            if cls.required:
                raise SystemExit(f"--physics mujoco_c: steps on a CPU only, this is {device}; use --physics newton_mjwarp")
            return
        reason = missing(solver, cls.backend.state_0)
        if reason:
            if cls.required:
                raise SystemExit(f"--physics mujoco_c: cannot step this task ({reason}); use --physics newton_mjwarp")
            log.info(f"physics: Newton MuJoCo-Warp on the CPU: {reason}")
            return
        solver.start(NewtonManager._num_substeps, torch.get_num_threads())
        NewtonManager._num_substeps, NewtonManager._solver_dt = 1, cls.get_physics_dt()  # the substeps run in C
        NewtonManager._needs_collision_pipeline = False  # contacts are MuJoCo's own
        solver.mjw_model.opt.run_collision_detection = True
        log.info("physics: C MuJoCo on the CPU, Newton's compiled model (Warp instead: --physics newton_mjwarp)")


class NewtonMujocoCOnlyManager(NewtonMujocoCManager):
    """For `--physics mujoco_c`: refuses what `NewtonMujocoCManager` leaves to Warp."""

    required = True
