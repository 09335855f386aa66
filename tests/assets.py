"""Offline mirror of the robots and props of Isaac Lab's stock tasks.

    ISAACSIM_ASSET_ROOT=$(python tests/assets.py) python some_script.py ...

Isaac Lab fetches its USD files from NVIDIA's asset server, or from the folder in `ISAACSIM_ASSET_ROOT`, which it reads
once, when `isaaclab.utils.assets` is first imported. The mirror holds stand-ins with the stock file, body and joint
names: Cartpole, Ant and Humanoid are taken from the installed newton wheel when the mirror is built; the ground, table,
blocks, Franka and cabinet are written from primitives. They exercise a task's code on sane physics. Masses, gains and
contact shapes are not the stock ones, so rewards are NOT comparable with published ones.

Overrides that the tasks need on Newton, besides `physics=newton_mjwarp`, whichever assets they use:

    Isaac-Cartpole-Camera-Direct    renderer=newton_renderer, and enable_cameras=True at the launch
    IsaacContrib-Stack-Cube-Franka  env.scene.replicate_physics=true; on a CPU env.sim.physics.solver_cfg.cone=pyramidal
                                    (stock: elliptic) makes it 5 times faster
    ...-Stack-Cube-Franka-IK-Rel    the same. Newton ignores `disable_gravity`, so the arm sinks 0.1 m/s at zero actions, unless
                                    `cfg.scene.robot.spawn.rigid_props = [cfg.scene.robot.spawn.rigid_props,
                                    isaaclab_newton.sim.schemas.MujocoRigidBodyCfg(gravcomp=1.0)]`
    Isaac-Lift-Franka               none; on a CPU env.sim.physics.collision_cfg.rigid_contact_max=10000 (stock: 4000000)
                                    makes it 5 times faster, and env.events.conditional_reset.params.buffer_size_per_group=4
                                    (stock: 1024) starts it in a second instead of in half a minute
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import urllib.request
from importlib import metadata, util
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "assets"
STAMP = "MIRROR"  # file in a mirror's root: what it was built from

GROUND = "Isaac/IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda"
CARTPOLE = "Isaac/IsaacLab/Robots/Classic/Cartpole/cartpole.usd"
ANT = "Isaac/Robots/IsaacSim/Ant/ant_instanceable.usd"
HUMANOID = "Isaac/Robots/IsaacSim/Humanoid/humanoid_instanceable.usd"
FRANKA = "Isaac/IsaacLab/Robots/FrankaEmika/franka_panda.usda"
CABINET = "Isaac/Props/Sektion_Cabinet/sektion_cabinet_instanceable.usd"
TABLE = "Isaac/Props/Mounts/SeattleLabTable/table_instanceable.usd"
BLOCK = "Isaac/Props/Blocks/{colour}_block.usd"
RGB = {"blue": (0.1, 0.2, 0.85), "red": (0.85, 0.1, 0.1), "green": (0.1, 0.7, 0.2)}

HUMANOID_JOINTS = {  # newton's name: Isaac Lab's name, which is the child body's
    "abdomen_x": "pelvis",
    "right_knee": "right_shin",
    "left_knee": "left_shin",
    "right_elbow": "right_lower_arm",
    "left_elbow": "left_lower_arm",
}
ANT_DENSITY = 5  # of newton's nv_ant.xml [kg/m^3]; with 1, as in its ant.usda, unit actions throw the ant into the air

BLOCK_EDGE = 0.0468  # distance of two stacked cubes' centres in `cubes_stacked` [m]
TABLE_TOP = 0.0203 - BLOCK_EDGE / 2  # the stack task puts cubes' centres at 0.0203 [m]

# Franka Panda, public URDF: origin in the parent's frame [m], turn about x [deg], joint limits [rad], joint effort [N m]
PANDA_JOINTS = (
    ((0, 0, 0.333), 0, (-2.8973, 2.8973), 87),
    ((0, 0, 0), -90, (-1.7628, 1.7628), 87),
    ((0, -0.316, 0), 90, (-2.8973, 2.8973), 87),
    ((0.0825, 0, 0), 90, (-3.0718, -0.0698), 87),
    ((-0.0825, 0.384, 0), -90, (-2.8973, 2.8973), 12),
    ((0, 0, 0), 90, (-0.0175, 3.7525), 12),
    ((0.088, 0, 0), 90, (-2.8973, 2.8973), 12),
)
PANDA_FLANGE, PANDA_FINGER, PANDA_OPENING = 0.107, 0.0584, 0.04  # link7 to hand, hand to fingers, travel of a finger [m]
PANDA_GAINS = (600, 50), (600, 50), (600, 50), (600, 50), (250, 30), (150, 25), (50, 15)  # libfranka's [N m/rad, N m s/rad]
FINGER_GAINS = (500, 25)  # grips with about 10 N, which the soft mimic constraint passes on [N/m, N s/m]
PANDA_ARMATURE = 0.1  # reflected rotor inertia [kg m^2]; fingers [kg]
PANDA_LINKS = (  # mass [kg], centre of mass [m], capsules: radius, height of the cylinder [m], axis, centre [m]
    (2.8, (-0.04, 0, 0.06), ()),
    (4.97, (0, 0, -0.05), ((0.06, 0.14, "Z", (0, 0, -0.13)),)),
    (0.65, (0, -0.03, 0), ((0.06, 0.1, "Z", (0, 0, 0)), (0.06, 0.1, "Y", (0, -0.15, 0)))),
    (3.23, (0.03, 0.04, -0.07), ((0.06, 0.1, "Z", (0, 0, -0.1)), (0.055, 0.1, "Y", (0.0825, 0, 0)))),
    (3.59, (-0.05, 0.1, 0.03), ((0.055, 0.1, "Y", (-0.0825, 0.11, 0)),)),
    (1.23, (-0.01, 0.04, -0.04), ((0.055, 0.2, "Z", (0, 0.02, -0.16)),)),
    (1.67, (0.06, -0.01, -0.01), ((0.05, 0.08, "Z", (0, 0, 0)), (0.05, 0.03, "Y", (0.088, 0, 0)))),
    (0.74, (0.01, 0, 0.06), ((0.045, 0.03, "Z", (0, 0, 0.045)),)),
)


# ------------------------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------------------------
def _stage(path: Path, root: str):
    """New stage in metres, kilograms, z up, with an Xform as its default prim."""
    from pxr import Usd, UsdGeom, UsdPhysics

    path.parent.mkdir(parents=True, exist_ok=True)
    stage = Usd.Stage.CreateNew(str(path))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.z)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    UsdPhysics.SetStageKilogramsPerUnit(stage, 1.0)
    stage.SetDefaultPrim(UsdGeom.Xform.Define(stage, f"/{root}").GetPrim())
    return stage


def _turn(axis: str, degrees: float):
    from pxr import Gf

    return Gf.Rotation(Gf.Vec3d(*(float(axis == a) for a in "XYZ")), degrees).GetQuat()


def _place(prim, position=(0, 0, 0), rotation=None):
    from pxr import Gf, UsdGeom

    UsdGeom.Xformable(prim).AddTranslateOp().Set(Gf.Vec3d(*position))
    if rotation is not None:
        UsdGeom.Xformable(prim).AddOrientOp().Set(Gf.Quatf(rotation))


def _body(stage, path: str, mass: float, position=(0, 0, 0), rotation=None, com=(0, 0, 0), gyration=0.1) -> str:
    """Rigid body: mass [kg], isotropic radius of gyration [m]."""
    from pxr import Gf, UsdGeom, UsdPhysics

    prim = UsdGeom.Xform.Define(stage, path).GetPrim()
    _place(prim, position, rotation)
    UsdPhysics.RigidBodyAPI.Apply(prim)
    api = UsdPhysics.MassAPI.Apply(prim)
    api.CreateMassAttr(mass)
    api.CreateCenterOfMassAttr(Gf.Vec3f(*com))
    api.CreateDiagonalInertiaAttr(Gf.Vec3f(mass * gyration**2))
    api.CreatePrincipalAxesAttr(Gf.Quatf(1))
    return path


def _box(stage, path: str, size, centre=(0, 0, 0), rgb=(0.8, 0.8, 0.8), collides=True):
    """Box with edges `size` [m]."""
    from pxr import Gf, UsdGeom, UsdPhysics

    box = UsdGeom.Cube.Define(stage, path)
    box.CreateSizeAttr(1.0)
    box.CreateDisplayColorAttr([Gf.Vec3f(*rgb)])
    _place(box, centre)
    box.AddScaleOp().Set(Gf.Vec3f(*size))
    if collides:
        UsdPhysics.CollisionAPI.Apply(box.GetPrim())
    return box.GetPrim()


def _capsule(stage, path: str, radius: float, height: float, axis: str, centre, rgb=(0.9, 0.9, 0.9)):
    """Capsule that does not collide yet; `height` is the cylinder's [m]."""
    from pxr import Gf, UsdGeom

    capsule = UsdGeom.Capsule.Define(stage, path)
    capsule.CreateRadiusAttr(radius)
    capsule.CreateHeightAttr(height)
    capsule.CreateAxisAttr(axis)
    capsule.CreateDisplayColorAttr([Gf.Vec3f(*rgb)])
    _place(capsule, centre)
    return capsule.GetPrim()


