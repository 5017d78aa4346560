"""Names to models: bundled, random, a directory, and the Hub reachable, refusing and silent."""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import recipe
from tokenizers import Tokenizer

from flowcut.aliases import ALIASES, ASSETS, resolve
from flowcut.anyres import choose_tiling, vision_feeds
from flowcut.checkpoint import expected_tensors
from flowcut.config import LlavaConfig
from flowcut.errors import CheckpointError, ConfigError
from flowcut.hub import complete

ROOT = Path(__file__).parents[2]
TINY = ASSETS / "llava-tiny"
# Known sizes: the tower of openai/clip-vit-large-patch14-336, Llama 2, and two projector layers.
TOWER, LLAMA_7B, LLAMA_13B = 303_507_456, 6_738_415_616, 13_015_864_320
NEXT = {"llava-v1.6-vicuna-7b": LLAMA_7B, "llava-v1.6-vicuna-13b": LLAMA_13B}
LLAMA = {"llava-1.5-7b": LLAMA_7B, "llava-1.5-13b": LLAMA_13B} | NEXT
STAND_IN = "stand-in tokenizer (no tokenizer.json in the checkpoint)"  # the recipe writes none


@pytest.mark.parametrize("alias", LLAMA)
def test_hub_alias_has_the_published_number_of_parameters(alias: str) -> None:
    config = LlavaConfig.from_file(ASSETS / alias / "config.json")
    d = config.text.hidden_size
    added_rows = 2 * (32064 - 32000) * d  # embedding and lm_head were extended
    projector = d * 1024 + d + d * d + d
    total = sum(math.prod(shape) for shape in expected_tensors(config).values())
    assert total == TOWER + LLAMA[alias] + added_rows + projector + d * (alias in NEXT)  # image_newline


def test_llava_7b_fills_the_bytes_its_hub_index_states() -> None:
    config = LlavaConfig.from_file(ASSETS / "llava-1.5-7b" / "config.json")
    assert 2 * sum(math.prod(shape) for shape in expected_tensors(config).values()) == 14_126_854_144


@pytest.mark.parametrize("alias", LLAMA)
def test_hub_alias_config_means_the_same_to_transformers(alias: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlavaNextConfig if alias in NEXT else transformers.LlavaConfig
    theirs = kind(**json.loads((ASSETS / alias / "config.json").read_text()))
    assert LlavaConfig.from_dict(theirs.to_dict()) == LlavaConfig.from_file(ASSETS / alias / "config.json")


@pytest.mark.parametrize("alias", NEXT)
def test_llava_next_alias_differs_from_llava_in_its_tiles_alone(alias: str) -> None:
    config = LlavaConfig.from_file(ASSETS / alias / "config.json")
    plain = LlavaConfig.from_file(ASSETS / alias.replace("v1.6-vicuna", "1.5") / "config.json")
    assert replace(config, grid_pinpoints=None) == plain
    assert config.grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert config.max_tiles * config.vision.patches == 2880


def test_transformers_processor_of_a_llava_next_alias_counts_the_tokens_that_vision_gives() -> None:
    transformers = pytest.importorskip("transformers")
    directory = ASSETS / "llava-v1.6-vicuna-7b"
    processor = transformers.AutoProcessor.from_pretrained(directory)
    config = LlavaConfig.from_file(directory / "config.json")
    for width, height in ((90, 50), (400, 1200), (640, 640), (9, 7)):
        batch = processor(images=np.zeros((height, width, 3), np.uint8), text="<image>", return_tensors="np")
        feeds = vision_feeds(config, config.vision.patches, [choose_tiling(config, width, height)])
        assert (np.asarray(batch["input_ids"]) == config.image_token_id).sum() == feeds.rows[0]


def test_random_alias_needs_no_network_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowcut.aliases.fetch", lambda *_: pytest.fail("the Hub was asked"))
    model = resolve("llava-1.5-13b", random=True, decoder_layers=3)
    assert model.note == "random weights, 3 of 40 decoder layers"
    assert model.weights.random
    assert model.config.text.num_hidden_layers == 3
    norm = model.weights.load("language_model.model.layers.2.input_layernorm.weight")
    assert norm.shape == (5120,)
    with pytest.raises(KeyError):
        model.weights.load("language_model.model.layers.3.input_layernorm.weight")


@pytest.mark.parametrize("alias", ALIASES)
def test_bundled_files_agree_with_the_config(alias: str) -> None:
    model = resolve(alias, random=True)
    tokenizer = Tokenizer.from_file(str(model.files / "tokenizer.json"))
    preprocessor = json.loads((model.files / "preprocessor_config.json").read_text())
    pad = json.loads((model.files / "config.json").read_text())["pad_token_id"]
    ids = tokenizer.encode("USER: <image>\nWhat is é? ASSISTANT:").ids
    assert ids[0] == 1
    assert ids.count(model.config.image_token_id) == 1
    assert max(ids) < model.config.text.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "USER:\nWhatisé?ASSISTANT:"
    assert tokenizer.token_to_id("<pad>") == pad
    assert preprocessor["crop_size"]["height"] == model.config.vision.image_size


def test_transformers_loads_llava_tiny_with_identical_tensors() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(TINY, output_loading_info=True)
    assert not any(report.values())
    weights = resolve("llava-tiny").weights
    state = {_old_spelling(name): tensor for name, tensor in theirs.state_dict().items()}
    assert state.keys() == expected_tensors(weights.config).keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), weights.load(name))


