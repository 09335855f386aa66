"""Makes nvidia_transforms.safetensors: NVIDIA's own N1.5 data configs, in evaluation mode, on generated observations.

The code is a checkout of Isaac-GR00T at N1.5 (the file was made with github.com/RLWRLD/Isaac-GR00T at e845e75), the data
configs are its own, those of its LIBERO and SimplerEnv examples, and that of Isaac Lab's assemble_trocar task. They run
inside NVIDIA's `Gr00tPolicy.get_action`, with the network replaced by given actions. This needs an environment apart from
the project's, from the repository root, with the checkout in `Isaac-GR00T`:

    git clone https://github.com/facebookresearch/pytorch3d
    uv venv --python 3.12 nvidia-venv
    uv pip install --python nvidia-venv torch==2.11.0 torchvision==0.26.0 transformers==4.51.3 diffusers==0.30.2 \\
        peft numpydantic albumentations opencv-python-headless dm-tree einops av decord pandas tqdm
    PYTHONPATH=pytorch3d nvidia-venv/bin/python tests/golden/make_nvidia_transforms.py Isaac-GR00T \\
        <site-packages>/isaaclab_tasks/contrib/assemble_trocar/config/gr00t_config.py

Only pytorch3d's rotations are used, which are plain Python (made with 9381c401). The Eagle processor's code is run from
the checkout. The keys of each metadata.json stand in another order than in the data config, between keys that it does not
use, and every modality has dimensions without a range. For every case, B samples, V views in the data config's order:

    {case}/video/{key}     uint8 (B, H, W, 3)    {case}/pixels          uint8 (B*V, 3, 32, 32), sample-major
    {case}/state/{key}     f32 (B, d)            {case}/state_input     f32 (B, 64)
    {case}/actions         f32 (B, 16, 32)       {case}/action/{key}    f32 (B, 16, d)
    {case}/prompt          int64 (B, L)          {case}/prompt_single   int64 (L',)

Left what goes in, right what comes out. Pixels are every 7th of the 224 x 224 that the network gets, before / 127.5 - 1.
prompt is that of a batch, whose instructions are (B,) strings; prompt_single that of one observation, whose instruction is
a list of one string: NVIDIA renders it as numpy prints an array. The header's "cases" is a JSON list of name, tag,
embodiment_id, instruction, language_key and metadata.
"""

import importlib.util
import json
import math
import os
import sys
import tempfile
from pathlib import Path

checkout, isaaclab_config = map(Path, sys.argv[1:3])
sys.path.insert(0, str(checkout))
scratch = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch.name}  # the processor's code is copied there

import numpy as np
import torch
import torch.nn.functional as F
from gr00t.data.schema import DatasetMetadata
from gr00t.experiment.data_config import DATA_CONFIG_MAP, BaseDataConfig
from gr00t.model.policy import Gr00tPolicy
from safetensors.torch import save_file

B, HORIZON, ACTION_DIM, SIZE, STEP = 2, 16, 32, 224, 7
CAMERA = (56, 81)  # height, width of the images; the other sizes below test rounding, and shrinking
ROTATIONS = {3: "axis_angle", 4: "quaternion"}

