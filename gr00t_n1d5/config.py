"""config.json of GR00T N1.5: the sizes of a network, in NVIDIA's layout. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from gr00t_n1d5.files import read_json

_VISION, _TEXT = "eagle_cfg.vision_config.", "eagle_cfg.text_config."  # not backbone_cfg: those are NVIDIA's arguments
_HEAD, _DIT, _VL = "action_head_cfg.", "action_head_cfg.diffusion_model_cfg.", "action_head_cfg.vl_self_attention_cfg."
_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
)


def _at(path: str, default):
    """A field and its place in config.json."""
    return field(default=default, metadata={"path": path})


@dataclass
class Gr00tConfig:
    """Sizes and constants. The defaults are nvidia/GR00T-N1.5-3B."""

    # vision: SigLIP2-So400m
    image_size: int = _at(_VISION + "image_size", 224)
    patch_size: int = _at(_VISION + "patch_size", 14)
    vision_hidden_size: int = _at(_VISION + "hidden_size", 1152)
    vision_intermediate_size: int = _at(_VISION + "intermediate_size", 4304)
    vision_layers: int = _at(_VISION + "num_hidden_layers", 27)
    vision_heads: int = _at(_VISION + "num_attention_heads", 16)
    # language: the first 12 of Qwen3-1.7B's 28 layers
    text_hidden_size: int = _at("hidden_size", 2048)
    text_intermediate_size: int = _at(_TEXT + "intermediate_size", 6144)
    text_layers: int = _at("backbone_cfg.select_layer", 12)
    text_heads: int = _at(_TEXT + "num_attention_heads", 16)
    text_kv_heads: int = _at(_TEXT + "num_key_value_heads", 8)
    text_head_dim: int = _at(_TEXT + "head_dim", 128)
    vocab_size: int = _at(_TEXT + "vocab_size", 151680)
    rope_theta: float = _at(_TEXT + "rope_theta", 1e6)
    max_position_embeddings: int = _at(_TEXT + "max_position_embeddings", 40960)
    initializer_range: float = _at(_TEXT + "initializer_range", 0.02)
    image_token_id: int = _at("eagle_cfg.image_token_index", 151669)
    # action head
    hidden_size: int = _at(_HEAD + "hidden_size", 1024)
    dit_layers: int = _at(_DIT + "num_layers", 16)
    dit_heads: int = _at(_DIT + "num_attention_heads", 32)
    dit_head_dim: int = _at(_DIT + "attention_head_dim", 48)
    vl_layers: int = _at(_VL + "num_layers", 4)
    vl_heads: int = _at(_VL + "num_attention_heads", 32)
    vl_head_dim: int = _at(_VL + "attention_head_dim", 64)
    num_target_vision_tokens: int = _at(_HEAD + "num_target_vision_tokens", 32)
    max_seq_len: int = _at(_HEAD + "max_seq_len", 1024)
    num_embodiments: int = _at(_HEAD + "max_num_embodiments", 32)
    action_dim: int = _at("action_dim", 32)
    state_dim: int = _at(_HEAD + "max_state_dim", 64)
    action_horizon: int = _at("action_horizon", 16)
    num_inference_timesteps: int = _at(_HEAD + "num_inference_timesteps", 4)
    num_timestep_buckets: int = _at(_HEAD + "num_timestep_buckets", 1000)
    noise_beta_alpha: float = _at(_HEAD + "noise_beta_alpha", 1.5)
    noise_beta_beta: float = _at(_HEAD + "noise_beta_beta", 1.0)
    noise_s: float = _at(_HEAD + "noise_s", 0.999)
    fan_in_init: bool = _at("init_cfg.fan_in_init", False)  # larger weights: a tiny network from scratch needs them
    # inputs
    image_crop: float = _at("input_cfg.image_crop", 0.95)
    prompt_template: str = _at("input_cfg.prompt_template", _PROMPT)
    image_template: str = _at("input_cfg.image_template", "<image {view}><img>{tokens}</img>")  # one per view
    image_token: str = _at("input_cfg.image_token", "<IMG_CONTEXT>")
    max_text_tokens: int = _at("input_cfg.max_text_tokens", 128)  # of a prompt, beside its views' image tokens

    @property
    def tokens_per_view(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def dit_dim(self) -> int:
        return self.dit_heads * self.dit_head_dim

    @classmethod
    def tiny(cls, **overrides) -> "Gr00tConfig":
        """About 1M parameters: the same code for a 64 x 64 camera, a handful of words and a CPU.

        The text stands before the image tokens: under a causal mask the image features then depend on the instruction.
        """
        tiny = dict(
            image_size=64, patch_size=16,
            vision_hidden_size=64, vision_intermediate_size=128, vision_layers=2, vision_heads=4,
            text_hidden_size=96, text_intermediate_size=192, text_layers=2,
            text_heads=4, text_kv_heads=2, text_head_dim=24,
            vocab_size=32, max_position_embeddings=256, initializer_range=0.1, image_token_id=1,
            hidden_size=96, dit_layers=4, dit_heads=4, dit_head_dim=24, vl_layers=1, vl_heads=4, vl_head_dim=24,
            num_target_vision_tokens=2, max_seq_len=64, num_embodiments=1, action_dim=4, state_dim=8, action_horizon=8,
            fan_in_init=True, image_crop=1.0, prompt_template="{instruction}{images}", image_template="{tokens}",
            max_text_tokens=16,
        )  # fmt: skip
        return cls(**{**tiny, **overrides})

    def to_dict(self) -> dict:
        """NVIDIA's config.json. What the public file leaves to code or to Eagle's own config stands in extra keys."""
        out: dict = {"model_type": "gr00t_n1_5", "architectures": ["GR00T_N1_5"]}
        for path, value in {**_WRITTEN_ONLY, **self._implied()}.items():
            _put(out, path, value)
        for f in fields(self):
            _put(out, f.metadata["path"], getattr(self, f.name))
        return out

    @classmethod
    def from_dict(cls, config: Mapping) -> "Gr00tConfig":
        """Reads `to_dict`'s layout or NVIDIA's public file (absent sizes are full size, unknown keys are ignored).

        Raises ValueError where the file asks for a variant that this network does not build.
        """
        if config.get("model_type") != "gr00t_n1_5":
            raise ValueError(f"model_type is {config.get('model_type')!r}, not 'gr00t_n1_5'")
        values = {f.name: _get(config, f.metadata["path"]) for f in fields(cls)}
        self = cls(**{name: value for name, value in values.items() if value is not None})
        for path, value in self._implied().items():
            if _get(config, path) not in (None, value):
                raise ValueError(f"{path} is {_get(config, path)!r}; only {value!r} is supported here")
        return self

    @classmethod
    def read(cls, folder: Path) -> "Gr00tConfig":
        """The config.json of a checkpoint's folder; FileNotFoundError, or ValueError for what is not GR00T N1.5."""
        content = read_json(folder / "config.json")
        try:
            return cls.from_dict(content)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'}: not a GR00T N1.5 config ({error})") from error

    def _implied(self) -> dict:
        """What config.json says besides the fields: a size a second time, or the variant that this file builds."""
        return {
            _HEAD + "action_dim": self.action_dim,
            _HEAD + "action_horizon": self.action_horizon,
            _HEAD + "backbone_embedding_dim": self.text_hidden_size,
            _HEAD + "input_embedding_dim": self.dit_dim,
            _HEAD + "add_pos_embed": True,
            _HEAD + "use_vlln": True,
            _DIT + "cross_attention_dim": self.text_hidden_size,
            _DIT + "output_dim": self.hidden_size,
            _DIT + "interleave_self_attention": True,
            _DIT + "norm_type": "ada_norm",
            _DIT + "positional_embeddings": None,
            _VL + "positional_embeddings": None,
            "backbone_cfg.project_to_dim": None,
            "backbone_cfg.reproject_vision": False,
        }


# For NVIDIA's loader, whose own defaults differ. This file has no dropout anywhere: a policy gradient compares
# log-probabilities of one network at two moments, and a random mask in between would turn their ratio into noise.
_WRITTEN_ONLY = {
    _HEAD + "max_action_dim": 32,  # nothing reads it: fine-tunes with another action_dim leave it as it was
    "backbone_cfg.eagle_path": "NVEagle/eagle_er-qwen3_1_7B-Siglip2_400M_stage1_5_128gpu_er_v7_1mlp_nops",
    "backbone_cfg.load_bf16": False,
    "backbone_cfg.tune_llm": False,
    "backbone_cfg.tune_visual": True,
    "backbone_cfg.use_flash_attention": True,
    _DIT + "dropout": 0.2,
    _DIT + "final_dropout": True,
    _VL + "dropout": 0.2,
    _VL + "final_dropout": True,
}


def _put(tree: dict, path: str, value) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


def _get(tree: Mapping, path: str):
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
