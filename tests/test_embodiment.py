"""Data configs and metadata.json: against NVIDIA's own transforms (tests/golden), and what is refused before weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gr00t_n1d5 import (
    DATA_CONFIGS,
    DataConfig,
    Embodiment,
    Gr00tConfig,
    Gr00tProcessor,
    find_data_config,
    load_tokenizer,
    read_embodiment,
)

GOLDEN = Path(__file__).parent / "golden"
with safe_open(GOLDEN / "nvidia_transforms.safetensors", framework="pt") as file:
    CASES = {case["name"]: case for case in json.loads(file.metadata()["cases"])}
torch.set_num_threads(1)


def tensors(name: str) -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN / "nvidia_transforms.safetensors", framework="pt") as file:
        return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer")


def processor_of(name: str, tokenizer) -> Gr00tProcessor:
    """At full size, with metadata whose keys are more, and in another order."""
    case = CASES[name]
    return Gr00tProcessor(Gr00tConfig(), tokenizer, Embodiment(case["metadata"], case["tag"], DATA_CONFIGS[name]))


def test_every_row_is_checked():
    assert set(DATA_CONFIGS) - set(CASES) == {"maniskill_widowx"}  # RLinf's: the encodings of fourier_gr1_arms_only


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_outputs_are_nvidias(name, tokenizer):
    """What enters the network and what leaves it, by NVIDIA's data config of that name."""
    processor, case, found = processor_of(name, tokenizer), CASES[name], tensors(name)
    data, views = DATA_CONFIGS[name], len(DATA_CONFIGS[name].video)
    images = torch.stack([found[f"video/{key}"] for key in data.video], 1)  # (B, V, H, W, 3)
    pixels = processor.images(images)
    assert torch.equal(((pixels[..., ::7, ::7] + 1) * 127.5).round().byte(), found["pixels"])
    state = torch.cat([found[f"state/{key}"] for key in data.state], -1)
    torch.testing.assert_close(processor.normalize_state(state)[:, 0], found["state_input"], rtol=0, atol=1e-6)
    assert processor.prompt(case["instruction"], views).tolist() == found["prompt"][0].tolist()
    assert processor.prompt(case["instruction"], views, bracketed=True).tolist() == found["prompt_single"].tolist()
    actions = processor.unnormalize_action(found["actions"])
    expected = torch.cat([found[f"action/{key}"] for key in data.action], -1)
    torch.testing.assert_close(actions, expected, rtol=1e-6, atol=1e-6)
    assert processor.embodiment_id == case["embodiment_id"] and data.language == case["language_key"]


@pytest.mark.parametrize("name", ["so100", "oxe_droid", "isaaclab_g1_dex3"])
def test_a_task_with_another_order(name, tokenizer):
    """Keys are matched by name: views, state and actions of a task that has them in another order."""
    plain, processor, found, data = (
        processor_of(name, tokenizer),
        processor_of(name, tokenizer),
        tensors(name),
        DATA_CONFIGS[name],
    )
    other = {kind: dict(reversed(plain.embodiment.sizes[kind].items())) for kind in ("state", "action")}
    processor.connect(other | {"video": data.video[::-1]})
    images = [found[f"video/{key}"] for key in data.video]
    assert torch.equal(processor.images(torch.stack(images[::-1], 1)), plain.images(torch.stack(images, 1)))
    state = torch.cat([found[f"state/{key}"] for key in other["state"]], -1)
    torch.testing.assert_close(processor.normalize_state(state)[:, 0], found["state_input"], rtol=0, atol=1e-6)
    actions = processor.unnormalize_action(found["actions"])
    expected = torch.cat([found[f"action/{key}"] for key in other["action"]], -1)
    torch.testing.assert_close(actions, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        processor.normalize_action(actions), plain.normalize_action(plain.unnormalize_action(found["actions"]))
    )


def test_the_tokenizer_is_nvidias(tokenizer):
    """Instructions of many kinds, plain and bracketed, with one to three views; the files have what these need."""
    texts, processor = json.loads((GOLDEN / "tokenizer" / "texts.json").read_text()), processor_of("so100", tokenizer)
    image = processor.config.image_token_id
    for i, text in enumerate(texts["texts"]):
        for form in ("ids", "bracketed"):
            views = i % 3 + 1
            before = [t for token in texts["before"][views - 1] for t in ([image] * 256 if token == image else [token])]
            expected = before + texts[form][i] + texts["after"]
            assert processor.prompt(text, views, form == "bracketed").tolist() == expected, text