ARMS = dict(left_arm=7, right_arm=7)
GR1 = ARMS | dict(left_hand=6, right_hand=6, left_leg=6, right_leg=6, neck=3, waist=3)
G1 = ARMS | dict(left_hand=7, right_hand=7, left_leg=6, right_leg=6, waist=3)
AGIBOT = dict(left_arm_joint_position=7, right_arm_joint_position=7, left_effector_position=1, right_effector_position=1)
AGIBOT |= dict(head_position=2, waist_position=2, robot_velocity=2)
BIMANUAL_STATE = dict(right_arm_eef_pos=3, right_arm_eef_quat=4, left_arm_eef_pos=3, left_arm_eef_quat=4)
BIMANUAL_STATE |= dict(right_gripper_qpos=2, left_gripper_qpos=2, right_hand=6, left_hand=6)
BIMANUAL_ACTION = dict(right_arm_eef_pos=3, right_arm_eef_rot=3, left_arm_eef_pos=3, left_arm_eef_rot=3)
BIMANUAL_ACTION |= dict(right_gripper_close=1, left_gripper_close=1, right_hand=6, left_hand=6)
SINGLE_STATE = dict(end_effector_position_relative=3, end_effector_rotation_relative=4, gripper_qpos=2, base_position=3)
SINGLE_STATE |= dict(base_rotation=4, end_effector_position_absolute=3, end_effector_rotation_absolute=4)
SINGLE_ACTION = dict(end_effector_position=3, end_effector_rotation=3, gripper_close=1, base_motion=4, control_mode=1)
POSE = dict(x=1, y=1, z=1, roll=1, pitch=1, yaw=1, gripper=1)

# name: tag, (height, width), instruction, dimensions of the state's and of the actions' keys
CASES = {
    "so100": (
        "new_embodiment", CAMERA, "Pick up the red cube.",
        dict(single_arm=5, gripper=1, end_effector=6), dict(single_arm=5, gripper=1, end_effector=6),
    ),
    "so100_dualcam": (
        "new_embodiment", (57, 75), "Don't spill the robot's coffee.",
        dict(single_arm=5, gripper=1, end_effector=6), dict(single_arm=5, gripper=1, end_effector=6),
    ),
    "fourier_gr1_arms_only": ("gr1", CAMERA, "pick the pear from the counter and place it in the plate", GR1, GR1),
    "fourier_gr1_arms_waist": ("gr1", CAMERA, "Pick up the cup, then turn to the shelf.", GR1, GR1),
    "fourier_gr1_full_upper_body": ("gr1", CAMERA, "Look at the box & lift it with both hands", GR1, GR1),
    "unitree_g1": ("new_embodiment", CAMERA, "Place 3 apples into the basket.", G1, G1),
    "unitree_g1_full_body": ("new_embodiment", CAMERA, "walk to the table and grasp the bottle", G1, G1),
    "agibot_genie1": ("agibot_genie1", (45, 61), "Fold the T-shirt on the table.", AGIBOT, AGIBOT),
    "oxe_droid": (
        "oxe_droid", (45, 61), "put the marker in the pot",
        dict(eef_position=3, eef_rotation=3, gripper_position=1, joint_position=7),
        dict(eef_position_delta=3, eef_rotation_delta=3, gripper_position=1, joint_velocity=7),
    ),
    "bimanual_panda_gripper": (
        "new_embodiment", (45, 61), "lift the tray with both arms", BIMANUAL_STATE, BIMANUAL_ACTION,
    ),
    "bimanual_panda_hand": ("new_embodiment", (45, 61), "Open the drawer (slowly)!", BIMANUAL_STATE, BIMANUAL_ACTION),
    "single_panda_gripper": (
        "new_embodiment", (45, 61), "open the left door of the cabinet", SINGLE_STATE, SINGLE_ACTION,
    ),
    "libero": (
        "new_embodiment", (64, 64), "put both the alphabet soup and the tomato sauce in the basket",
        POSE | dict(gripper=2, joints=7), POSE | dict(joints=7),
    ),
    "libero_mean_std": (
        "new_embodiment", (64, 64), "turn on the stove and put the moka pot on it",
        POSE | dict(gripper=2, joints=7), POSE | dict(joints=7),
    ),
    "fractal": (
        "new_embodiment", (248, 240), "move coke can near orange",
        dict(x=1, y=1, z=1, rx=1, ry=1, rz=1, rw=1, gripper=1, base=3), POSE | dict(base=3, terminate=1),
    ),
    "bridge": (
        "new_embodiment", CAMERA, "put carrot on plate", POSE | dict(pad=1, joints=6), POSE | dict(joints=6),
    ),
    "isaaclab_g1_dex3": ("new_embodiment", (SIZE, SIZE), "assemble the trocar", G1, G1),
}  # fmt: skip
DISCRETE = {"right_gripper_close", "left_gripper_close", "gripper_close", "control_mode"}


