"""What a checkpoint's numbers mean: data configs, metadata.json, embodiment ids. Needs no torch, and no weights.

metadata.json lists every modality of the data set that a checkpoint was trained on, in the order of a file. Which of them
the network gets, in which order and in which form stands in NVIDIA's *data configs*, which are code. Here they are rows
of DATA_CONFIGS; one's own is a row more, or a JSON file with the same fields (docs/checkpoints.md).

Sources: Isaac-GR00T at N1.5 (gr00t/experiment/data_config.py, examples/Libero, examples/SimplerEnv), RLinf
(gr00t_n1d5/modality_config.py), Isaac Lab 3.0 (contrib/assemble_trocar).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gr00t_n1d5.config import Gr00tConfig
from gr00t_n1d5.files import INDEX, read_index, read_json, resolve_folder

log = logging.getLogger(__name__)

# Rows of the category-specific layers. (RLinf puts its "new_embodiment" at 10: see `DataConfig.embodiment_id`.)
EMBODIMENT_IDS = {
    "gr1": 24,
    "oxe_droid": 17,
    "agibot_genie1": 26,
    "new_embodiment": 31,
    "so100": 2,  # lerobot
    "unitree_g1": 3,  # lerobot
    "libero_franka": 31,  # this one and the rest: RLinf
    "isaaclab_franka": 31,
    "maniskill_widowx": 30,
    "libero_panda": 2,
    "robocasa_panda_omron": 13,
}
STATISTICS = ("max", "min", "mean", "std", "q01", "q99")
NORMS = ("min_max", "q99", "mean_std", "binary", "none")
ROTATIONS = ("rotation_6d", "axis_angle")  # what a rotation becomes; "rotation_6d+min_max" normalises it as well
_ORDERS = ("rpy", "ryp", "pry", "pyr", "yrp", "ypr")  # of intrinsic rotations about x, y and z
SOURCES = ("quaternion", "axis_angle", "rotation_6d", *(f"euler_angles_{order}" for order in _ORDERS))
KINDS = ("state", "action")


# ------------------------------------------------------------------------------------------------------------------
# data configs
# ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DataConfig:
    """The network's inputs and outputs: keys in its order, and how each is encoded.

    Encodings are min_max, q99, mean_std, binary, none, sin_cos (state alone), rotation_6d and axis_angle. A rotation is
    converted from the metadata's rotation_type, and normalised where "+min_max" follows.
    """

    video: tuple[str, ...]
    state: Mapping[str, str]  # encoding of each key
    action: Mapping[str, str]
    language: str = "annotation.human.action.task_description"
    crop: float | None = None  # share of an image's height and width that is kept; None: the network's (NVIDIA's 0.95)
    action_indices: tuple[int, ...] = tuple(range(16))  # steps that a chunk has an action for
    observation_indices: tuple[int, ...] = (0,)
    embodiment_id: int | None = None  # row of the category-specific layers; None: EMBODIMENT_IDS has the tag's

    def __post_init__(self) -> None:
        if isinstance(self.video, str) or not all(isinstance(getattr(self, kind), Mapping) for kind in KINDS):
            raise ValueError("video must be a list of keys, state and action maps of keys to encodings")
        for name in ("video", "action_indices", "observation_indices"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for kind in KINDS:
            object.__setattr__(self, kind, dict(getattr(self, kind)))
            for key, encoding in getattr(self, kind).items():
                rotation, _, norm = str(encoding).rpartition("+")
                if encoding not in (*NORMS, *ROTATIONS, "sin_cos") and (rotation not in ROTATIONS or norm != "min_max"):
                    known = ", ".join((*NORMS, *ROTATIONS, "sin_cos"))
                    raise ValueError(f"{kind}.{key}: {encoding!r} is not one of {known}, or a rotation with +min_max")
        if "sin_cos" in self.action.values():
            raise ValueError("action: sin_cos cannot be undone")
        if self.observation_indices != (0,) or self.action_indices != tuple(range(len(self.action_indices))):
            raise ValueError("observation_indices must be [0] and action_indices 0, 1, 2, ...: no history, no gaps")

    def to_dict(self) -> dict:
        """For JSON; fields at their defaults are left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, content: Mapping) -> DataConfig:
        """The inverse. Raises ValueError in words."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(content) - known:
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"not a data config ({error})") from error


def _all(encoding: str, keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), encoding)


_GR1 = "left_arm right_arm left_hand right_hand"
_POSE = "x y z roll pitch yaw"
_POSE_SCALED = _all("mean_std", _POSE) | {"gripper": "min_max"}
_AGIBOT = "left_arm_joint_position right_arm_joint_position left_effector_position right_effector_position"
_AGIBOT += " head_position waist_position"
_BIMANUAL_EEF = {side: {f"{side}_arm_eef_pos": "min_max", f"{side}_arm_eef_quat": "rotation_6d"} for side in ("right", "left")}
_BIMANUAL_MOVE = {side: {f"{side}_arm_eef_pos": "none", f"{side}_arm_eef_rot": "none"} for side in ("right", "left")}
DATA_CONFIGS = {
    "so100": DataConfig(
        video=("webcam",),
        state=_all("min_max", "single_arm gripper"),
        action=_all("min_max", "single_arm gripper"),
        language="annotation.human.task_description",
    ),
    "fourier_gr1_arms_only": DataConfig(
        video=("ego_view",), state=_all("sin_cos", _GR1), action=_all("min_max", _GR1)
    ),
    "fourier_gr1_arms_waist": DataConfig(
        video=("ego_view",),
        state=_all("sin_cos", _GR1 + " waist"),
        action=_all("min_max", _GR1 + " waist"),
        language="annotation.human.coarse_action",
    ),
    "fourier_gr1_full_upper_body": DataConfig(
        video=("front_view",), state=_all("min_max", _GR1 + " waist neck"), action=_all("min_max", _GR1 + " waist neck")
    ),
    "unitree_g1": DataConfig(
        video=("rs_view",),
        state=_all("min_max", _GR1),
        action=_all("min_max", _GR1),
        language="annotation.human.task_description",
    ),
    "unitree_g1_full_body": DataConfig(
        video=("rs_view",),
        state=_all("min_max", "left_leg right_leg waist " + _GR1),
        action=_all("min_max", _GR1),
        language="annotation.human.task_description",
    ),
    "agibot_genie1": DataConfig(
        video=("top_head", "hand_left", "hand_right"),
        state=_all("min_max", _AGIBOT),
        action=_all("min_max", _AGIBOT + " robot_velocity"),
        language="annotation.language.action_text",
    ),
    "oxe_droid": DataConfig(
        video=("exterior_image_1", "exterior_image_2", "wrist_image"),
        state={"eef_position": "min_max", "eef_rotation": "rotation_6d", "gripper_position": "min_max"},
        action={"eef_position_delta": "none", "eef_rotation_delta": "axis_angle", "gripper_position": "binary"},
        language="annotation.language.language_instruction",
    ),
    "bimanual_panda_gripper": DataConfig(
        video=("right_wrist_view", "left_wrist_view", "front_view"),
        state=_BIMANUAL_EEF["right"] | {"right_gripper_qpos": "min_max"}
        | _BIMANUAL_EEF["left"] | {"left_gripper_qpos": "min_max"},
        action=_BIMANUAL_MOVE["right"] | {"right_gripper_close": "binary"}
        | _BIMANUAL_MOVE["left"] | {"left_gripper_close": "binary"},
    ),
    "bimanual_panda_hand": DataConfig(
        video=("right_wrist_view", "left_wrist_view", "ego_view"),
        state=_BIMANUAL_EEF["right"] | {"right_hand": "min_max"} | _BIMANUAL_EEF["left"] | {"left_hand": "min_max"},
        action=_BIMANUAL_MOVE["right"] | {"right_hand": "min_max"} | _BIMANUAL_MOVE["left"] | {"left_hand": "min_max"},
    ),
    "single_panda_gripper": DataConfig(
        video=("left_view", "right_view", "wrist_view"),
        state={
            "end_effector_position_relative": "min_max", "end_effector_rotation_relative": "rotation_6d+min_max",
            "gripper_qpos": "min_max", "base_position": "min_max", "base_rotation": "rotation_6d+min_max",
        },
        action={
            "end_effector_position": "min_max", "end_effector_rotation": "min_max", "gripper_close": "binary",
            "base_motion": "min_max", "control_mode": "binary",
        },
    ),
    "libero": DataConfig(  # RLinf uses it for its LIBERO and Isaac Lab checkpoints, too
        video=("image", "wrist_image"),
        state=_all("min_max", _POSE + " gripper"),
        action=_all("min_max", _POSE + " gripper"),
    ),
    "libero_mean_std": DataConfig(
        video=("image", "wrist_image"), state=_all("min_max", _POSE + " gripper"), action=_POSE_SCALED
    ),
    "fractal": DataConfig(video=("image",), state=_all("min_max", "x y z rx ry rz rw gripper"), action=_POSE_SCALED),
    "bridge": DataConfig(
        video=("image_0",), state=_all("min_max", _POSE + " pad gripper"), action=_all("min_max", _POSE + " gripper")
    ),
    "maniskill_widowx": DataConfig(
        video=("ego_view",), state={"left_arm": "sin_cos"}, action={"left_arm": "min_max"}
    ),
    "isaaclab_g1_dex3": DataConfig(  # Isaac Lab's Assemble-Trocar: cameras of the network's size, no crop
        video=("left_wrist_view", "right_wrist_view", "room_view"),
        state=_all("sin_cos", _GR1),
        action=_all("min_max", _GR1),
        language="annotation.human.task_description",
        crop=1.0,
    ),
}  # fmt: skip
DATA_CONFIGS["so100_dualcam"] = dataclasses.replace(DATA_CONFIGS["so100"], video=("front", "wrist"))
OF_TAG = {  # tags whose checkpoints have one data config
    "oxe_droid": "oxe_droid",
    "agibot_genie1": "agibot_genie1",
    "libero_franka": "libero",
    "isaaclab_franka": "libero",
    "maniskill_widowx": "maniskill_widowx",
}


def find_data_config(name: str) -> DataConfig:
    """A row of DATA_CONFIGS, or a JSON file. Raises SystemExit, in one line, for what is neither."""
    if name in DATA_CONFIGS:
        return DATA_CONFIGS[name]
    if not name.endswith(".json"):
        raise SystemExit(f"--data-config {name}: must be a JSON file or one of {', '.join(DATA_CONFIGS)}")
    try:
        return DataConfig.from_dict(read_json(Path(name).expanduser()))
    except (OSError, ValueError) as error:
        reason = str(error) if Path(name).expanduser().is_file() else "no such file"
        raise SystemExit(f"--data-config {name}: {reason}") from error


# ------------------------------------------------------------------------------------------------------------------
# one entry of a metadata.json, read by a data config
# ------------------------------------------------------------------------------------------------------------------
class Part(NamedTuple):
    """One key's columns on their way to the network."""

    key: str
    before: int  # columns
    after: int  # dimensions that the network sees
    change: str  # sin_cos, rotation_6d, axis_angle, or ""
    rotation: str | None  # kind that the data have
    norm: str  # of NORMS


