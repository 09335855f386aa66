"""docs/checkpoints.md: public checkpoints in their true layout, with tiny random weights or none at all.

Metadata are those of tests/golden, whose keys are more than the network gets and in another order.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

import ppo_gr00t_frozen
import serve_gr00t
from common import Noise, Ranks
from gr00t_n1d5 import DATA_CONFIGS, Gr00tConfig, Gr00tN1d5, check_checkpoint
from gr00t_n1d5.files import INDEX
from tasks.gr00t import TASKS
from tests.test_embodiment import CASES, GOLDEN

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def entry(case: str, tag: str) -> dict:
    return {tag: CASES[case]["metadata"][CASES[case]["tag"]] | {"embodiment_tag": tag}}


def exact(case: str, tag: str) -> dict:
    """Without the keys that the data config does not use."""
    ((_, found),) = entry(case, tag).items()
    keep = {kind: getattr(DATA_CONFIGS[case], kind) for kind in ("video", "state", "action")}
    modalities = {kind: {k: v for k, v in found["modalities"][kind].items() if k in keep[kind]} for kind in keep}
    statistics = {kind: {k: v for k, v in found["statistics"][kind].items() if k in keep[kind]} for kind in ("state", "action")}
    return {tag: found | {"modalities": modalities, "statistics": statistics}}


BASE = entry("fourier_gr1_arms_waist", "gr1") | entry("oxe_droid", "oxe_droid") | entry("agibot_genie1", "agibot_genie1")
PUBLIC = {  # metadata.json of what the documentation lists
    "nvidia/GR00T-N1.5-3B": BASE,
    "nvidia/Assemble_Trocar": exact("isaaclab_g1_dex3", "new_embodiment"),
    "RLinf/RLinf-Gr00t-SFT-Stack-cube": exact("libero", "isaaclab_franka"),
    "RLinf/RLinf-Gr00t-SFT-Spatial": exact("libero", "libero_franka"),
    "RLinf/RLinf-Gr00t-RL-Spatial-Step400": exact("libero", "libero_franka"),
    "youliangtan/gr00t-n1.5-libero-spatial-posttrain": exact("libero", "new_embodiment"),
    "youliangtan/gr00t-n1.5-libero-goal-posttrain": exact("libero_mean_std", "new_embodiment"),
    "youliangtan/gr00t-n1.5-bridge-posttrain": exact("bridge", "new_embodiment"),
    "youliangtan/gr00t-n1.5-fractal-posttrain": exact("fractal", "new_embodiment"),
    "youliangtan/gr00t-n1.5-robocasa-tabletop-posttrain": entry("fourier_gr1_arms_waist", "gr1"),
    "so100_dualcam": exact("so100_dualcam", "new_embodiment"),
}
SERVED = {  # with these flags
    "nvidia/GR00T-N1.5-3B": [
        {"embodiment_tag": "gr1", "data_config": "fourier_gr1_arms_waist"},
        {"embodiment_tag": "gr1", "data_config": "fourier_gr1_arms_only"},
        {"embodiment_tag": "oxe_droid"},
        {"embodiment_tag": "agibot_genie1"},
    ],
    "nvidia/Assemble_Trocar": [{"data_config": "isaaclab_g1_dex3"}],
    "youliangtan/gr00t-n1.5-libero-spatial-posttrain": [{"data_config": "libero"}],
    "youliangtan/gr00t-n1.5-libero-goal-posttrain": [{"data_config": "libero_mean_std"}],
    "youliangtan/gr00t-n1.5-robocasa-tabletop-posttrain": [{"data_config": "fourier_gr1_arms_waist"}],
}
TRAINED = {  # on these rows, without flags
    "nvidia/Assemble_Trocar": "IsaacContrib-Assemble-Trocar-G129-Dex3",
    "RLinf/RLinf-Gr00t-SFT-Stack-cube": "RLinf-Stack-Cube",
}


def write(folder: Path, metadata: dict, config: dict) -> Path:
    (folder / "experiment_cfg").mkdir(parents=True)
    (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """Folders as the hub has them, by name: full-size config.json, metadata.json, an index, no weights."""
    root, config = tmp_path_factory.mktemp("layout"), Gr00tConfig().to_dict()
    del config["eagle_cfg"], config["input_cfg"], config["init_cfg"]  # which the public files do not have
    for name, metadata in PUBLIC.items():
        folder = write(root / name, metadata, config)
        index = {"weight_map": {"action_head.future_tokens.weight": "model-00001-of-00003.safetensors"}}
        (folder / INDEX).write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny network with NVIDIA's prompt, vocabulary, rows of embodiments and padded sizes, in bf16 shards."""
    config = Gr00tConfig(**{
        **vars(Gr00tConfig.tiny()), "vocab_size": 151680, "image_token_id": 151669, "max_position_embeddings": 1024,
        "num_embodiments": 32, "action_dim": 32, "state_dim": 64, "action_horizon": 16, "image_crop": 0.95,
        "prompt_template": Gr00tConfig.prompt_template, "image_template": Gr00tConfig.image_template, "max_text_tokens": 128,
    })  # fmt: skip
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    Gr00tN1d5(config).bfloat16().save_pretrained(folder, max_shard_bytes=8_000_000)
    return folder


