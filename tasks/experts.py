"""Scripted experts for Isaac Lab's own tasks."""
import math
import torch
from torch import Tensor
from isaaclab.utils.math import (
    axis_angle_from_quat, quat_apply, quat_from_matrix, quat_mul, quat_conjugate, matrix_from_quat, quat_unique)

FINGERTIP = 0.1034


def TRACE(env):
    r = env.scene["robot"]; ob = env.scene["object"].data.root_pos_w.torch[0]
    return [round(x, 3) for x in r.data.joint_pos.torch[0].tolist()], [round(x, 3) for x in hand_pose(env)[0][0].tolist()], [round(x, 3) for x in ob.tolist()]


def hand_pose(env):
    """Grasp point (N, 3) [m] and rotation (N, 4) of the hand, x, y, z, w; both in the world."""
    robot = env.scene["robot"]
    body = robot.find_bodies("panda_hand")[0][0]
    position, rotation = robot.data.body_pos_w.torch[:, body], robot.data.body_quat_w.torch[:, body]
    tip = quat_apply(rotation, position.new_tensor([0, 0, FINGERTIP]).expand_as(position))
    return position + tip, rotation


def joint_step(env, motion):
    """Change of the arm's joints (N, 7) [rad] that moves the grasp point by `motion` (N, 6) [m, rad]: damped least squares."""
    robot = env.scene["robot"]
    body = robot.find_bodies("panda_hand")[0][0]
    jacobian = robot.data.body_link_jacobian_w.torch[:, body - 1, :, :7].clone()  # the base is fixed and has no row
    tip = hand_pose(env)[0] - robot.data.body_pos_w.torch[:, body]
    jacobian[:, :3] += torch.linalg.cross(jacobian[:, 3:], tip[:, :, None].expand(-1, -1, 7), dim=1)
    square = jacobian @ jacobian.mT + 0.05**2 * torch.eye(6, device=jacobian.device)
    return (jacobian.mT @ torch.linalg.solve(square, motion[:, :, None])).squeeze(-1)


def gravity_torque(env):
    """(N, 7) [N m] that the arm's joints need to hold the robot's own weight."""
    robot = env.scene["robot"]
    jacobian = robot.data.body_com_jacobian_w.torch[:, :, 2, :7]  # (N, bodies, 7) upward
    mass = robot.data.body_mass.torch[:, 1:, None]
    return 9.81 * (jacobian * mass).sum(1)


def turn_to(rotation, x, z):
    """Rotation vector (N, 3) [rad] that turns `rotation` (N, 4) to the axes x, z (N, 3)."""
    target = quat_from_matrix(torch.stack([x, torch.linalg.cross(z, x), z], -1))
    return axis_angle_from_quat(quat_unique(quat_mul(target, quat_conjugate(rotation))))


def limited(vector, length):
    return vector * (length / vector.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)


def down(rotation, cube):
    """Rotation vector that lets the hand point down and its fingers be parallel to faces of a cube (N, 4), the nearest ones."""
    hand, cube = matrix_from_quat(rotation), matrix_from_quat(cube)
    side = cube[:, :, 0]
    # a cube that lies on another face: any horizontal edge
    side = torch.where(side[:, 2:].abs() > 0.7, cube[:, :, 1], side)
    angle = torch.atan2(side[:, 1], side[:, 0]) - torch.atan2(hand[:, 1, 0], hand[:, 0, 0])
    angle = (angle + math.pi / 4) % (math.pi / 2) - math.pi / 4
    yaw = torch.atan2(hand[:, 1, 0], hand[:, 0, 0]) + angle
    x = torch.stack([yaw.cos(), yaw.sin(), torch.zeros_like(yaw)], 1)
    z = torch.tensor([0.0, 0, -1]).to(x).expand_as(x)
    return turn_to(rotation, x, z)


