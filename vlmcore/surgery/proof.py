"""The swap proof: figures that show the swapped model is the donors' and nothing else.

One model is in memory at a time: both donors answer first, then the swapped model, as reloaded from
its files.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmcore.errors import ProofError
from vlmcore.families import Family, family_of, read_config
from vlmcore.surgery.merge import SwapLedger
from vlmcore.surgery.shells import AUTO, SHELLS, TWIN_TOWERS
from vlmcore.surgery.swap import swap_llm

TURNS = [
    {"role": "system", "content": "You answer in one line.\n"},
    {"role": "user", "content": " The swapped model must answer text as its donor does. 12 + 30? "},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And twice that?"},
]
PROOF = "proof.json"
QUESTION = "What is shown?"
_SIZE = (150, 90)  # pixels of the image: no multiple of any patch
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


@dataclass(frozen=True)
class _Text:
    """Turns through a model: as rendered, as ids [1, S], as logits [1, S, V]."""

    rendered: str
    ids: Tensor
    logits: Tensor
    module: str  # class of the decoder


@dataclass(frozen=True)
class _Vision:
    """An image through a tower, and how many features the aligner made of it."""

    output: Tensor
    num_features: int
    module: str  # class of the tower


def prove_swap(swapped: Path, vlm_dir: Path, llm_dir: Path, ledger: SwapLedger) -> dict[str, Any]:
    """Measures the swap on the reloaded checkpoint, in fp32.

    Returns:
        `text_logits_max_diff` over the LLM's own tokens and `vision_max_diff` of the tower's output
        before the aligner, each donor through its own tokenizer and processor; missing and
        unexpected keys of the reload; the classes of the language and vision modules; whether text
        renders and tokenises as the LLM's does, and an image as the shell writes it; placeholders
        and features of an image that ran through the whole model; the ledger.

    Raises:
        ProofError: A figure differs from what is expected; the message holds all of them.
    """
    llm, _ = _load(llm_dir)
    text = _text_through(llm, llm_dir, type(llm.model).__name__)
    del llm
    vlm, _ = _load(vlm_dir)
    vision = _image_through(vlm, vlm_dir)
    del vlm
    model, info = _load(swapped)
    our_text = _text_through(model, swapped, type(model.model.language_model).__name__)
    our_vision = _image_through(model, swapped)

    shell = SHELLS[ledger.shell]
    figures: dict[str, Any] = {
        "text_logits_max_diff": _text_difference(our_text, text, _ids_of(ledger, swapped)),
        "vision_max_diff": _difference(our_vision.output, vision.output),
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "text_class": our_text.module,
        "vision_class": our_vision.module,
        "text_renders_alike": our_text.rendered == text.rendered,
        "text_tokenises_alike": our_text.ids.tolist() == text.ids.tolist(),
        "image_renders_as_placeholder": _image_turn(swapped) == _text_turn(llm_dir, shell.image),
        **_whole_model(model, swapped),
        "image_features": our_vision.num_features,
    }
    expected = {
        "text_logits_max_diff": 0.0,
        "vision_max_diff": 0.0,
        "missing_keys": [],
        "unexpected_keys": [],
        "text_class": shell.text_class or text.module,
        "vision_class": _twin(our_vision.module, vision.module),
        "text_renders_alike": True,
        "text_tokenises_alike": True,
        "image_renders_as_placeholder": True,
        "image_logits_finite": True,
        "image_placeholders": our_vision.num_features,
    }
    _judge(figures, expected)
    return {**figures, "ledger": ledger.summary()}


def swap_with_proof(
    vlm_dir: Path, llm_dir: Path, target: Path, *, seed: int, shell: str = AUTO
) -> dict[str, Any]:
    """Swaps into `target`, proves it, and gives the proof, which is also written there.

    Raises:
        WeightError: The donors cannot be joined.
        ProofError: They were, but the result is not what they are.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar a donor says nothing beside our own
    ledger = swap_llm(vlm_dir, llm_dir, target, seed=seed, shell=shell)
    proof = prove_swap(target, vlm_dir, llm_dir, ledger)
    (target / PROOF).write_text(json.dumps(proof, indent=1) + "\n")
    return proof