@dataclass(frozen=True)
class Embodiment:
    """What a checkpoint knows of one robot: an entry of its metadata.json, and the data config that it was trained with.

    Raises ValueError where the entry lacks what the data config uses.
    """

    metadata: dict  # the whole file
    tag: str
    data: DataConfig
    sizes: dict[str, dict[str, int]] = field(init=False)  # columns of each used key, before it is encoded

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "sizes", {kind: self._sizes(kind) for kind in KINDS})
            video = dict(self.entry.get("modalities", {}).get("video") or {})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.tag}: incomplete metadata ({error!r})") from error
        if video and (absent := [key for key in self.data.video if key not in video]):
            raise ValueError(f"{self.tag}: no video.{absent[0]} in metadata.json, which has {', '.join(video)}")

    def _sizes(self, kind: str) -> dict[str, int]:
        """Checks the statistics of the used keys on the way."""
        found, sizes = self.statistics(kind), {}
        for key in getattr(self.data, kind):
            if key not in found:
                raise ValueError(f"{self.tag}: no {kind}.{key} in metadata.json, which has {', '.join(found)}")
            absent = [name for name in STATISTICS if name not in found[key]]
            if absent:
                raise ValueError(f"{self.tag}: statistics of {kind}.{key} lack {', '.join(absent)}")
            lengths = {name: _length(found[key][name]) for name in STATISTICS}
            if len(set(lengths.values())) > 1:
                listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
                raise ValueError(f"{self.tag}: statistics of {kind}.{key} differ in dimensions ({listed})")
            rotation = self.rotation_type(kind, key)
            if getattr(self.data, kind)[key].startswith(ROTATIONS) and rotation not in SOURCES:
                raise ValueError(f"{self.tag}: rotation_type of {kind}.{key} is {rotation}, not one of {', '.join(SOURCES)}")
            sizes[key] = lengths["max"]
        return sizes

    @property
    def entry(self) -> dict:
        return self.metadata[self.tag]

    def statistics(self, kind: str) -> dict[str, dict]:
        """Of all keys of "state" or "action"."""
        return dict(self.entry["statistics"][kind])

    def rotation_type(self, kind: str, key: str) -> str | None:
        """How the data hold a rotation: quaternion (w first), axis_angle, euler_angles_rpy, ...; None: it is none."""
        return self.entry.get("modalities", {}).get(kind, {}).get(key, {}).get("rotation_type")

    def parts(self, kind: str) -> list[Part]:
        """How each used key of "state" or "action" is encoded, in the network's order."""
        found = []
        for key, encoding in getattr(self.data, kind).items():
            before, rotation = self.sizes[kind][key], self.rotation_type(kind, key)
            change, _, norm = encoding.rpartition("+")
            if encoding in ("sin_cos", *ROTATIONS):
                change, norm = encoding, "none"
            if change == rotation:  # nothing to convert: normalised by the data's own statistics
                change = ""
            after = {"": before, "sin_cos": 2 * before, "rotation_6d": 6, "axis_angle": 3}[change]
            found.append(Part(key, before, after, change, rotation, norm))
        return found

    def id(self, config: Gr00tConfig) -> int:
        """The row of the category-specific layers; 0 in a network with one row."""
        if config.num_embodiments == 1:
            return 0
        row = self.data.embodiment_id if self.data.embodiment_id is not None else EMBODIMENT_IDS.get(self.tag)
        if row is None:
            known = ", ".join(EMBODIMENT_IDS)
            raise ValueError(f"embodiment tag {self.tag!r} has no id; give embodiment_id in a data config (known: {known})")
        if not 0 <= row < config.num_embodiments:
            raise ValueError(f"embodiment id {row} of tag {self.tag!r}: the network has {config.num_embodiments}")
        return row

    def adapt(self, config: Gr00tConfig) -> Gr00tConfig:
        """The network's config with the data config's crop and horizon. Raises ValueError where its sizes do not do."""
        for kind, limit in (("state", config.state_dim), ("action", config.action_dim)):
            if (found := sum(part.after for part in self.parts(kind))) > limit:
                raise ValueError(f"{self.tag}: {found} {kind} dimensions, the network has {limit}")
        self.id(config)
        crop = config.image_crop if self.data.crop is None else self.data.crop
        return dataclasses.replace(config, image_crop=crop, action_horizon=len(self.data.action_indices))

    def misfit(self, modalities: Mapping[str, Any]) -> str | None:
        """What keeps a task from being this embodiment's, or None; modalities as `Gr00tProcessor.connect` takes them."""
        problems = []
        for kind, wanted in (("video", dict.fromkeys(self.data.video)), *self.sizes.items()):
            given = dict.fromkeys(modalities[kind]) if kind == "video" else modalities[kind]
            absent, unknown = [key for key in wanted if key not in given], [key for key in given if key not in wanted]
            lists = [f"{word} {', '.join(keys)}" for word, keys in (("it wants", absent), ("it has no", unknown)) if keys]
            lists += [
                f"{key} has {size} columns there, {given[key]} here"
                for key, size in wanted.items()
                if key in given and size != given[key]
            ]
            if lists:
                problems.append(f"{kind}: {', '.join(lists)}")
        return "; ".join(problems) or None

    def to_dict(self) -> dict:
        """metadata.json, with the data config beside the entry's statistics; NVIDIA's code passes over it."""
        return {**self.metadata, self.tag: {**self.entry, "data_config": self.data.to_dict()}}