def lift_object(env):
    robot, thing = env.scene["robot"], env.scene["object"].data
    tip, rotation = hand_pose(env)
    goal = thing.root_pos_w.torch
    delta = goal - tip
    lateral = delta[:, :2].norm(dim=1)
    fingers = robot.data.joint_pos.torch[:, 7:]
    width = fingers.sum(1)
    turn = down(rotation, thing.root_quat_w.torch)
    ready = (lateral < 0.01) & (delta[:, 2].abs() < 0.012) & (turn.norm(dim=1) < 0.2)
    near = (lateral < 0.02) & (delta[:, 2].abs() < 0.025)
    closing = near & (ready | (width < 0.07))
    grasped = near & (width < 0.056)
    height = goal[:, 2] + (3 * (lateral - 0.01)).clamp(0, 0.1)
    height = torch.where(grasped, torch.full_like(height, 0.45), height)
    motion = torch.cat([delta[:, :2], (height - tip[:, 2])[:, None]], 1)
    motion = torch.where((closing & ~grasped)[:, None], 0.0, limited(motion, 0.06))
    motion = torch.cat([motion, limited(turn, 0.15)], 1)
    stiffness = robot.data.joint_stiffness.torch[:, :7]
    damping = robot.data.joint_damping.torch[:, :7]
    # (K a - D v = 0): velocity wanted = step / time
    speed = joint_step(env, motion) / 0.15
    action = torch.zeros(env.num_envs, 9, device=env.device)
    action[:, :7] = (gravity_torque(env) + damping * speed) / stiffness / 0.1
    action[:, 7:] = torch.where(closing, -1.0, 1.0)[:, None]
    return action


def open_drawer(env):
    robot = env.scene["robot"]
    frame = env.scene["cabinet_frame"].data
    handle, axes = frame.target_pos_w.torch[:, 0], matrix_from_quat(frame.target_quat_w.torch[:, 0])
    along, up, into = axes.unbind(-1)
    c, s = math.cos(math.radians(PITCH)), math.sin(math.radians(PITCH))
    ahead, across = c * into - s * up, s * into + c * up
    tip, rotation = hand_pose(env)
    turn = turn_to(rotation, along, ahead)
    delta = handle + DEEP * ahead - tip
    depth, lateral, slide = ((delta * axis).sum(1) for axis in (ahead, across, along))
    lateral, angle = lateral.abs(), turn.norm(dim=1)
    away = (lateral**2 + slide**2).sqrt()
    width = robot.data.joint_pos.torch[:, 7:].sum(1)
    around = slide.abs() < 0.05
    ready = (lateral < 0.012) & (depth.abs() < 0.012) & (angle < 0.3)
    near = (lateral < 0.025) & (depth.abs() < 0.025) & around
    closing = near & (ready | (width < 0.07))
    closing = closing & ((width > 0.012) | (angle < 0.1) & (lateral < 0.005) & (depth.abs() < 0.005))
    held = near & closing & (width < 0.035)
    back = (3 * (away - 0.015) + 0.3 * (angle - 0.2)).clamp(0, 0.1)  # stay in front of the handle until aligned
    motion = limited(delta - back[:, None] * ahead, 0.1)
    motion = torch.where(held[:, None], delta - PULL * (1 - delta.norm(dim=1, keepdim=True) / 0.02).clamp(0.1, 1) * into, motion)
    motion = torch.cat([motion, limited(turn, 0.5)], 1)
    q = robot.data.joint_pos.torch[:, :7]
    K, D = robot.data.joint_stiffness.torch[:, :7], robot.data.joint_damping.torch[:, :7]
    lag = D / K + 1.65
    low, high = robot.data.soft_joint_pos_limits.torch[:, :7].unbind(-1)
    hold = q + gravity_torque(env) / K
    step = joint_step(env, motion) / TAU * lag
    room = torch.where(step > 0, high - hold, hold - low).clamp(min=0.0)
    scale = (room / step.abs().clamp(min=1e-6)).amin(1, keepdim=True).clamp(0.3, 1)
    target = hold + scale * step
    action = torch.empty(env.num_envs, 8, device=env.device)
    action[:, :7] = (2 * (target - low) / (high - low) - 1).clamp(-1, 1)
    action[:, 7] = torch.where(closing, -1.0, 1.0)
    env._dbg = (depth, lateral, slide, angle, width, closing, held, scale[:, 0])
    return action



TAU, PULL, PITCH, DEEP = 0.3, 0.15, 50, 0.018
GAIN = 5.0


def TRACE(env):
    r = env.scene["robot"]
    out = [round(x, 3) for x in r.data.joint_pos.torch[0].tolist()], [round(x, 3) for x in hand_pose(env)[0][0].tolist()]
    if "cabinet" in env.scene.keys():
        f = env.scene["cabinet_frame"].data
        out += [round(x, 3) for x in f.target_pos_w.torch[0, 0].tolist()], [round(float(x[0]), 3) for x in getattr(env, "_dbg", ())]
    return out


