"""benchmarks/gpu.py: its steps are commands that exist, and what it makes of their ends; parcels.py."""

import importlib
import json
import shlex
import tarfile

import pytest
import tyro

from benchmarks import gpu, parcels
from benchmarks.gpu import Args, Step, climb, steps


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_step_is_a_command(device):
    """Flags are parsed as the programs parse them; names are unique, as results are looked up by them."""
    found = steps(device)
    assert {step.rung for step in found} == set(range(1, 7)) and len({step.name for step in found}) == len(found)
    for step in found:
        program, *flags = shlex.split(step.command)
        if program != "-m":
            tyro.cli(importlib.import_module(program.removesuffix(".py").replace("/", ".")).Args, args=flags)


def test_climbing(monkeypatch, tmp_path, capsys):
    """Results are kept as they come; what has succeeded is not repeated, what has failed is."""
    monkeypatch.setattr(gpu, "LIMIT", 1)
    fine = Step(1, "fine", """-c 'print("{\\"figure\\": 1.5}")'""")
    chosen = [fine, Step(1, "bad", "-c 'raise SystemExit(\"no\")'"), Step(2, "slow", "-c 'import time; time.sleep(60)'")]
    monkeypatch.setattr(gpu, "steps", lambda device: [*chosen, Step(2, "simulator", "-c 1", isaaclab=True)])
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        climb(Args(device="cpu", out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["fine", "bad", "slow", "simulator", "bad", "slow", "simulator"]
    results = [row["result"] for row in rows]
    assert results[:4] == ["ok", "failed: no", "longer than 1 s", "isaaclab is not installed"]
    assert rows[0]["figures"] == {"figure": 1.5} and "| 1 | fine | cpu | ok |" in (tmp_path / "table.md").read_text()
    chatty = Step(4, "chatty", "-c 'for i in range(3000): print(i)'", isaaclab=True)
    with monkeypatch.context() as patched:  # a line of every world's every step
        patched.setattr(gpu.importlib.util, "find_spec", lambda name: True)
        patched.setattr(gpu, "steps", lambda device: [chatty])
        climb(Args(device="cpu", out=tmp_path / "chatty"))
    assert json.loads((tmp_path / "chatty" / "results.jsonl").read_text())["result"] == "failed: 3000 lines printed"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # what a try that was cut off has left is taken away
    (tmp_path / "runs" / "gpu_x").mkdir(parents=True)
    make = """-c 'import pathlib; pathlib.Path("runs/gpu_x").mkdir(parents=True)' --exp-name gpu_x"""
    monkeypatch.setattr(gpu, "steps", lambda device: [Step(3, "again", make)])
    climb(Args(device="cpu", out=tmp_path / "other"))
    assert json.loads((tmp_path / "other" / "results.jsonl").read_text())["result"] == "ok"
    monkeypatch.setattr(gpu, "steps", lambda device: chosen)
    climb(Args(device="cpu", out=tmp_path, rung=1, minutes=0.5))  # nothing is begun that could not end
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 7 and "bad: failed" in capsys.readouterr().out


def test_parcels(tmp_path, capsys):
    """Pieces are put together again, and what is there already is not installed."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.11.0-py3-none-any.whl").write_bytes(b"x" * 5000)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "wheels", "wheels")
    content, folder = (tmp_path / "all.tar").read_bytes(), tmp_path / "parcels"
    folder.mkdir()
    with pytest.raises(SystemExit, match="^--folder .*: has no parcels; 0, 1, ... are needed$"):
        parcels.join(folder)
    for i in range(12):  # 10 comes after 9
        (folder / str(i)).write_bytes(content[i * len(content) // 12 : (i + 1) * len(content) // 12])
    parcels.join(folder)
    assert capsys.readouterr().out.startswith("0 of 1 installed")
    (folder / "0").write_bytes(b"")
    with pytest.raises(SystemExit, match="^--folder .*: a parcel is missing or damaged; bring all of them again$"):
        parcels.join(folder)
    (folder / "3").unlink()
    with pytest.raises(SystemExit, match="^--folder .*: has 0, 1, 2, 4, .*are needed$"):
        parcels.join(folder)
