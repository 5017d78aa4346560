"""`python fuzz.py pictures|prompts|questions EXAMPLES [ENGINE]`: odd input by the thousand, in a process whose memory
is limited and that ends where one example hangs. Prints what became of it as JSON; whatever else happens is a failure.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from odd_pictures import Made, pictures
from PIL import Image

from engines.runtime.control import Control
from engines.runtime.engine import LlavaEngine, Sampling, load_engine
from flowcut.aliases import ASSETS
from flowcut.config import LlavaConfig
from flowcut.errors import InputError
from flowcut.preprocess import MAX_PIXELS, ImageSettings, open_image, pixel_values
from flowcut.prompt import IMAGE
from flowcut.tiles import tiled_pixels

HANG_S = 300
STRIDE = 250
"""Most examples in one go; a quarter of them all where that is less, as growth takes more than one look."""
ALLOWED_BYTES = 3 << 30
"""Beyond what the process has before the first example: each copy of the largest picture takes a third of a GiB."""
SPECIAL = (IMAGE, "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<|im_end|>", "ASSISTANT:", "USER: ", "\n", " ", "▁")
ODD = (
    "\0",
    "\x1b[31m",
    "\u202e",
    "\ufeff",
    "\ud800",
    "\udfff\ud800",
    "\U0010ffff",
    "e\u0301\u0301",
    "👩\u200d👩\u200d👦",
)
ANY = st.text(st.characters(exclude_categories=()), max_size=30)
PIECES = st.lists(st.one_of(st.sampled_from(SPECIAL), st.sampled_from(SPECIAL), st.sampled_from(ODD), ANY), max_size=12)
CLIP = ImageSettings(image_size=28, shortest_edge=28)


@st.composite
def prompts(draw: st.DrawFn) -> str:
    """Any text, special tokens in it written out; a few of a megabyte."""
    text = "".join(draw(PIECES))
    return text * draw(st.sampled_from([1] * 18 + [20, (1 << 20) // max(len(text), 1)]))


def one_line(error: InputError) -> str:
    """Refused, as it has to be; not for want of memory, of which there is enough for every picture."""
    assert "\n" not in str(error)
    assert "must fit into memory" not in str(error), str(error)
    assert 20 < len(str(error)) < 1000, str(error)
    return "refused"


def next_geometry() -> tuple[LlavaConfig, ImageSettings]:
    directory = ASSETS / "llava-v1.6-vicuna-7b"
    config = LlavaConfig.from_file(directory / "config.json")
    return config, ImageSettings.from_directory(directory, config.vision.image_size, config.grid_pinpoints)


def look(made: Made) -> str:
    """A file opens and becomes finite pixels of the right shape, or is refused in one line."""
    try:
        image = open_image(made.content)
    except InputError as error:
        if made.whole:
            raise
        return one_line(error)
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS
    assert not made.whole or sorted(image.size) == sorted(made.size)
    try:
        pixels = pixel_values([image], CLIP)
        tiles = tiled_pixels([image], *reversed(next_geometry()))[0] if len(made.history) == 2 else pixels
    except InputError as error:
        return one_line(error)
    assert pixels.shape == (1, 3, 28, 28)
    assert np.isfinite(pixels).all()
    assert np.isfinite(tiles).all()
    return "whole" if made.whole else "opened"


def read(engine: LlavaEngine, raw: tokenizers.Tokenizer, prompt: str, count: int) -> str:
    """A prompt with `count` pictures becomes a batch that fits the engine, or is refused in one line."""
    picture, tokens = Image.new("RGB", (20, 30)), engine.manifest.tokens
    try:
        request = engine.reader.read([picture] * count, prompt, Sampling(1), Control(None, None))
        batch = engine.reader.batch([request])
    except InputError as error:
        return one_line(error)
    config = engine.manifest.geometry
    (ids,), (rows,), (length,) = batch.input_ids, batch.image_rows, batch.lengths
    assert len(ids) == length <= engine.manifest.limits.max_prompt
    assert ids.min() >= 0
    assert ids.max() < config.text.vocab_size
    assert rows[rows >= 0].tolist() == list(range(count * tokens))
    assert ((rows >= 0) == (ids == config.image_token_id)).all()
    written = raw.encode(prompt).ids
    assert ids[rows < 0].tolist() == [i for i in written if i != raw.token_to_id(IMAGE)]
    return "read"


def ask(engine: LlavaEngine, made: Made, prompt: str) -> str:
    """A question is answered with text, or refused in one line."""
    try:
        answer = engine.generate([made.content], f"{IMAGE}{prompt}", Sampling(3))
    except InputError as error:
        return one_line(error)
    answer.texts[0].encode()
    assert len(answer.token_ids[0]) <= 3
    return "answered"


def each(first: int, examples: int, check: Callable[..., str], **strategies: st.SearchStrategy[Any]) -> Counter[str]:
    """How often what became of an example. `first` is the number of the first, and decides all of them."""
    seen = Counter[str]()

    @seed(first)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(**strategies)
    def run(**arguments: Any) -> None:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        seen[check(**arguments)] += 1
        faulthandler.cancel_dump_traceback_later()

    run()
    return seen


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(what: str, examples: int, directory: str = "") -> None:
    engine = load_engine(directory, "ort", threads=1, picture_cache_mb=1) if directory else None
    raw = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json") if directory else None
    faulthandler.enable()
    limit_memory()
    odd = pictures()

    def some(first: int, count: int) -> Counter[str]:
        if engine is None:
            return each(first, count, look, made=odd)
        if what == "questions":
            return each(first, count, lambda made, prompt: ask(engine, made, prompt), made=odd, prompt=ANY)
        return each(
            first,
            count,
            lambda prompt, more: read(engine, raw, prompt, prompt.count(IMAGE) % 5 + more),
            prompt=prompts(),
            more=st.sampled_from([0, 0, 0, 1]),
        )

    seen, grown = Counter[str](), []
    stride = min(STRIDE, -(-examples // 4))
    for first in range(0, examples, stride):  # hypothesis keeps what it has tried
        seen += some(first, min(stride, examples - first))
        grown.append(resident_bytes())
    print(json.dumps({"seen": seen, "resident_bytes": grown}))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