def _joint(stage, path: str, kind: str, parent: str | None, child: str, position=(0, 0, 0), frame=None, turn=None):
    """Joint at `position` [m] of the parent; `frame` turns the child, `turn` only the joint's axis."""
    from pxr import Gf, UsdPhysics

    joint = getattr(UsdPhysics, kind).Define(stage, path)
    if parent:
        joint.CreateBody0Rel().SetTargets([parent])
    joint.CreateBody1Rel().SetTargets([child])
    one = Gf.Quatd(1)
    joint.CreateLocalPos0Attr(Gf.Vec3f(*position))
    joint.CreateLocalRot0Attr(Gf.Quatf((frame or one) * (turn or one)))
    joint.CreateLocalPos1Attr(Gf.Vec3f(0))
    joint.CreateLocalRot1Attr(Gf.Quatf(turn or one))
    return joint


def _drive(joint, axis: str, low: float, high: float, gains=(0.0, 0.0), effort=None, armature=0.0):
    """Limits [m or rad] and position drive [N/m, N s/m or N m/rad, N m s/rad] of a joint."""
    from math import degrees, radians

    from pxr import Sdf, UsdPhysics

    angular = joint.GetPrim().IsA(UsdPhysics.RevoluteJoint)
    joint.CreateAxisAttr(axis)
    joint.CreateLowerLimitAttr(degrees(low) if angular else low)
    joint.CreateUpperLimitAttr(degrees(high) if angular else high)
    drive = UsdPhysics.DriveAPI.Apply(joint.GetPrim(), "angular" if angular else "linear")
    drive.CreateTypeAttr("force")
    drive.CreateStiffnessAttr(radians(gains[0]) if angular else gains[0])  # USD's angular gains are per degree
    drive.CreateDampingAttr(radians(gains[1]) if angular else gains[1])
    if effort is not None:
        drive.CreateMaxForceAttr(effort)
    if armature:
        joint.GetPrim().CreateAttribute("newton:armature", Sdf.ValueTypeNames.Float).Set(armature)