def tiny(name: str, weights: Path, tmp_path: Path) -> Path:
    """That public checkpoint, of tiny size: it can be loaded."""
    folder = write(tmp_path / name, PUBLIC[name], json.loads((weights / "config.json").read_text()))
    for file in (*weights.glob("*.safetensors*"), *(GOLDEN / "tokenizer").iterdir()):
        (folder / file.name).hardlink_to(file) if file.suffix != ".json" else (folder / file.name).write_bytes(
            file.read_bytes()
        )
    if "-RL-" in name:  # RLinf leaves the value head beside the network
        shard = sorted(folder.glob("*.safetensors"))[0]
        changed = load_file(shard) | {"action_head.value_head.mlp.0.weight": torch.zeros(2, 2)}
        shard.unlink()
        save_file(changed, shard)
    return folder


def npy(array: np.ndarray) -> dict:
    data = io.BytesIO()
    np.save(data, array)
    return {"__ndarray_class__": True, "as_npy": data.getvalue()}


@pytest.mark.parametrize("name", PUBLIC)
def test_each_loads_and_acts(name, weights, tmp_path):
    """Behind the server, for each of its embodiments; of three views, too."""
    folder = tiny(name, weights, tmp_path)
    for flags in SERVED.get(name, [{}]):
        args = serve_gr00t.check(serve_gr00t.Args(checkpoint=str(folder), device="cpu", **flags))
        policy, rng = serve_gr00t.ServedPolicy(args), np.random.default_rng(0)
        data = {key: npy(rng.integers(256, size=(1, 72, 96, 3), dtype=np.uint8)) for key in policy.video}
        data |= {key: npy(rng.normal(size=(1, size))) for key, size in policy.state.items()}
        reply = policy.get_action(data | {policy.language: ["Pick up the red cube."]})
        assert {key: x.shape for key, x in reply.items()} == {key: (16, size) for key, size in policy.action.items()}
        assert all(np.isfinite(x).all() for x in reply.values())


@pytest.mark.parametrize("name, task", TRAINED.items())
def test_those_with_a_row_explore(name, task, weights, tmp_path, monkeypatch):
    """A step of the policy that RL trains, without a flag."""
    folder, row = tiny(name, weights, tmp_path), TASKS[task]
    check_checkpoint(str(folder), None, None, task, TASKS)
    policy = ppo_gr00t_frozen.Gr00tActor(ppo_gr00t_frozen.Args(checkpoint=str(folder), task=task, device="cpu"))
    assert policy.prompts.shape == (1, row.pad_prompt) and policy.processor.embodiment_id == 31
    images = torch.randint(256, (2, len(row.cameras), 64, 64, 3), dtype=torch.uint8)
    seen = {"images": images, "state": torch.randn(2, row.sizes["state"]), "prompt": torch.zeros(2, dtype=torch.long)}
    found = policy.act(TensorDict(seen | {"critic": torch.zeros(2, row.privileged)}, 2), Noise("cpu", Ranks(0, 1), 1), True)
    assert found["action"].shape == (2, 16, row.sizes["action"]) and found["log_prob"].isfinite().all()