def free_rows(config: Gr00tConfig) -> list[int]:
    """Rows of the category-specific layers for new tags: new_embodiment's, those that no tag has, then the others."""
    taken = set(EMBODIMENT_IDS.values()) - {EMBODIMENT_IDS["new_embodiment"]}
    return sorted(range(config.num_embodiments), key=lambda row: (row in taken, -row))


@contextlib.contextmanager
def refuse_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Around what reads a checkpoint: SystemExit, in one line, where that fails."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = "; ".join(str(error).splitlines()).removeprefix(f"{checkpoint}: ")
        raise SystemExit(f"--checkpoint {checkpoint}: {reason}") from error


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else 1


def read_embodiment(
    folder: Path, tag: str | None = None, data_config: str | None = None, row: Any = None, task: str = "the task"
) -> Embodiment:
    """The entry of a folder's metadata.json, and its data config: `choose_embodiment`."""
    file = folder / "experiment_cfg" / "metadata.json"
    return choose_embodiment(read_json(file), tag, data_config, row, str(file), task)


def choose_embodiment(
    metadata: dict, tag: str | None, data_config: str | None, row: Any, file: str = "metadata.json", task: str = "the task"
) -> Embodiment:
    """The entry of a metadata.json, and its data config.

    Args:
        tag: of the entry; None: the row's, the only one, or the only one that fits the row.
        data_config: a row of DATA_CONFIGS or a JSON file; None: what the entry says (checkpoints written here do), what
            the tag is known for, what the row says, or the one data config that has exactly the entry's keys.
        row: what has `embodiment_tag`, `data_config` and `modalities`, as the rows of TASKS do.
        file, task: their names, for messages.

    Raises FileNotFoundError, ValueError, and SystemExit where it cannot be told or is named wrongly.
    """
    tag, which = tag or (row.embodiment_tag if row and row.embodiment_tag in metadata else None), ""
    if tag is None and len(metadata) == 1:
        tag = next(iter(metadata))
    elif tag is None and row:
        fitting = []
        for name in metadata:
            with contextlib.suppress(ValueError, SystemExit):  # no entry of a robot, or no telling how it is read
                if not choose_embodiment(metadata, name, data_config, row).misfit(row.modalities):
                    fitting.append(name)
        tag = fitting[0] if len(fitting) == 1 else None
        which = f"; {' and '.join(sorted(fitting))} fit {task}" if fitting else f"; none fits {task}: sft_gr00t.py makes one"
    if tag not in metadata or not isinstance(metadata[tag], dict):
        given = f"--embodiment-tag {tag}: is not in" if tag else "--embodiment-tag: needed for"
        raise SystemExit(f"{given} {file}, which has {', '.join(sorted(metadata)) or 'none'}{which}")
    entry = metadata[tag]
    if data_config:
        return Embodiment(metadata, tag, find_data_config(data_config))
    if "data_config" in entry:
        try:
            return Embodiment(metadata, tag, DataConfig.from_dict(entry["data_config"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"data_config of {tag} in metadata.json: {error}") from error
    if tag in OF_TAG:
        return Embodiment(metadata, tag, DATA_CONFIGS[OF_TAG[tag]])
    exact, fitting = [], []
    for name, config in DATA_CONFIGS.items():
        try:
            Embodiment(metadata, tag, config)
        except ValueError:
            continue
        fitting.append(name)
        if all(set(entry.get("modalities", {}).get(kind, {})) == set(getattr(config, kind)) for kind in ("video", *KINDS)):
            exact.append(name)
    if row and row.data_config in fitting:
        return Embodiment(metadata, tag, DATA_CONFIGS[row.data_config])
    if len(exact) == 1:
        return Embodiment(metadata, tag, DATA_CONFIGS[exact[0]])
    fitting = ", ".join(exact or fitting) or "none of the built-in ones, so a JSON file (docs/checkpoints.md)"
    raise SystemExit(
        f"--data-config: needed for tag {tag}, whose entry in metadata.json does not say which keys the network gets, in which "
        f"order and form; {fitting} would fit"
    )


def check_network(checkpoint: str, sizes: Mapping[str, int] | None = None) -> Gr00tConfig:
    """Refuses, in one line and from JSON files alone, what is no GR00T N1.5 or has no room for these columns."""
    with refuse_checkpoint(checkpoint):
        folder = resolve_folder(checkpoint, weights=False)
        config = Gr00tConfig.read(folder)
        if (folder / INDEX).is_file():
            read_index(folder)
        for kind, size in (sizes or {}).items():
            if size > (limit := {"state": config.state_dim, "action": config.action_dim}[kind]):
                raise ValueError(f"the task has {size} {kind} columns, the network has {limit}")
    return config


def check_checkpoint(
    checkpoint: str, tag: str | None, data_config: str | None, task: str | None = None, tasks: Mapping[str, Any] | None = None
) -> None:
    """Refuses, in one line and from JSON files alone, a checkpoint that cannot be used, or not for a row of TASKS."""
    config, row = check_network(checkpoint), tasks[task] if tasks else None
    with refuse_checkpoint(checkpoint):
        embodiment = read_embodiment(resolve_folder(checkpoint, weights=False), tag, data_config, row, task or "the task")
        embodiment.adapt(config)
    if row is None:
        return
    if problem := embodiment.misfit(row.modalities):
        fitting = [name for name, other in tasks.items() if not embodiment.misfit(other.modalities)]
        ways = [f"use --task {' or '.join(fitting)}"] if fitting else []
        if row.expert:
            ways.append(f"make it fit: python sft_gr00t.py --checkpoint {checkpoint} --task {task}")
        elif not fitting:
            able = " or ".join(name for name, other in tasks.items() if other.expert)
            ways.append(
                f"write a row for it (docs/gr00t.md), or fine-tune it with sft_gr00t.py on a task with an expert: {able}"
            )
        raise SystemExit(f"--checkpoint {checkpoint} ({embodiment.tag}) is not for {task}: {problem}; {'; or '.join(ways)}")
    if row.embodiment_tag and embodiment.tag != row.embodiment_tag and "data_config" not in embodiment.entry:
        log.warning(f"{task} is made for tag {row.embodiment_tag}; {checkpoint} has {embodiment.tag}: equal keys, other data")
