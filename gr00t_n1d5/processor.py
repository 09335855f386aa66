"""Between raw numbers and the network: prompt, images, normalisation, and the files that describe them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import Qwen2TokenizerFast

from gr00t_n1d5.config import Gr00tConfig
from gr00t_n1d5.embodiment import KINDS, STATISTICS, DataConfig, Embodiment, read_embodiment
from gr00t_n1d5.files import resolve_folder

EAGLE_PROCESSOR = "lerobot/eagle2hg-processor-groot-n1p5"  # the tokenizer files, which no N1.5 checkpoint carries
DEFAULT_INSTRUCTION = "Perform the default behavior."  # NVIDIA's, where a request has none


class Encoder:
    """Between a robot's numbers (..., d) and the network's (..., e), key by key: after Isaac-GR00T's state_action.py.

    | encoding    | forward                                       | degenerate range | inverse                     |
    |-------------|-----------------------------------------------|------------------|-----------------------------|
    | min_max     | 2 (x - min) / (max - min) - 1                 | 0                | (y + 1)/2 (max - min) + min |
    | q99         | the same with q01, q99, then clipped          | x, then clipped  | the same with q01, q99      |
    | mean_std    | (x - mean) / std                              | x                | y std + mean                |
    | binary      | x > 0.5                                       |                  | y > 0.5                     |
    | none        | x                                             |                  | y                           |
    | sin_cos     | sines of the key, then its cosines            |                  |                             |
    | rotation_6d | the rotation matrix's first two rows          |                  |                             |
    | axis_angle  | rotation vector                               |                  | the data's own kind         |

    After a rotation "+min_max" divides by the largest value there can be, 1 or pi.
    """

    def __init__(self, embodiment: Embodiment, kind: str):
        columns: dict[str, list[Tensor]] = {}
        self.parts = embodiment.parts(kind)
        for key, _, after, change, _, norm in self.parts:
            stat = embodiment.statistics(kind)[key]
            if change:
                bound = [math.pi if change == "axis_angle" else 1.0] * after
                stat = dict.fromkeys(STATISTICS, bound) | {"min": [-x for x in bound]}
            stat = {name: torch.tensor(stat[name], dtype=torch.float32).flatten() for name in STATISTICS}
            low, high = (stat["q01"], stat["q99"]) if norm == "q99" else (stat["min"], stat["max"])
            symmetric = norm in ("min_max", "q99")
            for name, value in {
                "shift": stat["mean"] if norm == "mean_std" else 0.0 if norm == "none" else low,
                "range": stat["std"] if norm == "mean_std" else 1.0 if norm == "none" else high - low,
                "gain": 2.0 if symmetric else 1.0,
                "bias": -1.0 if symmetric else 0.0,
                "keep": 0.0 if norm == "min_max" else 1.0,  # what is left of x where the range is 0
                "clip": float(norm == "q99"),
                "binary": float(norm == "binary"),
            }.items():
                columns.setdefault(name, []).append(torch.zeros_like(low) + value)
        self.columns = {name: torch.cat(values) for name, values in columns.items()}  # (e,) each
        self.before = sum(part.before for part in self.parts)
        self.plain = not any(part.change for part in self.parts)

    def __len__(self) -> int:
        """e, the network's dimensions."""
        return len(self.columns["shift"])

    def to(self, device: str | torch.device) -> "Encoder":
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.before:
            raise ValueError(f"{x.shape[-1]} dimensions, the statistics have {self.before}")
        c, x = self.columns, x.float()
        if not self.plain:
            pieces = zip(x.split([part.before for part in self.parts], -1), self.parts)
            x = torch.cat([convert(piece, part.change, part.rotation) for piece, part in pieces], -1)
        degenerate = c["range"] == 0
        y = c["gain"] * (x - c["shift"]) / torch.where(degenerate, 1.0, c["range"]) + c["bias"]
        y = torch.where(degenerate, c["keep"] * x, y)
        y = torch.where(c["clip"] > 0, y.clamp(-1, 1), y)
        return torch.where(c["binary"] > 0, (x > 0.5).float(), y)

    def inverse(self, y: Tensor) -> Tensor:
        if y.shape[-1] != len(self):
            raise ValueError(f"{y.shape[-1]} dimensions, the statistics have {len(self)}")
        c, y = self.columns, y.float()
        x = (y - c["bias"]) / c["gain"] * c["range"] + c["shift"]
        x = torch.where(c["binary"] > 0, (y > 0.5).float(), x)
        if self.plain:
            return x
        pieces = zip(x.split([part.after for part in self.parts], -1), self.parts)
        return torch.cat([convert(x, part.change and part.rotation, part.change) for x, part in pieces], -1)


