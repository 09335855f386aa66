"""Whether lerobot 0.4.4's port of GR00T N1.5 reads what `save_pretrained` writes, and acts the same.

Two environments take turns: the project's writes a checkpoint and what it does with it, the port's (that of
`make_groot_golden.py`) loads the checkpoint with its own `GR00TN15.from_pretrained` and compares. From the repository
root:

    python tests/golden/read_with_lerobot.py write runs/exchange [--checkpoint checkpoints/tiny]
    golden-venv/bin/python tests/golden/read_with_lerobot.py read runs/exchange

Without --checkpoint a small network with random weights is written in shards, sliced to one of its four embodiments.
The port's code runs as it is, with two exceptions: Eagle's config, which the port takes from the hub at full size, is
written with the network's sizes, and attention is eager, because FlashAttention needs a GPU.
"""

import argparse
import json
import os
import sys
import tempfile
import types
from importlib.metadata import distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
TOLERANCE = 1e-5


def write(folder: Path, checkpoint: str | None) -> None:
    import torch
    from safetensors.torch import save_file

    from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5

    torch.manual_seed(0)
    batch, views = 3, 2
    if checkpoint:
        model = Gr00tN1d5.from_pretrained(checkpoint, torch.float32)
        row = 0
    else:
        model = Gr00tN1d5(Gr00tConfig.tiny(num_embodiments=4)).eval()
        row = 2
        model.slice_embodiment(row)
        for p in model.parameters():  # the initial weights hold zeros and ones
            p.data += 0.1 * torch.randn(p.shape)
    config = model.config
    image = torch.full((batch, config.tokens_per_view), config.image_token_id)
    words = [i for i in range(min(config.vocab_size, 1000)) if i != config.image_token_id]
    text = torch.tensor(words)[torch.randint(len(words), (batch, 7))]
    inputs = {
        "input_ids": torch.cat([text[:, :3], image, text[:, 3:4], image, text[:, 4:]], 1),
        "pixel_values": torch.rand(batch * views, 3, config.image_size, config.image_size) * 2 - 1,
        "state": torch.randn(batch, 1, config.state_dim),
    }
    torch.manual_seed(1)  # the port draws its own noise: it will draw the same
    noise = torch.randn(batch, config.action_horizon, config.action_dim)
    actions = model.get_action(**inputs, embodiment_id=torch.zeros(batch, dtype=torch.long), noise=noise)
    model.save_pretrained(folder / "checkpoint", max_shard_bytes=5_000_000_000 if checkpoint else 1_000_000)
    inputs["embodiment_id"] = torch.full((batch,), row)
    save_file({**inputs, "actions": actions.contiguous()}, folder / "expected.safetensors")
    print(f"{folder}: {sum(p.numel() for p in model.parameters())} parameters, actions of std {actions.std():.3f}")


def write_eagle_config(folder: Path, config) -> None:
    """The port's Eagle files with the network's sizes, where the port looks for its download."""
    folder.mkdir(parents=True)
    written = config.to_dict()["eagle_cfg"]
    vision = {"model_type": "siglip_vision_model", **written["vision_config"]}
    text = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
    text |= {"hidden_size": config.text_hidden_size, "num_hidden_layers": config.text_layers + 1, **written["text_config"]}
    eagle = {
        "model_type": "eagle_2_5_vl",
        "auto_map": {
            "AutoConfig": "configuration_eagle2_5_vl.Eagle25VLConfig",
            "AutoModel": "modeling_eagle2_5_vl.Eagle25VLForConditionalGeneration",
        },
        "vision_config": vision, "text_config": text, "select_layer": -1, "use_pixel_shuffle": False,
        "mlp_connector_layers": 1, "image_token_index": config.image_token_id,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(eagle))
    for name in "vocab added_tokens chat_template special_tokens_map generation_config preprocessor_config".split():
        (folder / f"{name}.json").write_text("{}")
    for name in ("merges.txt", "processor_config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")


def read(folder: Path) -> None:
    home = Path(tempfile.mkdtemp())
    os.environ.update(HF_HOME=str(home), HF_LEROBOT_HOME=str(home), HF_HUB_OFFLINE="1")
    import torch
    from safetensors.torch import load_file
    from transformers import PreTrainedModel

    from gr00t_n1d5.network import Gr00tConfig

    root = Path(distribution("lerobot").locate_file("lerobot"))
    for name in ("policies", "policies.groot"):  # whose package files import every policy
        package = types.ModuleType(f"lerobot.{name}")
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[package.__name__] = package
    from lerobot.policies.groot.groot_n1 import DEFAULT_TOKENIZER_ASSETS_REPO, GR00TN15

    PreTrainedModel._check_and_adjust_attn_implementation = lambda *args, **kwargs: "eager"
    config = Gr00tConfig.from_dict(json.loads((folder / "checkpoint" / "config.json").read_text()))
    write_eagle_config(home / DEFAULT_TOKENIZER_ASSETS_REPO, config)
    port = GR00TN15.from_pretrained(str((folder / "checkpoint").absolute())).eval()

    expected = load_file(folder / "expected.safetensors")
    ids = expected["input_ids"]
    inputs = {
        "eagle_input_ids": ids, "eagle_pixel_values": expected["pixel_values"], "eagle_attention_mask": torch.ones_like(ids),
        "eagle_image_sizes": torch.zeros(len(ids), 2), "state": expected["state"], "embodiment_id": expected["embodiment_id"],
    }  # fmt: skip
    torch.manual_seed(1)
    actions = port.get_action(inputs)["action_pred"]
    error = (actions - expected["actions"]).abs().max().item()
    written = {}
    for file in (folder / "checkpoint").glob("*.safetensors"):
        written |= load_file(file)
    held = {key: x for key, x in port.state_dict().items() if ".vision_model.head." not in key}  # unused, not written
    del held["backbone.eagle_model.language_model.lm_head.weight"]  # nor is this, the embedding once more
    differing = [key for key in held.keys() | written.keys() if key not in held or key not in written]
    differing += [key for key in held.keys() & written.keys() if not torch.equal(held[key], written[key])]
    print(f"{len(held)} tensors in the port, {len(written)} in the files, missing or different: {sorted(differing)}")
    print(f"largest difference of actions {error:.1e} (their std is {expected['actions'].std():.3f})")
    if not error < TOLERANCE or differing:
        sys.exit("the port does not read the checkpoint as it was meant")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", help="folder to copy instead of a random network")
    args = parser.parse_args()
    if args.command == "write":
        args.folder.mkdir(parents=True, exist_ok=True)
        write(args.folder, args.checkpoint)
    else:
        read(args.folder)
