"""A deployment has numpy, pillow, tokenizers and one engine library: no torch, no exporter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_engine import write_engine

ABSENT = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "ml_dtypes", "huggingface_hub")

PROGRAM = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from engines import load_engine
from engines.runtime.engine import Sampling
engine = load_engine({directory!r})
import numpy as np
answer = engine.generate(np.zeros((200, 300, 3), np.uint8), "USER: <image>\\nWhat is this? ASSISTANT:", Sampling(4))
print(json.dumps({{"tokens": answer.token_ids, "kept": len(answer.kept[0][0])}}))
"""


def test_an_answer_needs_neither_torch_nor_the_exporter(tmp_path: Path) -> None:
    tiny = write_engine(tmp_path / "engine", precision="fp16", random=True)
    command = [sys.executable, "-c", PROGRAM.format(absent=set(ABSENT), directory=str(tiny.directory))]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert len(answer["tokens"][0]) == 4
    assert answer["kept"] == 16
