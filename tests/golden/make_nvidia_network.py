"""Makes nvidia_n1d5.safetensors: three small random GR00T N1.5 networks run through NVIDIA's own code.

It needs a checkout of Isaac-GR00T (Apache-2.0) at N1.5, here NVIDIA's commit of 2025-10-30 from a public fork, and an
environment apart from the project's (Python 3.12). From the repository root:

    git clone https://github.com/RLWRLD/Isaac-GR00T && git -C Isaac-GR00T checkout e845e75
    uv venv --python 3.12 nvidia-venv
    uv pip install --python nvidia-venv torch==2.11.0 torchvision==0.26.0 transformers==4.51.3 diffusers==0.30.2 \\
        peft timm einops dm-tree
    PYTHONPATH=. nvidia-venv/bin/python tests/golden/make_nvidia_network.py Isaac-GR00T

GR00T_N1_5 is built from config.json and called by `get_action` and `forward`, unchanged. What is changed is configs:
Eagle's has the networks' sizes, and attention is eager, because FlashAttention needs a GPU. All weights are random, norms
and biases too, and sizes that might be confused differ, from groot_n1d5.safetensors' as well.

The file holds "{case}/weights/{NVIDIA's key}", "{case}/inputs/*" and "{case}/outputs/*", and "configs" in its metadata:
each case's config.json under the case's name.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

HOME = tempfile.TemporaryDirectory()  # transformers copies Eagle's code to where it runs it
os.environ.update(HF_HOME=HOME.name, HF_HUB_OFFLINE="1")

import torch
from safetensors.torch import save_file

from gr00t_n1d5.network import Gr00tConfig

torch.set_num_threads(1)
_EAGLE = "model/backbone/eagle2_hg_model"
# name: (config, views per observation, embodiment ids, max_action_dim of config.json)
CASES = {
    "one_view": (
        Gr00tConfig.tiny(
            image_size=20, patch_size=10, vision_hidden_size=18, vision_intermediate_size=22, vision_layers=2,
            vision_heads=3, text_hidden_size=20, text_intermediate_size=26, text_layers=2, text_heads=3, text_kv_heads=1,
            text_head_dim=6, vocab_size=11, image_token_id=4, hidden_size=12, dit_layers=3, dit_heads=2, dit_head_dim=8,
            vl_layers=1, vl_heads=5, vl_head_dim=4, num_target_vision_tokens=4, max_seq_len=13, num_embodiments=2,
            action_dim=3, state_dim=7, action_horizon=10, num_inference_timesteps=3, rope_theta=1e6,
        ),
        1, [1, 0], 3,
    ),
    "three_views": (
        Gr00tConfig.tiny(
            image_size=16, patch_size=8, vision_hidden_size=16, vision_intermediate_size=30, vision_layers=1,
            vision_heads=4, text_hidden_size=24, text_intermediate_size=34, text_layers=3, text_heads=6, text_kv_heads=3,
            text_head_dim=10, vocab_size=14, image_token_id=0, hidden_size=15, dit_layers=2, dit_heads=3, dit_head_dim=6,
            vl_layers=2, vl_heads=2, vl_head_dim=12, num_target_vision_tokens=1, max_seq_len=5, num_embodiments=3,
            action_dim=8, state_dim=9, action_horizon=5, num_inference_timesteps=7, rope_theta=500.0,
            num_timestep_buckets=300, noise_beta_alpha=2.0, noise_beta_beta=1.3, noise_s=0.9,
        ),
        3, [2, 2, 0], 8,
    ),
    # NVIDIA's network never reads max_action_dim, and its gr00t_finetune.py leaves it at 32 where it changes action_dim
    "other_max_action_dim": (
        Gr00tConfig.tiny(
            image_size=14, patch_size=7, vision_hidden_size=14, vision_intermediate_size=20, vision_layers=2,
            vision_heads=2, text_hidden_size=18, text_intermediate_size=28, text_layers=1, text_heads=4, text_kv_heads=4,
            text_head_dim=4, vocab_size=17, image_token_id=16, hidden_size=13, dit_layers=4, dit_heads=5, dit_head_dim=2,
            vl_layers=3, vl_heads=3, vl_head_dim=6, num_target_vision_tokens=2, max_seq_len=40, num_embodiments=5,
            action_dim=11, state_dim=21, action_horizon=16, num_inference_timesteps=4, rope_theta=1e4,
        ),
        2, [4, 0, 3, 1], 32,
    ),
}  # fmt: skip


def import_nvidia(checkout: Path) -> types.ModuleType:
    """NVIDIA's network without its package file, which imports data loading, too."""
    root = checkout.absolute() / "gr00t"
    for name, path in {"gr00t": root, "gr00t.model": root / "model"}.items():
        package = types.ModuleType(name)
        package.__path__, package.__file__ = [str(path)], str(path / "__init__.py")
        sys.modules[name] = package
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"):  # of a vision tower not in use
        stub = types.ModuleType(name)
        stub.__path__, stub.__spec__ = [], ModuleSpec(name, None)
        for function in ("flash_attn_unpadded_qkvpacked_func", "pad_input", "unpad_input"):
            setattr(stub, function, None)
        sys.modules[name] = stub
    torch.cuda.get_device_capability = lambda *args: (0, 0)  # asked for by that tower's file
    return importlib.import_module("gr00t.model.gr00t_n1")


