"""Between raw numbers and the network: prompt, images, normalisation, and the files that describe them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import Qwen2TokenizerFast

from gr00t_n1d5.files import read_json, resolve_folder
from gr00t_n1d5.network import Gr00tConfig

# Rows of the category-specific layers. (RLinf puts its "new_embodiment" at 10, not at 31.)
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
EAGLE_PROCESSOR = "lerobot/eagle2hg-processor-groot-n1p5"  # the tokenizer files, which no N1.5 checkpoint carries
DEFAULT_INSTRUCTION = "Perform the default behavior."  # NVIDIA's, where a sample has none


STATISTICS = ("max", "min", "mean", "std", "q01", "q99")


class Normalizer:
    """Normalises the last dimension of (..., d) tensors by key and mode, after Isaac-GR00T's transform/state_action.py.

    | mode     | forward                              | degenerate range | inverse                     |
    |----------|--------------------------------------|------------------|-----------------------------|
    | min_max  | 2 (x - min) / (max - min) - 1        | 0                | (y + 1)/2 (max - min) + min |
    | q99      | the same with q01, q99, then clipped | x, then clipped  | the same with q01, q99      |
    | mean_std | (x - mean) / std                     | x                | y std + mean                |
    | binary   | x > 0.5                              |                  | y > 0.5                     |
    """

    def __init__(self, statistics: Mapping[str, Mapping[str, Sequence[float]]], modes: Mapping[str, str]):
        columns: dict[str, list[Tensor]] = {}
        for key, values in statistics.items():
            mode = modes.get(key, "min_max")
            if mode not in ("min_max", "q99", "mean_std", "binary"):
                raise ValueError(f"normalisation mode {mode!r} of {key!r} is not one of min_max, q99, mean_std, binary")
            stat = {name: torch.tensor(values[name], dtype=torch.float32).flatten() for name in STATISTICS}
            low, high = (stat["q01"], stat["q99"]) if mode == "q99" else (stat["min"], stat["max"])
            symmetric = mode in ("min_max", "q99")
            for name, value in {
                "shift": stat["mean"] if mode == "mean_std" else low,
                "range": stat["std"] if mode == "mean_std" else high - low,
                "gain": 2.0 if symmetric else 1.0,
                "bias": -1.0 if symmetric else 0.0,
                "keep": 0.0 if mode == "min_max" else 1.0,  # what is left of x where the range is 0
                "clip": float(mode == "q99"),
                "binary": float(mode == "binary"),
            }.items():
                columns.setdefault(name, []).append(torch.zeros_like(low) + value)
        self.columns = {name: torch.cat(values) for name, values in columns.items()}  # (d,) each

    def __len__(self) -> int:
        return len(self.columns["shift"])

    def _columns(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[-1] != len(self):
            raise ValueError(f"{x.shape[-1]} dimensions, the statistics have {len(self)}")
        return self.columns

    def to(self, device: str | torch.device) -> "Normalizer":
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        return self

    def forward(self, x: Tensor) -> Tensor:
        c, x = self._columns(x), x.float()
        degenerate = c["range"] == 0
        y = c["gain"] * (x - c["shift"]) / torch.where(degenerate, 1.0, c["range"]) + c["bias"]
        y = torch.where(degenerate, c["keep"] * x, y)
        y = torch.where(c["clip"] > 0, y.clamp(-1, 1), y)
        return torch.where(c["binary"] > 0, (x > 0.5).float(), y)

    def inverse(self, y: Tensor) -> Tensor:
        c, y = self._columns(y), y.float()
        x = (y - c["bias"]) / c["gain"] * c["range"] + c["shift"]
        return torch.where(c["binary"] > 0, (y > 0.5).float(), x)


class Augmentation(NamedTuple):
    """How B samples' images are changed in training, one draw for all views of a sample. On the host."""

    crop: Tensor  # (B, 2) in [0, 1): where the crop lies between top and bottom, left and right
    factors: Tensor  # (B, 4) of brightness, contrast, saturation, and the shift of hue
    order: Tensor  # (B, 4) in which these four come

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> "Augmentation":
        """NVIDIA's RandomCrop and ColorJitter(0.3, 0.4, 0.5, 0.08), for n samples; the generator is a CPU one."""
        uniform = torch.rand(n, 10, generator=generator)
        center, width = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.3, 0.4, 0.5, 0.08]])
        return cls(uniform[:, :2], center + width * (2 * uniform[:, 2:6] - 1), uniform[:, 6:].argsort(1))