def _articulation(stage, root: str, base: str):
    """Fixed-base articulation without self-collisions."""
    from pxr import Sdf, UsdPhysics

    prim = stage.GetPrimAtPath(root)
    UsdPhysics.ArticulationRootAPI.Apply(prim)
    prim.AddAppliedSchema("NewtonArticulationRootAPI")
    for name in ("newton:selfCollisionEnabled", "physxArticulation:enabledSelfCollisions"):
        prim.CreateAttribute(name, Sdf.ValueTypeNames.Bool).Set(False)
    _joint(stage, f"{root}/root_joint", "FixedJoint", None, base)


# ------------------------------------------------------------------------------------------------------------------
# Assets
# ------------------------------------------------------------------------------------------------------------------
def _ground(path: Path):
    """Infinite plane; `spawn_ground_plane` writes to Environment's scale, Geometry's st and the shader's tint."""
    from pxr import Gf, Sdf, UsdGeom, UsdPhysics, UsdShade

    grey = Gf.Vec3f(0.35, 0.36, 0.38)
    stage = _stage(path, "World")
    UsdGeom.Xform.Define(stage, "/World/Environment").AddScaleOp().Set(Gf.Vec3f(1))
    mesh = UsdGeom.Mesh.Define(stage, "/World/Environment/Geometry")
    mesh.CreatePointsAttr([(-50, -50, 0), (50, -50, 0), (50, 50, 0), (-50, 50, 0)])
    mesh.CreateFaceVertexCountsAttr([4])
    mesh.CreateFaceVertexIndicesAttr([0, 1, 2, 3])
    mesh.CreateSubdivisionSchemeAttr("none")
    mesh.CreateDisplayColorAttr([grey])
    st = UsdGeom.PrimvarsAPI(mesh).CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, "varying")
    st.Set([(-25, -25), (25, -25), (25, 25), (-25, 25)])
    material = UsdShade.Material.Define(stage, "/World/Looks/theGrid")
    shader = UsdShade.Shader.Define(stage, "/World/Looks/theGrid/Shader")
    shader.CreateIdAttr("UsdPreviewSurface")
    shader.CreateInput("diffuseColor", Sdf.ValueTypeNames.Color3f).Set(grey)
    shader.CreateInput("diffuse_tint", Sdf.ValueTypeNames.Color3f).Set(Gf.Vec3f(1))
    material.CreateSurfaceOutput().ConnectToSource(shader.ConnectableAPI(), "surface")
    UsdShade.MaterialBindingAPI.Apply(mesh.GetPrim()).Bind(material)
    plane = UsdGeom.Plane.Define(stage, "/World/CollisionPlane")
    plane.CreateAxisAttr("Z")
    plane.CreatePurposeAttr("guide")
    UsdPhysics.CollisionAPI.Apply(plane.GetPrim())
    stage.Save()