EDGE = 0.0468


def stack_cubes(env):
    robot = env.scene["robot"]
    position = torch.stack([env.scene[f"cube_{i}"].data.root_pos_w.torch for i in (1, 2, 3)], 1)  # (N, 3, 3)
    quat = torch.stack([env.scene[f"cube_{i}"].data.root_quat_w.torch for i in (1, 2, 3)], 1)
    tip, rotation = hand_pose(env)
    width = robot.data.joint_pos.torch[:, 7:].sum(1)
    red_placed = on_top(position[:, 1], position[:, 0])
    done = red_placed & on_top(position[:, 2], position[:, 1])
    goal = torch.where(red_placed[:, None], position[:, 2], position[:, 1])
    goal_quat = torch.where(red_placed[:, None], quat[:, 2], quat[:, 1])
    base = torch.where(red_placed[:, None], position[:, 1], position[:, 0])
    other = torch.where(red_placed[:, None], position[:, 0], position[:, 2])
    turn = down(rotation, goal_quat)
    delta = goal - tip
    lateral = delta[:, :2].norm(dim=1)
    ready = (lateral < 0.01) & (delta[:, 2].abs() < 0.01) & (turn.norm(dim=1) < 0.2)
    near = (lateral < 0.02) & (delta[:, 2].abs() < 0.025) & ~done
    closing = near & (ready | (width < 0.07))
    calm = robot.data.joint_vel.torch[:, 7:].abs().amax(1) < 0.03  # the fingers no longer bounce off the cube
    held = near & (width < EDGE + 0.006) & (calm | (delta[:, 2].abs() + goal[:, 2] > 99))
    # to the cube: above it until over it; away from other cubes first upwards
    crowd = (position - tip[:, None]).norm(dim=2).amin(1) < 0.04
    release = (width < 0.07) & crowd & ~closing  # let go before moving
    height = goal[:, 2] + (3 * (lateral - 0.01)).clamp(0, 0.14)
    low = tip[:, 2] < height - 0.03
    reach = torch.cat([torch.where((low & (lateral > 0.03))[:, None], 0.0, delta[:, :2]), (height - tip[:, 2])[:, None]], 1)
    # with the cube: to its place, by the cube's own position
    way = base + torch.tensor([0, 0, EDGE + 0.001], device=tip.device) - goal
    far = way[:, :2].norm(dim=1)
    lift = way[:, 2] + (3 * (far - 0.004)).clamp(0, 0.07)
    carry = torch.cat([torch.where((lift > 0.03)[:, None], 0.0, way[:, :2]), lift[:, None]], 1)
    motion = torch.where(held[:, None], limited(carry, 0.06), reach)
    motion = torch.where(((closing & ~held) | release)[:, None], 0.0, motion)
    up = torch.zeros_like(motion)
    up[:, 2] = 0.25 - tip[:, 2]
    motion = torch.where((done & ~release)[:, None], up, motion)
    turn = torch.where((done | closing)[:, None], 0.0, turn)
    action = torch.empty(env.num_envs, 7, device=env.device)
    action[:, :3] = GO * limited(motion, 0.1)
    action[:, 3:6] = GO * limited(turn, 0.5)
    action[:, 6] = torch.where(closing, -1.0, 1.0)
    env._dbg = (red_placed, done, delta[:, 2], lateral, turn.norm(dim=1), width, closing, held, release, far, way[:, 2])
    return action


GO = 2.0


def on_top(upper, lower):
    """(N,) whether a cube lies on another."""
    d = upper - lower
    return (d[:, :2].norm(dim=1) < 0.025) & ((d[:, 2] - EDGE).abs() < 0.006)


def TRACE(env):
    r = env.scene["robot"]
    f = lambda x: [round(v, 3) for v in x[0].tolist()]
    out = [r.data.joint_pos.torch[0, 7:].tolist(), f(hand_pose(env)[0])]
    if "cube_1" in env.scene.keys():
        out += [f(env.scene[f"cube_{i}"].data.root_pos_w.torch) for i in (1, 2, 3)]
    return out, [round(float(x[0]), 3) for x in getattr(env, "_dbg", ())]