def write_eagle(source: Path, folder: Path, config: Gr00tConfig) -> None:
    """A copy of NVIDIA's Eagle folder with other sizes in its config.json."""
    folder.mkdir()
    for file in source.glob("*.py"):
        shutil.copy(file, folder)
    eagle, sizes = json.loads((source / "config.json").read_text()), config.to_dict()["eagle_cfg"]
    eagle["vision_config"].update(sizes["vision_config"])
    eagle["text_config"].update(sizes["text_config"], hidden_size=config.text_hidden_size)
    eagle["text_config"]["num_hidden_layers"] = config.text_layers + 2  # EagleBackbone drops those above select_layer
    eagle.update(image_token_index=config.image_token_id, force_image_size=config.image_size, _attn_implementation="eager")
    for part in (eagle, eagle["vision_config"], eagle["text_config"]):
        part["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(eagle))


def randomize(model: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        if name.endswith(".W"):
            std = 0.7 * p.shape[1] ** -0.5
        elif p.ndim == 1 or "embed" in name or "future_tokens" in name or "probe" in name:
            std = 0.3
        else:
            std = 0.7 * p[0].numel() ** -0.5
        is_scale = p.ndim == 1 and name.endswith("weight")
        p.data = is_scale + std * torch.randn(p.shape)


def make_inputs(config: Gr00tConfig, views: int, embodiments: list[int]) -> dict[str, torch.Tensor]:
    batch = len(embodiments)
    words = torch.tensor([i for i in range(config.vocab_size) if i != config.image_token_id])
    image = torch.full((batch, config.tokens_per_view), config.image_token_id)
    parts = [words[torch.randint(len(words), (batch, 2))]]  # two words before, between and behind the views
    for _ in range(views):
        parts += [image, words[torch.randint(len(words), (batch, 2))]]
    inputs = {
        "input_ids": torch.cat(parts, 1),
        "pixel_values": torch.rand(batch * views, 3, config.image_size, config.image_size) * 2 - 1,
        "state": torch.randn(batch, 1, config.state_dim),
        "embodiment_id": torch.tensor(embodiments),
        "action": torch.randn(batch, config.action_horizon, config.action_dim),
    }
    inputs["action_mask"] = torch.ones_like(inputs["action"])
    inputs["action_mask"][0, :, config.action_dim // 2 :] = 0
    return inputs


@torch.no_grad()
def run_case(gr00t: types.ModuleType, checkout: Path, name: str, seed: int) -> tuple[dict[str, torch.Tensor], dict]:
    config, views, embodiments, max_action_dim = CASES[name]
    written = config.to_dict()
    written["action_head_cfg"]["max_action_dim"] = max_action_dim
    folder = Path(HOME.name) / f"eagle_{name}"
    write_eagle(checkout / "gr00t" / _EAGLE, folder, config)
    sys.modules["gr00t.model.backbone.eagle_backbone"].DEFAULT_EAGLE_PATH = str(folder)

    torch.manual_seed(seed)
    model = gr00t.GR00T_N1_5(gr00t.GR00T_N1_5_Config(**written), local_model_path="").eval()
    eagle = model.backbone.eagle_model
    for part in (eagle.vision_model, eagle.language_model):  # Eagle's constructor asks for flash_attention_2 once more
        part.config._attn_implementation = "eager"
    randomize(model)
    inputs = make_inputs(config, views, embodiments)
    ids = inputs["input_ids"]
    batch = {f"eagle_{key}": inputs[key] for key in ("input_ids", "pixel_values")}
    batch |= {"eagle_attention_mask": torch.ones_like(ids), "eagle_image_sizes": torch.zeros(len(inputs["pixel_values"]), 2)}
    batch |= {key: inputs[key] for key in ("state", "embodiment_id")}
    training = batch | {key: inputs[key] for key in ("action", "action_mask")}

    torch.manual_seed(seed)  # NVIDIA's code draws noise, and in training then the times: draw the same before
    inputs["noise"] = torch.randn(inputs["action"].shape)
    inputs["t"] = model.action_head.sample_time(len(ids), "cpu", torch.float32)
    features = []
    hook = model.backbone.register_forward_hook(lambda m, args, out: features.append(out["backbone_features"].clone()))
    torch.manual_seed(seed)
    outputs = {"actions": model.get_action(batch)["action_pred"]}
    torch.manual_seed(seed)
    outputs["loss"] = model.forward(training)["loss"]
    hook.remove()
    assert torch.equal(features[0], features[1])
    outputs["features"] = features[0]

    weights = {key: x for key, x in model.state_dict().items() if not key.endswith("lm_head.weight")}  # tied
    assert all(x.dtype == torch.float32 and x.std(correction=0) > 0.05 for x in weights.values() if x.numel() > 1)
    groups = {"weights": weights, "inputs": inputs, "outputs": outputs}
    count = sum(x.numel() for x in weights.values())
    print(f"{name}: {count} parameters, loss {outputs['loss']:.4f}, t {[round(t, 3) for t in inputs['t'].tolist()]}")
    for key, x in outputs.items():
        print(f"    {key}: {tuple(x.shape)}, std {x.std(correction=0):.3f}")
    return {f"{name}/{group}/{key}": x.contiguous() for group, values in groups.items() for key, x in values.items()}, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of NVIDIA's Isaac-GR00T at N1.5")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("nvidia_n1d5.safetensors"))
    args = parser.parse_args()
    gr00t = import_nvidia(args.checkout)
    tensors, configs = {}, {}
    for seed, name in enumerate(CASES):
        made, configs[name] = run_case(gr00t, args.checkout, name, seed)
        tensors |= made
    save_file(tensors, args.out, metadata={"configs": json.dumps(configs)})
    args.out.chmod(0o644)
    print(f"{args.out.name}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