def _newton_asset(name: str) -> Path:
    """A file of the installed newton wheel, found without importing it."""
    return Path(util.find_spec("newton").origin).parent / "examples" / "assets" / name


def _edited(name: str, path: Path, old: str, new: str):
    text = _newton_asset(name).read_text()
    if old not in text:
        raise RuntimeError(f"{name} of the installed newton is not the one expected: no {old!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(old, new))


def _humanoid(path: Path):
    from pxr import Sdf

    layer = Sdf.Layer.CreateAnonymous(".usda")
    layer.Import(str(_newton_asset("humanoid.usda")))
    edit = Sdf.BatchNamespaceEdit()
    for old, new in HUMANOID_JOINTS.items():
        edit.Add(Sdf.NamespaceEdit.Rename(f"/nv_humanoid/joints/{old}", new))
    for child in layer.GetPrimAtPath("/nv_humanoid").nameChildren:
        if child.typeName == "PhysicsCollisionGroup":  # newton lets a shape meet its own group only: no ground contact
            edit.Add(Sdf.NamespaceEdit.Remove(child.path))
    if not layer.Apply(edit):
        raise RuntimeError("humanoid.usda of the installed newton is not the one expected")
    path.parent.mkdir(parents=True, exist_ok=True)
    layer.Export(str(path))


def _table(path: Path):
    """Static table with its top at `TABLE_TOP`, 1.05 m above the floor; the task turns it by 90 degrees."""
    stage = _stage(path, "Table")
    wood = (0.55, 0.42, 0.28)
    _box(stage, "/Table/top", (1.3, 1.5, 0.05), (0, 0, TABLE_TOP - 0.025), wood)
    for i, (x, y) in enumerate(((-0.6, -0.7), (-0.6, 0.7), (0.6, -0.7), (0.6, 0.7))):
        _box(stage, f"/Table/leg{i}", (0.06, 0.06, 1.0), (x, y, -0.55), (0.3, 0.3, 0.32), collides=False)
    stage.Save()


def _block(path: Path, rgb):
    stage = _stage(path, "Block")
    _body(stage, "/Block", 0.1, gyration=BLOCK_EDGE / 6**0.5)
    _box(stage, "/Block/geometry", (BLOCK_EDGE,) * 3, rgb=rgb)
    stage.Save()


def _franka(path: Path):
    """Panda of capsules and boxes; bodies nest below Geometry, and the second finger mimics the first, as in the stock file.

    Variants: `Physics` (both alike here) and `Colliders` (arm and gripper, or gripper only).
    """
    from pxr import Sdf, UsdGeom, UsdPhysics

    stage = _stage(path, "panda")
    root = stage.GetDefaultPrim()
    UsdGeom.Scope.Define(stage, "/panda/Geometry")
    UsdGeom.Scope.Define(stage, "/panda/Physics")
    link, arm = "/panda/Geometry", []
    for i, (mass, com, capsules) in enumerate(PANDA_LINKS):
        parent, link = link, f"{link}/panda_link{i}"
        origin, angle, limits, effort = PANDA_JOINTS[i - 1] if i else ((0, 0, 0), 0, None, None)
        turn = _turn("X", angle)
        _body(stage, link, mass, origin, turn, com)
        arm += [_capsule(stage, f"{link}/capsule{j}", *shape) for j, shape in enumerate(capsules)]
        if i:
            joint = _joint(stage, f"/panda/Physics/panda_joint{i}", "RevoluteJoint", parent, link, origin, turn)
            _drive(joint, "Z", *limits, PANDA_GAINS[i - 1], effort, PANDA_ARMATURE)
        else:
            arm.append(_box(stage, f"{link}/foot", (0.2, 0.18, 0.12), (-0.03, 0, 0.07), collides=False))
    _place(UsdGeom.Xform.Define(stage, f"{link}/panda_link8"), (0, 0, PANDA_FLANGE))  # frame of the flange, no body

    hand, dark = f"{link}/panda_hand", (0.2, 0.2, 0.22)
    mount = ((0, 0, PANDA_FLANGE), _turn("Z", -45))
    _body(stage, hand, 0.73, *mount, com=(0, 0, 0.03), gyration=0.05)
    _box(stage, f"{hand}/palm", (0.04, 0.2, 0.06), (0, 0, 0.03))
    _joint(stage, "/panda/Physics/panda_hand_joint", "FixedJoint", link, hand, *mount)
    joints = []
    for i, (side, sign) in enumerate((("left", 1), ("right", -1))):
        finger, origin = f"{hand}/panda_{side}finger", (0, 0, PANDA_FINGER)
        _body(stage, finger, 0.015, origin, com=(0, 0.01 * sign, 0.03), gyration=0.015)
        _box(stage, f"{finger}/pad", (0.02, 0.014, 0.054), (0, 0.007 * sign, 0.027), dark)  # faces meet when closed
        turn = None if sign > 0 else _turn("Z", 180)  # opens along -y
        name = f"/panda/Physics/panda_finger_joint{i + 1}"
        joints.append(_joint(stage, name, "PrismaticJoint", hand, finger, origin, turn=turn))
        _drive(joints[i], "Y", 0, PANDA_OPENING, (0.0, 0.0) if i else FINGER_GAINS, 200, PANDA_ARMATURE)
    follower = joints[1].GetPrim()
    follower.AddAppliedSchema("NewtonMimicAPI")
    follower.CreateRelationship("newton:mimicJoint").SetTargets([joints[0].GetPath()])
    follower.CreateAttribute("newton:mimicCoef1", Sdf.ValueTypeNames.Float).Set(1.0)
    _articulation(stage, "/panda", "/panda/Geometry/panda_link0")

    variants = root.GetVariantSets().AddVariantSet("Physics")
    for name in ("physx", "mujoco"):
        variants.AddVariant(name)
    variants.SetVariantSelection("mujoco")
    variants = root.GetVariantSets().AddVariantSet("Colliders")
    for name in ("gripper_only", "primitives"):
        variants.AddVariant(name)
        variants.SetVariantSelection(name)
    with variants.GetVariantEditContext():
        for prim in arm:
            UsdPhysics.CollisionAPI.Apply(prim)
    stage.Save()


def _cabinet(path: Path):
    """Two drawers above two doors, opening along +x; a drawer's handle sits at (0.305, 0, 0.01) of its frame."""
    from pxr import Sdf

    stage = _stage(path, "Cabinet")
    white, metal = (0.85, 0.85, 0.82), (0.6, 0.6, 0.62)

    def path_of(name):
        return f"/Cabinet/{name}"

    carcass = _body(stage, path_of("sektion"), 20.0, gyration=0.3)
    for name, size, centre in (
        ("back", (0.02, 0.76, 0.76), (-0.29, 0, 0)),
        ("left", (0.56, 0.02, 0.76), (0, 0.37, 0)),
        ("right", (0.56, 0.02, 0.76), (0, -0.37, 0)),
        ("top", (0.56, 0.76, 0.02), (0, 0, 0.38)),
        ("bottom", (0.56, 0.76, 0.02), (0, 0, -0.38)),
    ):
        _box(stage, f"{carcass}/{name}", size, centre, white)
    for name, z in (("top", 0.29), ("bottom", 0.11)):
        drawer = _body(stage, path_of(f"drawer_{name}"), 2.0, (0.05, 0, z), com=(0, 0, -0.03), gyration=0.2)
        _box(stage, f"{drawer}/front", (0.02, 0.72, 0.15), (0.235, 0, 0), white)
        _box(stage, f"{drawer}/floor", (0.45, 0.66, 0.01), (0, 0, -0.065), white)
        joint = _joint(stage, path_of(f"drawer_{name}_joint"), "PrismaticJoint", carcass, drawer, (0.05, 0, z))
        _drive(joint, "X", 0.0, 0.4, effort=87)
        # with newton's default gains an arm pushes a closed drawer 4 cm into the cabinet, and an open one bounces
        for attribute, gain in (("newton:limitStiffness", 1e5), ("newton:limitDamping", 1e4)):  # [N/m, N s/m]
            joint.GetPrim().CreateAttribute(attribute, Sdf.ValueTypeNames.Float).Set(gain)
        handle = _body(stage, path_of(f"drawer_handle_{name}"), 0.1, (0.05, 0, z), com=(0.3, 0, 0.01), gyration=0.05)
        _box(stage, f"{handle}/bar", (0.016, 0.16, 0.016), (0.305, 0, 0.01), metal)
        for i, y in enumerate((-0.072, 0.072)):
            _box(stage, f"{handle}/post{i}", (0.055, 0.012, 0.012), (0.2725, y, 0.01), metal, collides=False)
        _joint(stage, path_of(f"drawer_handle_{name}_joint"), "FixedJoint", drawer, handle)
    for name, sign in (("left", 1), ("right", -1)):
        hinge = (0.285, 0.36 * sign, -0.18)
        door = _body(stage, path_of(f"door_{name}_link"), 3.0, hinge, com=(0, -0.18 * sign, 0), gyration=0.15)
        _box(stage, f"{door}/panel", (0.02, 0.35, 0.36), (0, -0.18 * sign, 0), white)
        joint = _joint(stage, path_of(f"door_{name}_joint"), "RevoluteJoint", carcass, door, hinge)
        _drive(joint, "Z", *((0.0, 1.57) if sign > 0 else (-1.57, 0.0)), effort=87)
        nob = _body(stage, path_of(f"door_{name}_nob_link"), 0.1, hinge, com=(0.03, -0.31 * sign, 0.1), gyration=0.03)
        _box(stage, f"{nob}/nob", (0.03, 0.03, 0.03), (0.025, -0.31 * sign, 0.1), metal)
        _joint(stage, path_of(f"door_{name}_nob_joint"), "FixedJoint", door, nob)
    _articulation(stage, "/Cabinet", carcass)
    stage.Save()


# ------------------------------------------------------------------------------------------------------------------
# Mirror
# ------------------------------------------------------------------------------------------------------------------
def fingerprint() -> str:
    """Changes with this file and with the wheel that parts of the mirror come from."""
    return hashlib.sha256(Path(__file__).read_bytes() + metadata.version("newton").encode()).hexdigest()[:16]


def _is_current(root: Path) -> bool:
    return (root / STAMP).is_file() and (root / STAMP).read_text() == fingerprint()


def build(root: Path) -> Path:
    """The mirror in folder `root`, which is new, empty or an older mirror; complete at any time that it exists."""
    root = Path(root).absolute()
    if _is_current(root):
        return root
    if root.exists() and any(root.iterdir()) and not (root / STAMP).is_file():
        raise FileExistsError(f"{root} is not a mirror of assets")
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    try:
        new = scratch / "new"
        _ground(new / GROUND)
        _edited("cartpole_single_pendulum.usda", new / CARTPOLE, 'defaultPrim = "cartPole"', 'defaultPrim = "cartpole"')
        _edited("ant.usda", new / ANT, "physics:density = 1\n", f"physics:density = {ANT_DENSITY}\n")
        _humanoid(new / HUMANOID)
        _table(new / TABLE)
        for colour, rgb in RGB.items():
            _block(new / BLOCK.format(colour=colour), rgb)
        _franka(new / FRANKA)
        _cabinet(new / CABINET)
        (new / STAMP).write_text(fingerprint())
        try:
            if (root / STAMP).is_file() and not _is_current(root):
                root.rename(scratch / "old")
            new.rename(root)
        except OSError:  # another process was faster
            if not _is_current(root):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return root


def mirror() -> Path:
    """The mirror in the repository's cache, built when needed."""
    return build(CACHE / fingerprint())


def server() -> str:
    """Root of NVIDIA's assets, from the settings in the installed Isaac Lab."""
    settings = Path(util.find_spec("isaaclab").origin).parent / "apps" / "isaaclab.python.kit"
    return re.findall(r'^\s*persistent\.isaac\.asset_root\.default\s*=\s*"([^"]*)"', settings.read_text(), re.M)[-1]


def reachable(timeout: float = 3.0) -> bool:
    """Whether NVIDIA's server has the Ant's file; waits `timeout` seconds at most for each network operation."""
    try:
        request = urllib.request.Request(f"{server()}/{ANT}", method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status == 200
    except (OSError, ValueError, IndexError):  # no network, no such file; no such setting
        return False


def use() -> str:
    """Choose where Isaac Lab, not imported yet, gets its assets from: "given", "nvidia" or "mirror"."""
    if os.environ.get("ISAACSIM_ASSET_ROOT"):
        return "given"
    if reachable():
        return "nvidia"
    os.environ["ISAACSIM_ASSET_ROOT"] = str(mirror())
    return "mirror"


if __name__ == "__main__":
    print(mirror())