def load(file: Path) -> object:
    spec = importlib.util.spec_from_file_location("_".join(file.parts[-3:-1]), file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_configs() -> dict[str, BaseDataConfig]:
    libero, simpler = (load(checkout / "examples" / name / "custom_data_config.py") for name in ("Libero", "SimplerEnv"))
    configs = {"libero": libero.LiberoDataConfig(), "libero_mean_std": libero.LiberoDataConfigMeanStd()}
    configs |= {"fractal": simpler.FractalDataConfig(), "bridge": simpler.BridgeDataConfig()}
    configs["isaaclab_g1_dex3"] = load(isaaclab_config).IsaacLabDataConfig()
    return DATA_CONFIG_MAP | configs


class Policy(Gr00tPolicy):
    """NVIDIA's policy with a transform of its own, which remembers the network's inputs and gives the actions it was given.

    Some transforms change as they are used and their statistics as they are read: a new policy for every call.
    """

    def __init__(self, config: BaseDataConfig, metadata: dict, actions: torch.Tensor):
        self._modality_transform = config.transform()
        self._modality_transform.eval()
        self._modality_transform.set_metadata(DatasetMetadata.model_validate(metadata))
        self.actions = actions

    def _get_action_from_normalized_input(self, normalized_input: dict) -> torch.Tensor:
        self.seen = normalized_input
        return self.actions


def rotation_type(name: str, modality: str, key: str, size: int) -> str | None:
    if name == "oxe_droid" and "rotation" in key:
        return "euler_angles_rpy"
    return ROTATIONS[size] if any(word in key for word in ("rotation", "_quat", "_rot")) else None


def make_metadata(name: str, config: BaseDataConfig, rng: np.random.Generator) -> dict:
    tag, (height, width), _, *sizes = CASES[name]
    statistics, modalities = {}, {}
    for modality, keys in zip(("state", "action"), sizes):
        used = [key.split(".")[1] for key in getattr(config, f"{modality}_keys")]
        order = sorted(keys)
        if [key for key in order if key in used] == used:
            order.reverse()
        flat = rng.choice([key for key in used if rotation_type(name, modality, key, keys[key]) is None])
        statistics[modality], modalities[modality] = {}, {}
        for key in order:
            low = rng.uniform(-2, 0.5, keys[key])
            width_of = rng.uniform(0.3, 3, keys[key])
            still = rng.random(keys[key]) < 0.08
            still[-1] |= key == flat
            width_of[still] = 0
            values = {f: low + f * width_of for f in (0, 0.04, 0.45, 0.95, 1)}
            found = {"max": values[1], "min": values[0], "mean": values[0.45], "std": 0.3 * width_of}
            found |= {"q01": values[0.04], "q99": values[0.95]}
            statistics[modality][key] = {k: v.round(4).tolist() for k, v in found.items()}
            discrete = key in DISCRETE or (name, modality, key) == ("oxe_droid", "action", "gripper_position")
            modalities[modality][key] = {
                "absolute": not (modality == "action" and ("delta" in key or "motion" in key or "velocity" in key)),
                "rotation_type": rotation_type(name, modality, key, keys[key]),
                "shape": [keys[key]],
                "continuous": not discrete,
            }
    views = {key.split(".")[1] for key in config.video_keys} | ({"ego_view", "front_view"} if tag == "gr1" else set())
    described = {"resolution": [width, height], "channels": 3, "fps": 20.0}
    modalities = {"video": {view: described for view in sorted(views)}, **modalities}
    return {tag: {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}}


def make_images(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    field = torch.from_numpy(rng.uniform(0, 255, (B, 3, 5, 7)).astype(np.float32))
    smooth = F.interpolate(field, (height, width), mode="bicubic").permute(0, 2, 3, 1).numpy()
    return (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)


def make_state(statistics: dict, rotation: str | None, rng: np.random.Generator) -> np.ndarray:
    low, high = np.array(statistics["min"]), np.array(statistics["max"])
    if rotation == "quaternion":
        state = rng.normal(size=(B, 4))
        state /= np.linalg.norm(state, axis=1, keepdims=True)
        state[1] *= 1.01  # not quite of unit length
    elif rotation is not None:
        state = rng.uniform(-math.pi, math.pi, (B, len(low)))
    else:
        state = low + (high - low) * rng.uniform(-0.2, 1.2, (B, len(low)))
        state[1] += 0.1 * (low == high)  # off a range that is a point
    return state.astype(np.float32)


def main() -> None:
    configs, tensors, cases = data_configs(), {}, []
    for number, (name, (tag, (height, width), instruction, *_)) in enumerate(CASES.items()):
        rng, config = np.random.default_rng(number), configs[name]
        metadata = make_metadata(name, config, rng)
        entry = metadata[tag]
        actions = torch.from_numpy(rng.normal(0, 0.7, (B, HORIZON, ACTION_DIM)).astype(np.float32))
        video = {key: make_images(height, width, rng) for key in config.video_keys}
        state = {}
        for key in config.state_keys:
            short = key.split(".")[1]
            rotation = entry["modalities"]["state"][short]["rotation_type"]
            state[key] = make_state(entry["statistics"]["state"][short], rotation, rng)
        (language_key,) = config.language_keys

        # (B, T, ...) with T = 1, and the first sample alone
        numbers = {key: value[:, None] for key, value in (video | state).items()}
        policy = Policy(config, entry, actions)
        found = policy.get_action(numbers | {language_key: [instruction] * B})
        single = Policy(config, entry, actions[:1])
        found_single = single.get_action({k: v[0] for k, v in numbers.items()} | {language_key: [instruction]})

        seen, seen_single = policy.seen, single.seen
        pixels = (seen["eagle_pixel_values"] + 1) * 127.5
        assert pixels.shape == (B * len(video), 3, SIZE, SIZE), pixels.shape  # one tile an image
        assert (pixels - pixels.round()).abs().max() < 1e-3
        assert seen["eagle_attention_mask"].all() and seen_single["eagle_attention_mask"].all()
        assert torch.equal(seen_single["eagle_pixel_values"], seen["eagle_pixel_values"][: len(video)])
        assert torch.equal(seen_single["state"], seen["state"][:1])
        assert all(np.array_equal(found_single[key], found[key][0]) for key in config.action_keys)
        real = sum(CASES[name][4][key.split(".")[1]] for key in config.action_keys)
        assert list(found) == config.action_keys and sum(value.shape[-1] for value in found.values()) == real

        outputs = {"prompt": seen["eagle_input_ids"], "prompt_single": seen_single["eagle_input_ids"][0]}
        outputs |= {"state_input": seen["state"][:, 0], "actions": actions}
        outputs["pixels"] = pixels.round().to(torch.uint8)[..., ::STEP, ::STEP]
        outputs |= {key.replace(".", "/"): torch.as_tensor(v) for key, v in (video | state | found).items()}
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in outputs.items()}
        (embodiment_id,) = set(seen["embodiment_id"].tolist())
        case = {"name": name, "tag": tag, "embodiment_id": embodiment_id, "instruction": instruction}
        cases.append(case | {"language_key": language_key, "metadata": metadata})
        print(f"{name}: {len(video)} views, state {outputs['state_input'].count_nonzero(1).tolist()}, {real} action columns")

    file = Path(__file__).with_name("nvidia_transforms.safetensors")
    save_file(tensors, file, metadata={"cases": json.dumps(cases, separators=(",", ":"))})
    file.chmod(0o644)
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB, {len(tensors)} tensors")


if __name__ == "__main__":
    main()
