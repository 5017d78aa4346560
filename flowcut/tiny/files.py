"""The bundled files but for weights: llava-tiny's, the Hub models' with llava-tiny's tokenizer, a stand-in tokenizer.

Everything is decided here: a second run writes the same bytes. Needs numpy and tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flowcut.chat import FILE, default_template
from flowcut.config import PINPOINTS
from flowcut.tiny.questions import all_questions
from flowcut.tiny.scenes import make_scene

VOCABULARY = 1024  # llava-tiny's; <image> and <pad> are its last two. LLaVA-1.5 has them at 32000 and 32001
SMALL = 512  # so that any checkpoint's vocabulary holds it
SPECIALS = ["<unk>", "<s>", "</s>"]  # 0, 1, 2, as in Llama
BYTES = [f"<0x{i:02X}>" for i in range(256)]

WORDS = """
a about above across after all along an and animal animals answer any apple are around art as at away baby back bag
ball banana bear bed behind below bench beside between bicycle big bird birds black blue board boat book bottle bowl
box boy bread bridge bright brown building bus cake camera can car cat cats chair child children church circle city
clean clear clock close cloth cloud clouds coat coffee color colors corner count cow cup cut dark day describe desk
did dish do does dog dogs door down drink drinking each eating edge eight elephant empty face far fast field fire
fish five flag floor flower flowers food foot for forest fork four frame from front fruit game garden girl glass go
going good grass gray great green ground group hair hand happy has hat have he head her high hill his holding home
horse hot house how image in inside is it its jumping kitchen knife lake lamp large laptop leaf leaves left letter
light line little long look looking made man many map meat men middle mirror moon more morning mountain mouth moving
much near next night nine no not number object objects ocean of off old on one only open or orange other out outside
over paint painting paper park part people person phone photo picture pink pizza plane plant plate playing point
purple question rain rabbit read reading red right ring river road rock roof room round running sand scene sea seat
see seven shape she sheep ship shirt shoe shop short show shows side sign sitting six sky sleeping small smile snow
some square standing star stone store street sun table tall taking teeth ten text that the their them there these
they thing things this three through time to together top tower town toy track traffic train tree trees triangle
truck two umbrella under up used wall walking want was watch water wave wearing weather what wheel when where which
white who why wide wild window with woman women wood word work writing yellow yes you young zebra zero
"""
SENTENCES = """
What is in the picture?
How many people are there in the image?
Where is the dog sitting?
Is there a cat on the chair?
Which animal is behind the tree?
Describe this photo in one sentence.
What is the man doing?
What is the woman holding in her hand?
There are two people in the picture. They are walking on the street.
Yes, there is. No, there is not.
USER: ASSISTANT:
0 1 2 3 4 5 6 7 8 9 ! " # % & ' ( ) * + - / ; < = > @ [ ] _
A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
""".strip().splitlines()

LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
LLAVA_NEXT = LLAVA | {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": PINPOINTS,
    "model_type": "llava_next",
    "use_image_newline_parameter": True,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
}
CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
TINY_CLIP = CLIP | {
    "hidden_size": 128,
    "image_size": 168,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
    "projection_dim": 128,
}
TINY_LLAMA = LLAMA | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 6,
    "vocab_size": VOCABULARY,
}
# As on the Hub: what is not said is LlamaConfig's default, a 7B.
LLAMA_7B = LLAMA | {"vocab_size": 32064}
LLAMA_13B = LLAMA | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32064,
}
HUB = {
    "llava-1.5-7b": (LLAVA, LLAMA_7B),
    "llava-1.5-13b": (LLAVA, LLAMA_13B),
    "llava-v1.6-vicuna-7b": (LLAVA_NEXT, LLAMA_7B),
    "llava-v1.6-vicuna-13b": (LLAVA_NEXT, LLAMA_13B),
}


def write_tiny(directory: Path) -> None:
    """All of llava-tiny but its weights."""
    image, pad = VOCABULARY - 2, VOCABULARY - 1
    write_settings(directory, llava(LLAVA, TINY_CLIP, TINY_LLAMA, image, pad), image, pad)


def write_stand_ins(out: Path) -> None:
    """What stands in for files that are not there, under `out`.

    <alias>/ of each of the Hub's models: its settings, with llava-tiny's tokenizer in place of its own. stand-in/: a
    smaller tokenizer for checkpoints that have none.
    """
    for alias, (model, text) in HUB.items():
        write_settings(out / alias, llava(model, CLIP, text, 32000, 32001), 32000, 32001)
    (out / "stand-in").mkdir(exist_ok=True)
    small = tokenizer(SMALL - 2, SMALL - 1, SMALL)
    write_json(out / "stand-in" / "tokenizer.json", json.loads(small.to_str()))


def llava(model: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], image: int, pad: int) -> dict[str, Any]:
    return model | {"image_token_index": image, "pad_token_id": pad, "text_config": text, "vision_config": vision}


def write_settings(directory: Path, config: dict[str, Any], image: int, pad: int) -> None:
    """config.json, preprocessor, tokenizer and chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    vision, pinpoints = config["vision_config"], config.get("image_grid_pinpoints")
    name = {"processor_class": "LlavaProcessor" if pinpoints is None else "LlavaNextProcessor"}
    write_json(directory / "config.json", config)
    write_json(directory / "preprocessor_config.json", image_processor(vision["image_size"], pinpoints) | name)
    write_json(directory / "processor_config.json", processor(vision["patch_size"]) | name)
    write_json(directory / "tokenizer_config.json", tokenizer_config() | name)
    write_json(directory / "special_tokens_map.json", special_tokens())
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad})
    write_json(directory / "tokenizer.json", json.loads(tokenizer(image, pad).to_str()))
    (directory / FILE).write_text(default_template(anyres=pinpoints is not None).source, encoding="utf-8")


def tokenizer(image: int, pad: int, size: int = VOCABULARY) -> Tokenizer:
    """Llama's pipeline (byte-fallback BPE, a space before every text, BOS) over our own words; `size` with both."""
    vocabulary, merges = learn(size - 2)
    vocabulary |= {"<image>": image, "<pad>": pad}
    out = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    out.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    out.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    out.add_special_tokens([AddedToken(t, normalized=False) for t in (*SPECIALS, "<image>", "<pad>")])
    return out


def learn(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """BPE vocabulary of `size`, and its merges, best first."""
    learner = Tokenizer(models.BPE())
    words = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation("isolated")])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS + BYTES, show_progress=False)
    asked = {q.text + " " + q.answer for number in range(300) for q in all_questions(make_scene("train", number))}
    learner.train_from_iterator(WORDS.split() + SENTENCES * 10 + sorted(asked), trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def image_processor(size: int, pinpoints: list[list[int]] | None) -> dict[str, Any]:
    """CLIP's, or with pinpoints LLaVA-NeXT's, whose do_pad fills up batches."""
    clip = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }
    if pinpoints is None:
        return clip
    anyres = {"aspect_ratio_setting": "anyres", "do_pad": True, "image_grid_pinpoints": pinpoints}
    return clip | anyres | {"image_processor_type": "LlavaNextImageProcessor"}


def processor(patch: int) -> dict[str, Any]:
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # CLS, which the strategy then takes away
        "patch_size": patch,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }


def tokenizer_config() -> dict[str, Any]:
    return special_tokens() | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "model_max_length": 4096,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def special_tokens() -> dict[str, Any]:
    return {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
