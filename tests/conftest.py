"""Fixtures that several test files share."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores; sums do not depend on the number of cores

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import assets

# Isaac Lab reads this once, when any test of a process imports it first
os.environ["ISAACSIM_ASSET_ROOT"] = str(assets.mirror())

# whole files go to the workers, in this order: the longest ones first, so that the workers end together
LONGEST = (
    "runs ppo_gr00t_runs ppo_runs ppo_rgb gr00t_tasks assets ppo_lora gpu_paths scripts sft export sim_to_sim tabletop".split()
)


def pytest_collection_modifyitems(items):
    if os.environ.get("CI") != "true":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="runs with CI=true"))
    rank = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def write_checkpoint():
    """A function that writes a tiny GR00T with random weights for the embedded task's instructions."""
    import torch

    from gr00t_n1d5 import Gr00tConfig, Gr00tN1d5, Gr00tProcessor, tiny_tokenizer
    from tasks.gr00t import TASKS

    task = TASKS["Tabletop-Lift-Cube-v0"]

    def write(folder: Path, state: dict[str, int] | None = None, action: dict[str, int] | None = None) -> Path:
        """Two of the network's six action dimensions are padding, unless `action` has more than four."""
        config = Gr00tConfig.tiny(action_dim=6)
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Gr00tN1d5(config).eval()
        processor = Gr00tProcessor.from_statistics(
            config,
            "new_embodiment",
            {key: torch.randn(100, n, generator=generator) for key, n in (state or task.state).items()},
            {key: torch.randn(100, n, generator=generator) for key, n in (action or task.action).items()},
            {"cam": {"resolution": [64, 64], "channels": 3, "fps": 25}},
            tiny_tokenizer(["lift", "the", "red", "blue", "cube"], config),
        )
        net.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint that fits the embedded task."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