def convert(x: Tensor, to: str, rotation: str | None) -> Tensor:
    """One key's columns (..., d) as sines and cosines, or from one kind of rotation to another; "" leaves them."""
    if to in ("", "sin_cos"):
        return torch.cat([x.sin(), x.cos()], -1) if to else x
    import roma  # few data sets have rotations

    if rotation == "quaternion":  # w first
        matrix = roma.unitquat_to_rotmat(roma.quat_wxyz_to_xyzw(F.normalize(x, dim=-1)))
    elif rotation == "axis_angle":
        matrix = roma.rotvec_to_rotmat(x)
    elif rotation == "rotation_6d":
        matrix = roma.special_gramschmidt(x.unflatten(-1, (2, 3)).mT).mT
    else:
        matrix = roma.euler_to_rotmat(rotation[-3:].translate(EULER_AXES), x)
    if to == "rotation_6d":
        return matrix[..., :2, :].flatten(-2)
    if to == "axis_angle":
        return roma.rotmat_to_rotvec(matrix)
    if to == "quaternion":
        return roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(matrix))
    return roma.rotmat_to_euler(to[-3:].translate(EULER_AXES), matrix)


EULER_AXES = str.maketrans("rpy", "XYZ")  # capitals: about the axes that were turned before


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

    `config` is the network's, with the data config's crop and horizon (`Embodiment.adapt`).
    """

    def __init__(self, config: Gr00tConfig, tokenizer: Tokenizer, embodiment: Embodiment):
        self.config, self.tokenizer, self.embodiment = embodiment.adapt(config), tokenizer, embodiment
        found, wanted = tokenizer.token_to_id(config.image_token), config.image_token_id
        if found != wanted:
            raise ValueError(f"the tokenizer has {config.image_token} at {found}, the config at {wanted}")
        self.encoders = {kind: Encoder(embodiment, kind) for kind in KINDS}
        # places, in what a task gives, of the network's views and state columns; in the network's actions, of the task's
        self.order: dict[str, Tensor | None] = dict.fromkeys(("video", *KINDS))  # None: the same order

    # files
    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: Gr00tConfig | None = None,
        embodiment_tag: str | None = None,
        data_config: str | None = None,
        row: Any = None,
        tokenizer: Tokenizer | None = None,
        local_files_only: bool = False,
    ) -> "Gr00tProcessor":
        """Reads experiment_cfg/metadata.json and the tokenizer of a checkpoint (folder or hub id): `read_embodiment`.

        Without tokenizer files the hub's Eagle processor is used. Raises FileNotFoundError for absent files, ValueError
        for unusable content, SystemExit for a tag or a data config that is missing or wrong.
        """
        folder = resolve_folder(folder, local_files_only, weights=False)
        embodiment = read_embodiment(folder, embodiment_tag, data_config, row)
        tokenizer = tokenizer or load_tokenizer(folder, local_files_only)
        try:
            return cls(config or Gr00tConfig.read(folder), tokenizer, embodiment)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes experiment_cfg/metadata.json and tokenizer.json; other tags' entries are kept as they were read."""
        folder = Path(folder)
        texts = {
            folder / "experiment_cfg" / "metadata.json": json.dumps(self.embodiment.to_dict(), indent=2),
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
        encodings: Mapping[str, str] | None = None,
        embodiment_id: int | None = None,
    ) -> "Gr00tProcessor":
        """Statistics of data {key: (N, d)}, all keys in this order.

        Args:
            video: {key: {"resolution": [W, H], "channels", "fps"}}, which goes along.
            encodings: by "state.key" or "action.key"; others are min_max.
            embodiment_id: row of the category-specific layers; None: that of the tag.
        """
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
        if unknown := set(encodings or {}) - {f"{m}.{key}" for m in KINDS for key in statistics[m]}:
            raise ValueError(f"encodings of unknown keys: {', '.join(sorted(unknown))}")
        metadata = {tag: {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}}
        chosen = {m: {key: (encodings or {}).get(f"{m}.{key}", "min_max") for key in statistics[m]} for m in KINDS}
        steps = tuple(range(config.action_horizon))
        data_config = DataConfig(tuple(video), **chosen, action_indices=steps, embodiment_id=embodiment_id)
        return cls(config, tokenizer, Embodiment(metadata, tag, data_config))

    def connect(self, modalities: Mapping[str, Any]) -> None:
        """From now on images, states and actions have a task's order, matched by name.

        Args:
            modalities: "video": keys; "state" and "action": {key: columns}; each in the task's order.

        Raises ValueError where keys or sizes differ.
        """
        if problem := self.embodiment.misfit(modalities):
            raise ValueError(problem)
        video = list(modalities["video"])
        self.order["video"] = _unless_same([video.index(key) for key in self.embodiment.data.video])
        for kind in KINDS:
            starts, start = {}, 0
            for key, size in modalities[kind].items():
                starts[key], start = start, start + size
            places = [starts[key] + i for key, size in self.embodiment.sizes[kind].items() for i in range(size)]
            self.order[kind] = _unless_same(places if kind == "state" else [places.index(i) for i in range(len(places))])

    def to(self, device: str | torch.device) -> "Gr00tProcessor":
        """Moves the statistics, in place."""
        for encoder in self.encoders.values():
            encoder.to(device)
        self.order = {name: places if places is None else places.to(device) for name, places in self.order.items()}
        return self

    @property
    def embodiment_id(self) -> int:
        """The tag's row of the category-specific layers; 0 in a network with one row."""
        return self.embodiment.id(self.config)

    @property
    def camera_size(self) -> int:
        """Height and width [px] of a camera whose images have the network's size once they are cropped."""
        return math.ceil(self.config.image_size / self.config.image_crop)

    # inputs
    def prompt(self, instruction: str, views: int = 1, bracketed: bool = False, pad_to: int | None = None) -> Tensor:
        """Token ids (L,) of an instruction and its camera views.

        Args:
            bracketed: "['sentence']", as NVIDIA serves single observations: how numpy prints it, so that a sentence with
                an apostrophe gets double quotation marks. NVIDIA trains on the plain sentence.
            pad_to: L, with zeros on the right; None: no padding. RLinf pads ids and mask so (its padding_value, 570 for
                the cube stacking checkpoint); its head attends to the padding, which changes the actions. A policy that
                continues from RLinf's weights needs these ids, and the unpadded lengths for `Backbone.forward`. Read
                off RLinf's code: ids, mask, a head without a mask. Inferred from transformers' code, not run: the
                features of the padding (`Backbone.padding_feature`). Not matched: instructions of different lengths in
                one batch, which RLinf's tokenizer first pads on the left.

        Raises ValueError for a word unknown to a word-level tokenizer and for more than max_text_tokens beside
        the images, or more than pad_to in all.
        """
        config = self.config
        text = str(np.array([instruction])) if bracketed else instruction
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
        length, limit = len(encoding.ids), config.max_text_tokens
        if (own := length - views * config.tokens_per_view) > limit:
            raise ValueError(f"instruction {instruction!r}: {own} tokens beside the images, at most {limit} are allowed")
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
        places = self.order["video"]
        x = (images if places is None else images[:, places]).permute(0, 1, 4, 2, 3)  # (B, V, 3, H, W)
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
        state = self.encoders["state"].forward(self._sorted("state", state))
        return F.pad(state, (0, self.config.state_dim - state.shape[-1]))[:, None]

    def normalize_action(self, action: Tensor) -> Tensor:
        """Raw actions (B, H, d) -> (B, H, action_dim), zero-padded on the right."""
        action = self.encoders["action"].forward(self._sorted("action", action))
        return F.pad(action, (0, self.config.action_dim - action.shape[-1]))

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """The network's actions (B, H, action_dim) -> raw actions (B, H, d), not clipped."""
        action, places = self.encoders["action"].inverse(action[..., : self.valid_action_dims]), self.order["action"]
        return action if places is None else action[..., places]

    def _sorted(self, kind: str, x: Tensor) -> Tensor:
        """A task's states or actions (..., d) in the network's order."""
        places = self.order[kind]
        return x if places is None else x[..., places if kind == "state" else places.argsort()]

    @property
    def valid_action_dims(self) -> int:
        """The leading action dimensions that are not padding."""
        return len(self.encoders["action"])

    def unusual(self, values: Tensor, kind: str = "state") -> str | None:
        """Names the keys whose values, of raw states or actions (B, d), lie far outside of what the checkpoint was trained on.

        Far: more than the width of the training data's range beside it, in the median of the rows. None where none do.
        """
        x, found, at = self._sorted(kind, values).float().median(0).values.cpu(), [], 0
        every_low, every_high = self._limits(kind)
        for key, size in self.embodiment.sizes[kind].items():
            value, low, high = (numbers[at : at + size] for numbers in (x, every_low, every_high))
            width = (high - low).clamp(min=1e-3)
            if ((value < low - width) | (value > high + width)).any():
                shown = [[round(v, 3) for v in t.tolist()] for t in (value, low, high)]
                found.append(f"{key} is {shown[0]}, trained on {shown[1]} to {shown[2]}")
            at += size
        return "; ".join(found) or None

    def outside(self, values: Tensor, kind: str = "state") -> float:
        """Share of the numbers in raw states or actions (B, d) that are beyond all of the checkpoint's training data."""
        x, (low, high) = self._sorted(kind, values).float().cpu(), self._limits(kind)
        return ((x < low) | (x > high)).float().mean().item()

    def _limits(self, kind: str) -> tuple[Tensor, Tensor]:
        """Smallest and largest number (d,) of each column in the training data, in the network's order."""
        of = [self.embodiment.statistics(kind)[key] for key in self.embodiment.sizes[kind]]
        low, high = (torch.cat([torch.tensor(stat[name]).float().flatten() for stat in of]) for name in ("min", "max"))
        return low, high


def _unless_same(places: list[int]) -> Tensor | None:
    return None if places == sorted(places) else torch.tensor(places)


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
        # said outright, or transformers takes the Eagle processor's folder for a Mistral tokenizer and warns
        return Qwen2TokenizerFast.from_pretrained(folder, fix_mistral_regex=False).backend_tokenizer
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