class Gr00tProcessor:
    """Between raw numbers and the network: prompt, images, normalisation, and the files that describe them.

    `metadata` is NVIDIA's experiment_cfg/metadata.json, `tag` the entry in use; keys are concatenated in its order.
    NVIDIA's file does not name the normalisation modes (its data configs do): `modes` gives them by "state.key" or
    "action.key", absent ones are min_max, and other ones are kept in the file under "normalization_modes".
    """

    def __init__(
        self,
        config: Gr00tConfig,
        tokenizer: Tokenizer,
        metadata: dict,
        tag: str,
        modes: Mapping[str, str] | None = None,
    ):
        self.config, self.tokenizer, self.metadata, self.tag = config, tokenizer, metadata, tag
        found, wanted = tokenizer.token_to_id(config.image_token), config.image_token_id
        if found != wanted:
            raise ValueError(f"the tokenizer has {config.image_token} at {found}, the config at {wanted}")
        try:
            statistics = {m: metadata[tag]["statistics"][m] for m in ("state", "action")}
            self.modes = dict(modes if modes is not None else metadata[tag].get("normalization_modes", {}))
            unknown = set(self.modes) - {f"{m}.{key}" for m in statistics for key in statistics[m]}
            if unknown:
                raise ValueError(f"normalisation modes for unknown keys: {', '.join(sorted(unknown))}")
            for modality, keys in statistics.items():
                for key, values in keys.items():
                    absent = [name for name in STATISTICS if name not in values]
                    if absent:
                        raise ValueError(f"{tag}: statistics of {modality}.{key} lack {', '.join(absent)}")
                    sizes = {name: np.size(values[name]) for name in STATISTICS}
                    if len(set(sizes.values())) > 1:
                        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
                        raise ValueError(f"{tag}: statistics of {modality}.{key} differ in dimensions ({listed})")
            self.normalizers = {
                m: Normalizer(keys, {k: self.modes[f"{m}.{k}"] for k in keys if f"{m}.{k}" in self.modes})
                for m, keys in statistics.items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{tag}: incomplete metadata ({error!r})") from error
        for modality, limit in (("state", config.state_dim), ("action", config.action_dim)):
            found = len(self.normalizers[modality])
            if found > limit:
                raise ValueError(f"{tag}: {found} {modality} dimensions, the network has {limit}")

    # files
    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: Gr00tConfig,
        embodiment_tag: str | None = None,
        modes: Mapping[str, str] | None = None,
        tokenizer: Tokenizer | None = None,
        local_files_only: bool = False,
    ) -> "Gr00tProcessor":
        """Reads experiment_cfg/metadata.json and the tokenizer of a checkpoint (folder or hub id).

        The tag may be None where the file has exactly one. Without tokenizer files the hub's Eagle processor is used.
        Raises FileNotFoundError for absent files, ValueError for an unknown tag or unusable content.
        """
        folder = resolve_folder(folder, local_files_only)
        file = folder / "experiment_cfg" / "metadata.json"
        metadata = read_json(file)
        if embodiment_tag is None and len(metadata) == 1:
            embodiment_tag = next(iter(metadata))
        if embodiment_tag not in metadata:
            raise ValueError(f"{file}: embodiment tag {embodiment_tag!r} is not one of {', '.join(sorted(metadata))}")
        tokenizer = tokenizer or load_tokenizer(folder, local_files_only)
        try:
            return cls(config, tokenizer, metadata, embodiment_tag, modes)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes experiment_cfg/metadata.json and tokenizer.json; other tags' entries are kept as they were read."""
        folder = Path(folder)
        entry = {key: value for key, value in self.metadata[self.tag].items() if key != "normalization_modes"}
        if self.modes:
            entry["normalization_modes"] = self.modes
        texts = {
            folder / "experiment_cfg" / "metadata.json": json.dumps({**self.metadata, self.tag: entry}, indent=2),
            folder / "tokenizer.json": self.tokenizer.to_str(pretty=False),
        }
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_name(f".{file.name}.writing-{os.getpid()}")
            scratch.write_text(text)
            os.replace(scratch, file)

    @classmethod
    def from_statistics(
        cls,
        config: Gr00tConfig,
        tag: str,
        state: Mapping[str, Tensor],
        action: Mapping[str, Tensor],
        video: Mapping[str, Mapping],
        tokenizer: Tokenizer,
        modes: Mapping[str, str] | None = None,
    ) -> "Gr00tProcessor":
        """Statistics of data {key: (N, d)}; video {key: {"resolution": [W, H], "channels", "fps"}} goes along."""
        statistics: dict = {"state": {}, "action": {}}
        modalities: dict = {"video": {key: dict(value) for key, value in video.items()}, "state": {}, "action": {}}
        for modality, data in (("state", state), ("action", action)):
            for key, values in data.items():
                x = values.detach().double().cpu().numpy()  # numpy: torch.quantile stops at 16M elements
                q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
                found = {"max": x.max(0), "min": x.min(0), "mean": x.mean(0), "std": x.std(0), "q01": q01, "q99": q99}
                statistics[modality][key] = {name: value.tolist() for name, value in found.items()}
                described = {"absolute": True, "rotation_type": None, "shape": [x.shape[1]], "continuous": True}
                modalities[modality][key] = described
        metadata = {tag: {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}}
        return cls(config, tokenizer, metadata, tag, modes)

    def to(self, device: str | torch.device) -> "Gr00tProcessor":
        """Moves the statistics, in place."""
        for normalizer in self.normalizers.values():
            normalizer.to(device)
        return self

    @property
    def embodiment_id(self) -> int:
        """The tag's row of the category-specific layers; 0 in a network with one row."""
        if self.config.num_embodiments == 1:
            return 0
        if self.tag not in EMBODIMENT_IDS:
            raise ValueError(f"embodiment tag {self.tag!r} has no id; known: {', '.join(EMBODIMENT_IDS)}")
        return EMBODIMENT_IDS[self.tag]

    @property
    def camera_size(self) -> int:
        """Height and width [px] of a camera whose images have the network's size once they are cropped."""
        return math.ceil(self.config.image_size / self.config.image_crop)

    # inputs
    def prompt(self, instruction: str, views: int = 1, bracketed: bool = False, pad_to: int | None = None) -> Tensor:
        """Token ids (L,) of an instruction and its camera views.

        Args:
            bracketed: "['sentence']". NVIDIA trains on the plain sentence and serves single observations so.
            pad_to: L, with zeros on the right; None: no padding. RLinf pads ids and mask so (its padding_value, 570 for
                the cube stacking checkpoint); its head attends to the padding, which changes the actions. A policy that
                continues from RLinf's weights needs these ids, and the unpadded lengths for `Backbone.forward`. Read
                off RLinf's code: ids, mask, a head without a mask. Inferred from transformers' code, not run: the
                features of the padding (`Backbone.padding_feature`). Not matched: instructions of different lengths in
                one batch, which RLinf's tokenizer first pads on the left.

        Raises ValueError for a word unknown to a word-level tokenizer and for more than max_prompt_tokens tokens, or
        more than pad_to.
        """
        config = self.config
        instruction = instruction if instruction.strip() else DEFAULT_INSTRUCTION
        text = f"['{instruction}']" if bracketed else instruction
        tokens = config.image_token * config.tokens_per_view
        images = "".join(config.image_template.format(view=view, tokens=tokens) for view in range(1, views + 1))
        text = config.prompt_template.replace("{images}", images).replace("{instruction}", text)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        unknown_id = self.tokenizer.token_to_id(getattr(self.tokenizer.model, "unk_token", None) or "<unk>")
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == unknown_id:
                raise ValueError(f"instruction {instruction!r}: the word {text[start:end]!r} is not in the vocabulary")
        if encoding.ids.count(config.image_token_id) != views * config.tokens_per_view:
            raise ValueError(f"instruction {instruction!r}: holds {config.image_token}, kept for image features")
        length, limit = len(encoding.ids), config.max_prompt_tokens
        if length > limit:
            raise ValueError(f"instruction {instruction!r}: {length} prompt tokens, at most {limit} are allowed")
        if pad_to is not None and length > pad_to:
            raise ValueError(f"instruction {instruction!r}: {length} prompt tokens cannot be padded to {pad_to}")
        return pad_prompts([torch.tensor(encoding.ids)], pad_to)[0][0]

    def images(self, images: Tensor, augmentation: Augmentation | None = None) -> Tensor:
        """Pixels (B*V, 3, S, S) in [-1, 1] from uint8 images (B, V, H, W, 3), on their device.

        NVIDIA's evaluation transform: centre crop, antialiased bilinear resize, truncation to uint8. Where neither crop
        nor resize is due the bytes are taken as they are. With an `augmentation`, NVIDIA's training transform: the crop
        is a random one, and colours are jittered after the resize.
        """
        if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, not uint8 (B, V, H, W, 3)")
        size, crop = self.config.image_size, self.config.image_crop
        x = images.permute(0, 1, 4, 2, 3)  # (B, V, 3, H, W)
        height, width = x.shape[-2:]
        if not x.shape[1]:  # no camera
            return x.new_empty(0, 3, size, size, dtype=torch.float32)
        h, w = int(crop * height), int(crop * width)
        if augmentation is not None:
            x = torch.stack([self._augmented(*sample) for sample in zip(x, *augmentation, strict=True)])
        elif (h, w) != (height, width) or (h, w) != (size, size):
            # torchvision's center_crop
            x = self._resized(x.flatten(0, 1), round((height - h) / 2), round((width - w) / 2), h, w)
            x = (x * 255).to(torch.uint8)  # truncates, as in the reference
        return x.reshape(-1, 3, size, size).float() / 127.5 - 1

    def _resized(self, x: Tensor, top: int, left: int, h: int, w: int) -> Tensor:
        """A crop of uint8 images (..., 3, H, W), in [0, 1], at the network's size."""
        size = self.config.image_size
        x = x[..., top : top + h, left : left + w].float() / 255
        if (h, w) != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return x

    def _augmented(self, x: Tensor, crop: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """One sample's views, uint8 (V, 3, H, W), as uint8 (V, 3, S, S)."""
        from torchvision.transforms.v2 import functional as jitter  # takes seconds, and only imitation needs it

        height, width = x.shape[-2:]
        h, w = int(self.config.image_crop * height), int(self.config.image_crop * width)
        top, left = (int(u * (free + 1)) for u, free in zip(crop.tolist(), (height - h, width - w)))
        x, values = self._resized(x, top, left, h, w), factors.tolist()
        adjust = (jitter.adjust_brightness, jitter.adjust_contrast, jitter.adjust_saturation, jitter.adjust_hue)
        for i in order.tolist():
            x = adjust[i](x, values[i])
        return (x * 255).to(torch.uint8)

    def normalize_state(self, state: Tensor) -> Tensor:
        """Raw state (B, d) -> (B, 1, state_dim), zero-padded on the right."""
        state = self.normalizers["state"].forward(state)
        return F.pad(state, (0, self.config.state_dim - state.shape[-1]))[:, None]

    def normalize_action(self, action: Tensor) -> Tensor:
        """Raw actions (B, H, d) -> (B, H, action_dim), zero-padded on the right."""
        action = self.normalizers["action"].forward(action)
        return F.pad(action, (0, self.config.action_dim - action.shape[-1]))

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """The network's actions (B, H, action_dim) -> raw actions (B, H, d), not clipped."""
        return self.normalizers["action"].inverse(action[..., : self.valid_action_dims])

    @property
    def valid_action_dims(self) -> int:
        """d: the leading action dimensions that are not padding."""
        return len(self.normalizers["action"])


def pad_prompts(prompts: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids (P, L), padded with zeros on the right to `length` or the longest, and the lengths (P,) before.

    Raises ValueError where a prompt is longer than `length`.
    """
    lengths = [len(prompt) for prompt in prompts]
    length = max(lengths) if length is None else length
    if max(lengths) > length:
        raise ValueError(f"a prompt of {max(lengths)} tokens cannot be padded to {length}")
    return torch.stack([F.pad(prompt, (0, length - len(prompt))) for prompt in prompts]), torch.tensor(lengths)


def load_tokenizer(path: str | Path, local_files_only: bool = False) -> Tokenizer:
    """tokenizer.json if there is one, else the Eagle processor's vocab.json and merges.txt, here or on the hub."""
    folder = resolve_folder(path, local_files_only)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        try:
            folder = resolve_folder(EAGLE_PROCESSOR, local_files_only)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder}: has no tokenizer, and the hub's cannot be had; where there is a network: hf download "
                f"{EAGLE_PROCESSOR} --local-dir <folder>, then copy its .json and .txt files, config.json excepted, here"
            ) from error
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Qwen2TokenizerFast.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"{folder}: unusable tokenizer files ({error})") from error


def tiny_tokenizer(words: Sequence[str], config: Gr00tConfig) -> Tokenizer:
    """One token per word, split at whitespace: for a network that knows only its task's words.

    Raises ValueError where the words do not fit the config's vocabulary.
    """
    vocabulary = {config.image_token: config.image_token_id}
    free = (i for i in range(config.vocab_size) if i != config.image_token_id)
    for word, token_id in zip(dict.fromkeys(["<unk>", *words]), free, strict=False):
        vocabulary[word] = token_id
    if not set(words) <= set(vocabulary):
        raise ValueError(f"{len(set(words))} words do not fit a vocabulary of {config.vocab_size}")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", config.image_token])
    return tokenizer