STACK, OWN = "RLinf-Stack-Cube", "Tabletop-Lift-Cube-v0"
BASE_MODEL, LIBERO = "nvidia/GR00T-N1.5-3B", "youliangtan/gr00t-n1.5-libero-spatial-posttrain"
SFT = "make it fit: python sft_gr00t.py --checkpoint .*GR00T-N1.5-3B --task Tabletop-Lift-Cube-v0$"
REFUSED = [  # checkpoint, tag, data config, task, and what is said
    (BASE_MODEL, None, None, OWN, "--embodiment-tag: needed for .*agibot_genie1, gr1, oxe_droid"),
    (BASE_MODEL, "so100", None, OWN, "--embodiment-tag so100: is not in"),
    (BASE_MODEL, "gr1", None, OWN, "--data-config: needed .* fourier_gr1_arms_only, fourier_gr1_arms_waist.* would fit"),
    (BASE_MODEL, "gr1", "so100", OWN, "gr1: no state.single_arm in metadata.json, which has .*left_arm"),
    (BASE_MODEL, "gr1", "fourier_gr1_arms_waist", OWN, f"not for {OWN}: video: it wants ego_view.* {SFT}"),
    (BASE_MODEL, "oxe_droid", None, STACK, "video: it wants exterior_image_1, .*state: it wants eef_position"),
    (BASE_MODEL, "agibot_genie1", None, "Isaac-Humanoid", "write a row for it .*sft_gr00t.py on a task with an expert"),
    ("RLinf/RLinf-Gr00t-SFT-Stack-cube", None, None, OWN, f"use --task {STACK}; or make it fit"),
    ("RLinf/RLinf-Gr00t-SFT-Stack-cube", None, "no.json", STACK, "--data-config no.json: no such file"),
    (LIBERO, None, None, OWN, "--data-config: needed .* libero, libero_mean_std would fit"),
    ("youliangtan/gr00t-n1.5-bridge-posttrain", None, None, STACK, "video: it wants image_0, it has no image, wrist_image"),
    ("so100_dualcam", None, None, STACK, "state: it wants single_arm, it has no x, .*gripper has 1 columns there, 2 here"),
    ("so100_dualcam", None, "so100", OWN, "no video.webcam in metadata.json, which has "),
]


@pytest.mark.parametrize("name, tag, config, task, why", REFUSED)
def test_what_does_not_fit_is_refused_before_weights(name, tag, config, task, why, layout):
    start = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        check_checkpoint(str(layout / name), tag, config, task, TASKS)
    assert time.monotonic() - start < 1
    text = str(caught.value)
    assert "\n" not in text and re.search(why, text), text


def test_the_wrong_robot_with_the_right_keys(layout, caplog):
    """LIBERO's checkpoints have the keys of RLinf's Isaac Lab setting."""
    check_checkpoint(str(layout / "RLinf/RLinf-Gr00t-SFT-Stack-cube"), None, None, STACK, TASKS)
    assert not caplog.text
    check_checkpoint(str(layout / "RLinf/RLinf-Gr00t-SFT-Spatial"), None, None, STACK, TASKS)
    assert f"{STACK} is made for tag isaaclab_franka" in caplog.text and "libero_franka" in caplog.text


@pytest.mark.parametrize(
    "script", ["grpo_gr00t", "grpo_gr00t_lora", "ppo_gr00t_frozen", "ppo_gr00t_lora", "serve_gr00t", "sft_gr00t"]
)
def test_command_lines(script, layout):
    """Within seconds, one line, no weights: there are none."""
    folder, start = layout / "nvidia/GR00T-N1.5-3B", time.monotonic()
    flags = ["--evaluate"] if script == "sft_gr00t" else []
    command = [sys.executable, str(ROOT / f"{script}.py"), "--checkpoint", str(folder), *flags]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and run.stderr.startswith("--embodiment-tag: needed for") and run.stderr.count("\n") == 1
    assert time.monotonic() - start < 5


def test_from_before_july_2025(layout):
    folder = layout / "so100_dualcam"
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace("future_tokens", "past_tokens"))
    with pytest.raises(SystemExit, match="no action_head.future_tokens.weight: checkpoints from before July 2025"):
        check_checkpoint(str(folder), None, None)
    (folder / INDEX).write_text(text)


