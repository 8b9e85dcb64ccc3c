import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.surgery.conftest import WEIGHTS, Swap

Swapped = Callable[..., Swap]

QWEN_TOKENS = {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"}
INTERNVL_TOKENS = ["<IMG_CONTEXT>", "</img>", "<img>", "<video>"]
NUM_KNOWN = 286  # ids of the tiny tokenizer
OTHER = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20}


def tables(swap: Swap) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The LLM's and the swapped model's embeddings and head."""
    ours, theirs = swap.tensors(), load_file(swap.llm / WEIGHTS)
    return {
        name: (theirs[source], ours[home])
        for home, (source,) in swap.ledger.from_llm.items()
        for name in ("embed_tokens", "lm_head")
        if f"{name}.weight" in source
    }


def test_new_tokens_take_free_rows_and_the_vision_donors_values(swapped: Swapped) -> None:
    swap = swapped("internvl", "qwen3")  # 321 rows, 286 of them with a token
    swap.prove()
    from transformers import AutoTokenizer

    donor, tokenizer = load_file(swap.vlm / WEIGHTS), AutoTokenizer.from_pretrained(swap.vlm)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in INTERNVL_TOKENS]
    assert ids != sorted(ids)  # the donor numbers them otherwise than they are numbered here
    theirs = {
        "embed_tokens": donor["language_model.model.embed_tokens.weight"],
        "lm_head": donor["language_model.lm_head.weight"],
    }
    taken = slice(NUM_KNOWN, NUM_KNOWN + len(INTERNVL_TOKENS))
    for name, (old, new) in tables(swap).items():
        assert new.shape == old.shape
        kept = torch.ones(len(old), dtype=torch.bool)
        kept[taken] = False
        assert torch.equal(new[kept], old[kept])
        assert torch.equal(new[taken], theirs[name][ids])
        assert not torch.equal(new[taken], old[taken])
    assert swap.ledger.new_tokens == {
        token: f"id {NUM_KNOWN + n}, the vision donor's rows of that token"
        for n, token in enumerate(INTERNVL_TOKENS)
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_full_vocabulary_grows(swapped: Swapped, tied: bool) -> None:
    swap = swapped("internvl", "qwen3", vocab_size=NUM_KNOWN + 1, tied=tied)
    figures = swap.prove()
    assert figures["text_logits_max_diff"] == 0.0
    found = tables(swap)
    assert set(found) == {"embed_tokens"} | (set() if tied else {"lm_head"})
    for old, new in found.values():
        assert len(new) == NUM_KNOWN + 4
        assert torch.equal(new[:NUM_KNOWN], old[:NUM_KNOWN])
        assert len({float(row[0]) for row in new[NUM_KNOWN:]}) == 4
    config = json.loads((swap.target / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == NUM_KNOWN + 4


def test_another_width_draws_rows_round_the_mean(swapped: Swapped) -> None:
    swap = swapped("llava", "qwen3", **OTHER)
    swap.prove()
    assert swap.ledger.new_tokens == {
        "<image>": f"id {NUM_KNOWN}, rows drawn round the mean of the LLM's"
    }
    for old, new in tables(swap).values():
        off = new[NUM_KNOWN] - old[:NUM_KNOWN].mean(dim=0)
        assert 0.05 < float((off / old[:NUM_KNOWN].std(dim=0)).std()) < 0.15
    embeddings, head = (new[NUM_KNOWN] for _, new in tables(swap).values())
    assert not torch.equal(embeddings, head)


def test_ids_of_the_config_are_the_llm_tokenizers(
    swapped: Swapped, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The LLM knows no image token, and what the vision donor has there is another token."""
    llm = shutil.copytree(tiny_model("qwen3"), tmp_path / "llm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (llm / name).read_text()
        for token in QWEN_TOKENS:
            text = text.replace(token, token.replace("|", "_"))
        (llm / name).write_text(text)
    swap = Swap(tiny_model("qwen3_vl"), llm, tmp_path / "swapped")
    figures = swap.prove()
    assert figures["image_placeholders"] > 1
    assert set(swap.ledger.new_tokens) == QWEN_TOKENS
    config = json.loads((swap.target / "config.json").read_text())
    ids = {config[f"{kind}_token_id"] for kind in ("image", "video", "vision_start", "vision_end")}
    assert ids == set(range(NUM_KNOWN, NUM_KNOWN + 4))


def test_a_tokenizer_that_lacks_nothing_is_copied(swapped: Swapped) -> None:
    swap = swapped("qwen3_vl", "qwen3")
    assert swap.ledger.new_tokens == {}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (swap.target / name).read_bytes() == (swap.llm / name).read_bytes()