def _judge(figures: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    faults = [
        f"{name}: {figures[name]}, expected {value}"
        for name, value in expected.items()
        if figures[name] != value
    ]
    if faults:
        raise ProofError("the swap proof failed:\n  " + "\n  ".join(faults))


def _family(folder: Path) -> Family:
    return family_of(read_config(folder))


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    gc.collect()  # so that the model before this one is gone
    architecture = getattr(transformers, _family(folder).architecture)
    model, info = architecture.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


@torch.no_grad()
def _text_through(model: Any, folder: Path, module: str) -> _Text:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = str(tokenizer.apply_chat_template(TURNS, tokenize=False))
    ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return _Text(rendered, ids, model(input_ids=ids).logits, module)


@torch.no_grad()
def _image_through(model: Any, folder: Path) -> _Vision:
    """An image through the folder's own processor and the model's own feature extraction."""
    tower = model.get_submodule(_family(folder).groups["vit"][0].removesuffix("."))
    outputs: list[Any] = []
    hook = tower.register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs = _image_inputs(folder)
    aligned = model.get_image_features(
        **{name: value for name, value in inputs.items() if name not in _OF_TEXT}
    ).pooler_output
    hook.remove()
    features = [aligned] if isinstance(aligned, Tensor) else aligned  # one tensor an image
    count = sum(one.numel() // one.shape[-1] for one in features)
    return _Vision(outputs[0].last_hidden_state, count, type(tower).__name__)


@torch.no_grad()
def _whole_model(model: Any, folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    vision = _family(folder).vision
    assert vision is not None
    placeholder = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(vision.image_token)
    inputs = _image_inputs(folder)
    logits = model(**inputs).logits
    return {
        "image_placeholders": int((inputs["input_ids"] == placeholder).sum()),
        "image_logits_finite": bool(logits.isfinite().all()),
    }


def _image_inputs(folder: Path) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return processor(text=[_image_turn(folder)], images=[_pattern()], return_tensors="pt")


def _image_turn(folder: Path) -> str:
    from transformers import AutoProcessor

    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return str(
        AutoProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    )


def _text_turn(folder: Path, image: str) -> str:
    from transformers import AutoTokenizer

    return str(
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": image + QUESTION}],
            tokenize=False,
            add_generation_prompt=True,
        )
    )


def _pattern() -> Image.Image:
    """An image in which no two patches are alike."""
    width, height = _SIZE
    x, y = torch.arange(width).expand(height, -1), torch.arange(height)[:, None].expand(-1, width)
    channels = torch.stack([x * 7 + y * 3, x * y, 255 - x * 2 + y * 5], dim=-1) % 256
    return Image.fromarray(channels.to(torch.uint8).numpy())


def _ids_of(ledger: SwapLedger, folder: Path) -> list[int]:
    """Ids of the new tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.convert_tokens_to_ids(token) for token in ledger.new_tokens]


def _text_difference(ours: _Text, theirs: _Text, new_ids: list[int]) -> float:
    """Over the LLM's rows but those that it left free and a new token took."""
    kept = torch.ones(theirs.logits.shape[-1], dtype=torch.bool)
    kept[[i for i in new_ids if i < len(kept)]] = False
    known = ours.logits[..., : len(kept)]
    return _difference(known[..., kept], theirs.logits[..., kept])


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest; infinite where even the shapes differ."""
    return float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")


def _twin(found: str, wanted: str) -> str:
    """The class that a tower has to be: the donor's, or its twin under another name."""
    return found if any({found, wanted} <= twins for twins in TWIN_TOWERS) else wanted