# ---------------------------------------------------------------- NVIDIA's own client


RECORDED = msgpack.unpackb((GOLDEN / "nvidia_client.msgpack").read_bytes())
ANSWERED = {  # what a recorded client asks for, of which checkpoint
    "gr1": (BASE_MODEL, {"embodiment_tag": "gr1", "data_config": "fourier_gr1_arms_waist"}),
    "agibot": (BASE_MODEL, {"embodiment_tag": "agibot_genie1"}),
    "so100": ("so100_dualcam", {}),
    "so100_batch": ("so100_dualcam", {}),
    "so100_integers": ("so100_dualcam", {}),
    "so100_string_array": ("so100_dualcam", {}),
    "so100_bare_string": ("so100_dualcam", {}),  # which NVIDIA's service cannot read
}


@pytest.mark.parametrize("name", ANSWERED)
def test_nvidias_client_gets_the_networks_actions(name, weights, tmp_path):
    """The bytes that its unchanged class sent, keys in another order, against the network itself."""
    (checkpoint, flags), data = ANSWERED[name], RECORDED[name]["observation"]
    folder = tiny(checkpoint, weights, tmp_path)
    args = serve_gr00t.Args(checkpoint=str(folder), device="cpu", prompt="nvidia", **flags)
    policy = serve_gr00t.ServedPolicy(args)
    reply, on = serve_gr00t.answer(lambda: serve_gr00t.unpack_message([RECORDED[name]["request"]]), policy, None)
    assert on and "error" not in reply, reply
    seen = {key: np.load(io.BytesIO(value)) if isinstance(value, bytes) else value for key, value in data.items()}
    processor, robot = policy.processor, policy.processor.embodiment
    state = np.concatenate([seen[f"state.{key}"] for key in robot.data.state], -1)
    batched = state.ndim == 3
    (texts,) = (np.ravel(value).tolist() for key, value in seen.items() if key.startswith("annotation."))
    n, views = len(texts), len(robot.data.video)
    noise = Noise("cpu", Ranks(0, 1), 1).normal(n, 16, 32)
    net = Gr00tN1d5.from_pretrained(folder)
    expected = []
    for i, text in enumerate(texts):
        images = [seen[f"video.{key}"][i] if batched else seen[f"video.{key}"] for key in robot.data.video]  # (1, H, W, 3)
        pixels = torch.cat([processor.images(torch.from_numpy(x)[None]) for x in images])
        own = torch.from_numpy(state.reshape(n, -1)[i : i + 1]).float()
        prompt = processor.prompt(text, views, bracketed=not batched)[None]
        inputs = prompt, pixels, processor.normalize_state(own), torch.tensor([processor.embodiment_id])
        with torch.no_grad():
            net.float()
            expected.append(processor.unnormalize_action(net.get_action(*inputs, noise[i : i + 1]))[0].numpy())
    found = np.concatenate([reply[f"action.{key}"] for key in robot.data.action], -1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, np.stack(expected) if batched else expected[0], rtol=0, atol=2e-5 * max(scale, 1.0))


@pytest.mark.parametrize("name", [name for name, x in RECORDED.items() if x["serializer"] != "msgpack"])
def test_clients_from_before_msgpack(name):
    """Nothing of theirs is unpickled; those of torch.save can read why."""
    parts = [RECORDED[name]["request"]]
    reply, on = serve_gr00t.answer(lambda: serve_gr00t.unpack_message(parts), None, None)
    assert on and set(reply) == {"error"}
    assert serve_gr00t.is_torch_save(parts) == (RECORDED[name]["serializer"] == "torch")
    if serve_gr00t.is_torch_save(parts):
        assert "torch.save is not read" in reply["error"]
        assert torch.load(io.BytesIO(serve_gr00t.torch_saved(reply)), weights_only=True) == reply


def test_tokens_of_nvidias_client():
    """Where it puts the token is where it is looked for."""
    for name, expected in (("ping", "Unauthorized"), ("ping_token", "Server is running")):
        reply, _ = serve_gr00t.answer(partial(serve_gr00t.unpack_message, [RECORDED[name]["request"]]), None, "open, sesame")
        assert expected in str(reply)