def test_transformers_processor_of_llava_tiny_places_one_token_per_patch() -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(TINY)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "USER: <image>\nWhat is this? ASSISTANT:"
    batch = processor(images=np.zeros((50, 90, 3), np.uint8), text=text, return_tensors="np")
    assert batch["pixel_values"].shape == (1, 3, 168, 168)
    assert (np.asarray(batch["input_ids"]) == resolve("llava-tiny").config.image_token_id).sum() == 144


def test_directory_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe.write(tmp_path / "llava-tiny", *recipe.PRESETS["tiny"])
    model = resolve("llava-tiny")
    assert model.config.vision.image_size == 56
    assert (model.note, model.weights.random) == (STAND_IN, False)


def test_directory_name_becomes_one_safe_path_component(tmp_path: Path) -> None:
    recipe.write(tmp_path / " my model: v1", *recipe.PRESETS["tiny"])
    assert resolve(str(tmp_path / " my model: v1")).name == "my-model-v1"


def test_random_directory_reads_only_its_geometry(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    assert resolve(str(tmp_path), random=True).note == f"random weights, {STAND_IN}"
    with pytest.raises(CheckpointError):
        resolve(str(tmp_path))


def test_fewer_decoder_layers_of_a_checkpoint(tmp_path: Path) -> None:
    recipe.write(tmp_path, *recipe.PRESETS["tiny"])
    model = resolve(str(tmp_path), decoder_layers=2)
    assert model.note == f"2 of 4 decoder layers, {STAND_IN}"
    assert model.weights.sha256 != resolve(str(tmp_path)).weights.sha256
    assert resolve(str(tmp_path), decoder_layers=4).note == STAND_IN


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_decoder_layers_out_of_range_are_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"decoder_layers must be in 1\.\.4, got {layers}"):
        resolve("llava-tiny", decoder_layers=layers)


@pytest.mark.parametrize("name", ["llava-1.5", "", "/no/such/directory"])
def test_unknown_name_lists_the_aliases(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(name)
    assert all(alias in str(error.value) for alias in ALIASES)
    assert "directory" in str(error.value)
    assert "\n" not in str(error.value)


def test_partial_download_is_not_complete(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_text("{}")
    assert not complete(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").touch()
    assert not complete(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert complete(tmp_path)


def test_refused_connection_names_the_remedies(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    message, _ = _resolve_through(f"http://127.0.0.1:{port}", tmp_path)
    assert message.startswith("FlowCutError: llava-1.5-7b must be downloaded from http://127.0.0.1")
    assert "MODEL=DIR" in message
    assert "WEIGHTS=random" in message


def test_silent_hub_is_given_up_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        message, seconds = _resolve_through(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path)
    assert "no answer" in message or "timed out" in message
    assert "WEIGHTS=random" in message
    assert seconds < 60  # it waits five; the rest is the start of Python on a busy machine


def test_dripping_hub_is_given_up_soon(tmp_path: Path) -> None:
    """A server that sends a byte now and then never runs into a read timeout."""
    with _serve(_Drip) as endpoint:
        message, seconds = _resolve_through(endpoint, tmp_path)
    assert "no answer" in message
    assert seconds < 60  # it waits five; the rest is the start of Python on a busy machine


def test_download_and_then_the_cache_alone(tmp_path: Path) -> None:
    with _serve(_Hub) as endpoint:
        first, _ = _resolve_through(endpoint, tmp_path)
    again, _ = _resolve_through(endpoint, tmp_path)  # nobody listens there any more
    digest = resolve(str(TINY)).weights.sha256
    assert first == again == f"llava-1.5-7b  {digest}"


def _resolve_through(endpoint: str, cache: Path) -> tuple[str, float]:
    """Last line said by a process that resolves llava-1.5-7b; huggingface_hub reads its settings when imported."""
    code = (
        "from flowcut.aliases import resolve\n"
        "try: model = resolve('llava-1.5-7b'); print(model.name, model.note, model.weights.sha256)\n"
        "except Exception as error: print(f'{type(error).__name__}: {error}')\n"
    )
    extra = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=_env() | extra, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip().splitlines()[-1], time.monotonic() - start


def _env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {"PYTHONPATH": str(ROOT)}


def _old_spelling(name: str) -> str:
    """transformers 5's module names, in the spelling of the checkpoints."""
    name = name.replace("model.vision_tower.vision_model.", "model.vision_tower.")
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


@contextmanager
def _serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Drip(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            for _ in range(30):
                self.wfile.write(b" ")
                time.sleep(0.5)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for; every repository is llava-tiny."""

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/") and "/tree/" in path:
            content = json.dumps(
                [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _oid(p)} for p in _files()]
            )
        elif path.startswith("/api/"):
            siblings = [{"rfilename": p.name} for p in _files()]
            content = json.dumps({"id": "llava-hf/llava-1.5-7b-hf", "sha": self.commit, "siblings": siblings})
        else:
            return self._file(TINY / path.rsplit("/", 1)[-1], body)
        return self._send(content.encode(), body, {"Content-Type": "application/json"})

    def _file(self, path: Path, body: bool) -> None:
        self._send(path.read_bytes(), body, {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": self.commit})

    def _send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _files() -> list[Path]:
    return sorted(TINY.iterdir())


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
