"""Makes groot_n1d5.safetensors: a small random GR00T N1.5 run through lerobot 0.4.4's port on transformers 4.

The port (Apache-2.0) is an implementation of its own, with NVIDIA's code and key names. It needs an environment apart
from the project's (Python 3.12), from the repository root:

    uv venv --python 3.12 golden-venv
    uv pip install --python golden-venv --no-deps lerobot==0.4.4
    uv pip install --python golden-venv torch==2.11.0 torchvision transformers==4.57.6 diffusers==0.35.2 \\
        peft einops dm-tree draccus
    PYTHONPATH=. golden-venv/bin/python tests/golden/make_groot_golden.py

All weights are random, norms and biases too, and sizes that might be confused differ. The file holds the weights under
the port's own keys, "inputs.*", "outputs.*", and config.json in its metadata.
"""

import json
import sys
import types
from importlib.metadata import distribution
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import SiglipVisionModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from gr00t_n1d5.network import Gr00tConfig

# lerobot's package files import every policy; the port itself needs none of them.
root = Path(distribution("lerobot").locate_file("lerobot"))
for name in ("policies", "policies.groot"):
    package = types.ModuleType(f"lerobot.{name}")
    package.__path__ = [str(root / name.replace(".", "/"))]
    sys.modules[package.__name__] = package

from lerobot.policies.groot.action_head.flow_matching_action_head import (  # noqa: E402
    FlowmatchingActionHead,
    FlowmatchingActionHeadConfig,
)
from lerobot.policies.groot.eagle2_hg_model.configuration_eagle2_5_vl import Eagle25VLConfig  # noqa: E402
from lerobot.policies.groot.eagle2_hg_model.modeling_eagle2_5_vl import Eagle25VLForConditionalGeneration  # noqa: E402
from lerobot.policies.groot.groot_n1 import EagleBackbone  # noqa: E402
from transformers.feature_extraction_utils import BatchFeature  # noqa: E402

CONFIG = Gr00tConfig.tiny(
    image_size=24, patch_size=8, vision_hidden_size=20, vision_intermediate_size=28, vision_layers=3, vision_heads=2,
    text_hidden_size=24, text_intermediate_size=36, text_layers=3, text_heads=4, text_kv_heads=2, text_head_dim=8,
    vocab_size=12, image_token_id=7, hidden_size=14, dit_layers=4, dit_heads=2, dit_head_dim=8, vl_layers=2, vl_heads=3,
    vl_head_dim=8, num_target_vision_tokens=3, max_seq_len=9, num_embodiments=4, action_dim=5, state_dim=10,
    action_horizon=6, rope_theta=1e4,
)  # fmt: skip
VIEWS = 2


def build_port() -> torch.nn.Module:
    written = CONFIG.to_dict()
    vision = {"model_type": "siglip_vision_model", **written["eagle_cfg"]["vision_config"]}
    text = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True, "hidden_size": CONFIG.text_hidden_size}
    text |= {"num_hidden_layers": CONFIG.text_layers, **written["eagle_cfg"]["text_config"]}
    eagle = Eagle25VLConfig(
        vision_config=vision, text_config=text, select_layer=-1, image_token_index=CONFIG.image_token_id,
        use_pixel_shuffle=False, mlp_connector_layers=1, _attn_implementation="eager",
    )  # fmt: skip
    eagle.vision_config._attn_implementation = eagle.text_config._attn_implementation = "eager"
    backbone = EagleBackbone.__new__(EagleBackbone)  # its constructor downloads the full-size config
    torch.nn.Module.__init__(backbone)
    vision_model, language_model = SiglipVisionModel(eagle.vision_config), Qwen3ForCausalLM(eagle.text_config)
    backbone.eagle_model = Eagle25VLForConditionalGeneration(eagle, vision_model, language_model)
    backbone.eagle_linear = torch.nn.Identity()
    backbone.select_layer = CONFIG.text_layers
    port = torch.nn.Module()
    port.backbone = backbone
    port.action_head = FlowmatchingActionHead(FlowmatchingActionHeadConfig(**written["action_head_cfg"]))
    return port.eval()


def main() -> None:
    torch.manual_seed(0)
    port = build_port()
    for name, p in port.named_parameters():
        norm = "norm" in name or "vlln" in name
        fan_in = p.shape[-2] if name.endswith(".W") else p[0].numel() if p.ndim > 1 else 1
        scale = 0.5 if "embed" in name or "future_tokens" in name else 0.5 * fan_in**-0.5
        center = 1.0 if norm and name.endswith("weight") else 0.0
        p.data = center + (0.3 if p.ndim == 1 else scale) * torch.randn(p.shape)

    batch, image_tokens = 3, torch.full((3, CONFIG.tokens_per_view), CONFIG.image_token_id)
    text = torch.randint(0, CONFIG.image_token_id, (batch, 7))
    input_ids = torch.cat([text[:, :3], image_tokens, text[:, 3:4], image_tokens, text[:, 4:]], 1)
    inputs = {
        "input_ids": input_ids,
        "pixel_values": torch.rand(batch * VIEWS, 3, CONFIG.image_size, CONFIG.image_size) * 2 - 1,
        "state": torch.randn(batch, 1, CONFIG.state_dim),
        "embodiment_id": torch.tensor([1, 3, 1]),
        "action": torch.randn(batch, CONFIG.action_horizon, CONFIG.action_dim),
        "t": torch.tensor([0.03, 0.5, 0.95]),
    }
    inputs["action_mask"] = torch.ones_like(inputs["action"])
    inputs["action_mask"][1, :, 3:] = 0
    head = port.action_head
    actions = BatchFeature({key: inputs[key] for key in ("state", "embodiment_id", "action", "action_mask")})
    with torch.no_grad():
        eagle_inputs = {"eagle_input_ids": input_ids, "eagle_pixel_values": inputs["pixel_values"]}
        eagle_inputs |= {"eagle_attention_mask": torch.ones_like(input_ids), "eagle_image_sizes": None}
        features = port.backbone(BatchFeature(eagle_inputs))["backbone_features"]

        def backbone_output() -> BatchFeature:  # the head overwrites it
            return BatchFeature({"backbone_features": features, "backbone_attention_mask": torch.ones_like(input_ids)})

        torch.manual_seed(1)  # the port draws its own noise: draw the same
        inputs["noise"] = torch.randn(batch, CONFIG.action_horizon, CONFIG.action_dim)
        torch.manual_seed(1)
        outputs = {"features": features, "actions": head.get_action(backbone_output(), actions)["action_pred"]}
        head.sample_time = lambda n, device, dtype: inputs["t"]
        torch.manual_seed(1)
        outputs["loss"] = head(backbone_output(), actions)["loss"]

    tensors = {k: v.contiguous() for k, v in port.state_dict().items() if not k.endswith("lm_head.weight")}  # tied
    tensors |= {f"inputs.{k}": v.contiguous() for k, v in inputs.items()}
    tensors |= {f"outputs.{k}": v.contiguous() for k, v in outputs.items()}
    file = Path(__file__).with_name("groot_n1d5.safetensors")
    save_file(tensors, file, metadata={"config": json.dumps(CONFIG.to_dict())})
    file.chmod(0o644)
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB, loss {outputs['loss']:.4f}")
    print({k: (tuple(v.shape), round(v.std(correction=0).item(), 3)) for k, v in outputs.items()})


if __name__ == "__main__":
    main()