def test_states_far_from_the_training_data_are_named(tokenizer):
    processor = processor_of("so100", tokenizer)
    statistics = processor.embodiment.statistics("state")
    low, high = (
        torch.cat([torch.tensor(statistics[key][end]) for key in DATA_CONFIGS["so100"].state]) for end in ("min", "max")
    )
    state = ((low + high) / 2).expand(5, -1).clone()
    assert processor.unusual(state) is None
    state[0, 2] = 1e6  # one environment of five
    assert processor.unusual(state) is None
    state[:, -1] = 2 * high[-1] - low[-1] + 1
    assert processor.unusual(state).startswith("gripper is [") and "single_arm" not in processor.unusual(state)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"state": {"arm": "minmax"}}, "state.arm: 'minmax' is not one of min_max"),
        ({"state": {"arm": "sin_cos+min_max"}}, "is not one of"),
        ({"action": {"arm": "sin_cos"}}, "sin_cos cannot be undone"),
        ({"observation_indices": [-1, 0]}, "no history, no gaps"),
        ({"action_indices": [0, 2, 4]}, "no history, no gaps"),
        ({"views": ["front"]}, "unknown fields views; there are action"),
        ({"state": ["arm"]}, "state and action maps of keys"),
        ({"video": "front"}, "video must be a list of keys"),
        ({"video": 1}, "not a data config"),
    ],
)
def test_data_configs_of_ones_own(change, why, tmp_path):
    own = {"video": ["front"], "state": {"arm": "min_max"}, "action": {"arm": "min_max"}}
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own))
    assert find_data_config(str(file)) == DataConfig(("front",), {"arm": "min_max"}, {"arm": "min_max"})
    assert DataConfig.from_dict(find_data_config(str(file)).to_dict()) == find_data_config(str(file))
    file.write_text(json.dumps(own | change))
    with pytest.raises(SystemExit, match=f"--data-config {file}: .*({why})"):
        find_data_config(str(file))


def test_embodiments_of_ones_own(tokenizer):
    """A tag without an id, an id of one's own, another crop and horizon, rotations without a kind, sizes that do not fit."""
    case = CASES["so100"]
    metadata = {"my_robot": case["metadata"][case["tag"]]}
    with pytest.raises(ValueError, match="'my_robot' has no id; give embodiment_id in a data config"):
        Gr00tProcessor(Gr00tConfig(), tokenizer, Embodiment(metadata, "my_robot", DATA_CONFIGS["so100"]))
    data = dataclasses.replace(DATA_CONFIGS["so100"], embodiment_id=7, crop=1.0, action_indices=range(8))
    processor = Gr00tProcessor(Gr00tConfig(), tokenizer, Embodiment(metadata, "my_robot", data))
    assert (processor.embodiment_id, processor.config.image_crop, processor.config.action_horizon) == (7, 1.0, 8)
    assert processor.camera_size == 224
    with pytest.raises(ValueError, match="embodiment id 40 of tag 'my_robot': the network has 32"):
        Embodiment(metadata, "my_robot", dataclasses.replace(data, embodiment_id=40)).adapt(Gr00tConfig())
    turned = dataclasses.replace(data, state={"single_arm": "rotation_6d", "gripper": "min_max"})
    with pytest.raises(ValueError, match="rotation_type of state.single_arm is None, not one of quaternion"):
        Embodiment(metadata, "my_robot", turned)
    with pytest.raises(ValueError, match="my_robot: 6 action dimensions, the network has 4"):
        Embodiment(metadata, "my_robot", data).adapt(Gr00tConfig(action_dim=4))


@pytest.mark.parametrize(
    "metadata", [{"gr1": {}}, {"gr1": {"statistics": []}}, {"gr1": {"statistics": {"state": 1, "action": {}}}}]
)
def test_metadata_that_is_none(metadata, tmp_path):
    """One line, whatever the file holds."""
    (tmp_path / "experiment_cfg").mkdir()
    (tmp_path / "experiment_cfg" / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="gr1: incomplete metadata"):
        read_embodiment(tmp_path, None, "so100")
    with pytest.raises(SystemExit, match="--data-config: needed for tag gr1, .* a JSON file"):
        read_embodiment(tmp_path)
