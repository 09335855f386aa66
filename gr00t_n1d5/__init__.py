"""GR00T N1.5 without NVIDIA's `gr00t` package, whose old transformers and compiled flash-attn exclude Isaac Lab 3.0.

    network.py     the network
    processor.py   prompt, images, normalisation
    embodiment.py  data configs and metadata.json: what a checkpoint's numbers mean; needs no torch
    config.py      config.json: its sizes; needs no torch
    files.py       checkpoint files; needs no torch
    policy.py      a checkpoint, its prompts and a device: what the scripts build their actors on
    dataset.py     LeRobot data sets in NVIDIA's layout, read and written; needs no torch until it reads samples

Names are looked up when they are asked for, so that importing what needs no torch costs nothing.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for home in ("network", "processor", "embodiment", "policy"):
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
