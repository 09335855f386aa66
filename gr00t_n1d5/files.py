"""Checkpoint files in NVIDIA's layout: where they lie, what their keys are called, whether they fit. Needs no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor, nn

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
# what others save beside the network: buffers, an unused pooling head, the value head of RLinf's RL models
SPARE = ("backbone.vision_model.head.", "rotary_emb.inv_freq", "position_ids", "action_head.value_head.")
EMBED, LM_HEAD = "backbone.language_model.embed_tokens.weight", "backbone.language_model.lm_head.weight"


FUTURE = "action_head.future_tokens.weight"
NO_FUTURE = f"no {FUTURE}: checkpoints from before July 2025 belong to a network without it, fine-tune again from a later one"


def plain_name(key: str) -> str:
    """One spelling for all: ours, NVIDIA's, transformers 4's (vision_model twice) and 5's (once)."""
    key = key.replace("backbone.eagle_model.", "backbone.", 1)
    key = key.replace("backbone.vision_model.vision_model.", "backbone.vision_model.", 1)
    return key.replace("backbone.language_model.model.", "backbone.language_model.", 1)


def public_name(name: str) -> str:
    """NVIDIA's key for a parameter of ours."""
    name = plain_name(name).replace("backbone.", "backbone.eagle_model.", 1)
    name = name.replace("eagle_model.vision_model.", "eagle_model.vision_model.vision_model.", 1)
    return name.replace("eagle_model.language_model.", "eagle_model.language_model.model.", 1)


def find_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Path, str]]:
    """Where each parameter lies: (file, key). One ValueError lists what is missing or wrongly shaped."""
    files = [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        files = sorted({folder / name for name in read_index(folder).values()})
    found: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in files:
        with open_safetensors(file) as tensors:
            for key in tensors.keys():
                found[key], places[key] = tuple(tensors.get_slice(key).get_shape()), file
    keys = _match(f"{folder}: the weights do not fit the network of its config.json", shapes, found, warn=True)
    return {name: (places[key], key) for name, key in keys.items()}


def match_live(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The live model's key of each of our parameters."""
    shapes = {name: tuple(model._tables.get(name, p).shape) for name, p in model.named_parameters()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return _match("the live model does not fit the network", shapes, found)


def read_index(folder: Path) -> dict[str, str]:
    """The shard of each key; where there is an index, it tells what a checkpoint lacks before its shards are there."""
    try:
        index = dict(read_json(folder / INDEX)["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / INDEX}: not an index of safetensors shards ({error!r})") from error
    if FUTURE not in map(plain_name, index):
        raise ValueError(f"{folder}: {NO_FUTURE}")
    return index


def _match(
    problem: str, shapes: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], warn: bool = False
) -> dict[str, str]:
    """The public key of each of our parameters, given the shapes of both; with `warn`, a word about keys of no use."""
    keys = {plain_name(key): key for key in found}
    lm_head = keys.pop(LM_HEAD, None)
    if lm_head is not None:
        keys.setdefault(EMBED, lm_head)  # tied weights: some fine-tunes keep only this one
    own = {plain_name(name): name for name in shapes}
    unused = [keys[name] for name in keys if name not in own and not any(spare in name for spare in SPARE)]
    fitting = {own[name]: key for name, key in keys.items() if name in own}
    problems = {
        "adapters that are not merged": [key for key in unused if "lora_" in key] if warn else [],
        "missing": [public_name(name) for name in own if name not in keys],
        "wrong shape": [
            f"{key} {found[key]} instead of {shapes[name]}" for name, key in fitting.items() if found[key] != shapes[name]
        ],
    }
    if any(problems.values()):
        lines = [problem, *([NO_FUTURE] if FUTURE in problems["missing"] else [])]
        for kind, names in problems.items():
            if names:
                more = f", and {len(names) - 20} more" if len(names) > 20 else ""
                lines.append(f"{len(names)} {kind}: {', '.join(sorted(names)[:20])}{more}")
        raise ValueError("\n".join(lines))
    if unused and warn:
        more = f", and {len(unused) - 5} more" if len(unused) > 5 else ""
        log.warning(f"left out {len(unused)} tensors that this network has no place for: {', '.join(unused[:5])}{more}")
    return fitting


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such weight file (only safetensors are read)")
    from safetensors import SafetensorError, safe_open

    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from error
    with tensors as opened:
        yield opened


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; is this a GR00T N1.5 checkpoint folder?")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def local_folder(path: str | Path) -> Path | None:
    """A local folder, or None for what can be a hub id: owner/name. Raises FileNotFoundError for anything else."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in (".", "..", "runs"):
        raise FileNotFoundError(f"{path}: no such folder")
    return None


def resolve_folder(path: str | Path, local_files_only: bool = False, weights: bool = True) -> Path:
    """A local folder as it is; any other owner/name is taken for a hub id, and fetched, or all but its weights."""
    folder = local_folder(path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download  # slow to import

    try:
        patterns = ["*.json", "*.txt", *(["*.safetensors"] if weights else [])]  # never pickles
        return Path(snapshot_download(str(path), allow_patterns=patterns, local_files_only=local_files_only))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{path}: no such folder, and nothing from the Hugging Face hub ({reason}); "
            f"where there is a network: hf download {path} --local-dir <folder>, then name that folder here"
        ) from error


def is_full_size(checkpoint: str | Path) -> bool:
    """Whether --checkpoint has the full network (a hub id is taken to); refuses what is no checkpoint."""
    try:
        folder = local_folder(checkpoint)
        return folder is None or read_json(folder / "config.json")["action_head_cfg"]["hidden_size"] >= 512
    except FileNotFoundError as error:
        raise SystemExit(f"--checkpoint {error}") from error
    except (ValueError, KeyError, TypeError):
        return True  # refused in words where it is loaded
