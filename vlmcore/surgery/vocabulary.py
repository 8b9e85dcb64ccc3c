"""The LLM's vocabulary, with the shell's image tokens added by name.

Every token that the LLM knows keeps its id and its row. A token that it lacks gets the next free
id: published embeddings are padded past their tokenizer (Qwen3: 151,936 rows for 151,669 tokens),
so it usually lands on a row that no token had, and only past those does the matrix grow.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.surgery.chat_template import with_images
from vlmcore.surgery.shells import Shell

TOKENIZER_FILES = ("*token*.json", "vocab*", "merges*", "*.model", "LICENSE*")
TEMPLATE = "chat_template.jinja"
SAMPLED_ROWS = 8192  # enough for a mean and a spread, little beside a vocabulary in fp32
# of the rows' own spread: new tokens differ from one another, and none outshines a trained token
# (why the mean: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021)
NOISE = 0.1


@dataclass(frozen=True)
class Vocabulary:
    """The swapped model's tokens.

    Attributes:
        ids: Name → id of the shell's image tokens.
        new: Those of them that the LLM does not know.
        num_known: Ids of the LLM's own tokens are below this.
        donor_ids: Name → id in the vision donor's tokenizer, where it has it.
    """

    ids: Mapping[str, int]
    new: tuple[str, ...]
    num_known: int
    donor_ids: Mapping[str, int]

    def num_rows(self, llm_rows: int) -> int:
        """Rows of the embeddings, for an LLM that has `llm_rows`."""
        return max(llm_rows, 1 + max(self.ids.values()))


def write_tokenizer(vlm_dir: Path, llm_dir: Path, target: Path, shell: Shell) -> Vocabulary:
    """Writes the LLM's tokenizer with the shell's tokens, and the chat template.

    Its files are copied where it lacks nothing.

    Raises:
        WeightError: The LLM's tokenizer has no chat template.
    """
    from transformers import AutoTokenizer

    donor: Any = AutoTokenizer.from_pretrained(vlm_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(llm_dir)
    if not isinstance(tokenizer.chat_template, str):
        raise WeightError(
            f"{llm_dir}: the LLM's tokenizer has no chat template; put the one that it was or will "
            f"be trained with into {TEMPLATE}"
        )
    template = with_images(tokenizer.chat_template, shell)
    assert shell.family.vision is not None
    # names by which a processor asks its tokenizer for them, such as context_image_token
    named = {
        name: token
        for name, token in donor.special_tokens_map.items()
        if name not in type(donor).SPECIAL_TOKENS_ATTRIBUTES  # an instance adds its own
    }
    known = tokenizer.get_vocab()
    wanted = dict.fromkeys([*shell.family.vision.tokens.values(), *named.values()])
    new = tuple(token for token in wanted if token not in known)
    target.mkdir(parents=True, exist_ok=True)
    if new or named.keys() - tokenizer.special_tokens_map.keys():
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(new)}, replace_extra_special_tokens=False
        )
        tokenizer.save_pretrained(target)
        _name_tokens(target, named)
    else:
        for path in sorted({path for kind in TOKENIZER_FILES for path in llm_dir.glob(kind)}):
            shutil.copyfile(path, target / path.name)
    _write_template(target, template)
    return Vocabulary(
        ids={token: tokenizer.convert_tokens_to_ids(token) for token in wanted},
        new=new,
        num_known=1 + max(known.values()),
        donor_ids={token: i for token, i in donor.get_vocab().items() if token in wanted},
    )


def new_rows(
    table: Tensor,
    donor_rows: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """New token → its row [H] for one matrix of the LLM, embeddings or output layer.

    Args:
        table: The LLM's matrix [rows, H].
        donor_rows: The vision donor's row of a token, where one of this width exists.
        vocabulary: Which tokens are new.
        generator: Of the rows that are drawn.
    """
    drawn = [token for token in vocabulary.new if token not in donor_rows]
    rows = {token: row.to(table.dtype) for token, row in donor_rows.items()}
    if drawn:
        step = max(1, vocabulary.num_known // SAMPLED_ROWS)
        spread, mean = torch.std_mean(table[: vocabulary.num_known : step].float(), dim=0)
        noise = torch.randn(len(drawn), table.shape[1], generator=generator)
        values = (mean + NOISE * spread * noise).to(table.dtype)
        rows |= dict(zip(drawn, values, strict=True))
    return rows


def with_rows(
    table: Tensor, rows: Mapping[str, Tensor], vocabulary: Vocabulary, *, num_rows: int
) -> Tensor:
    """The LLM's matrix [num_rows, H]: every row at its place, new tokens' rows at theirs."""
    grown = torch.zeros(num_rows, table.shape[1], dtype=table.dtype)
    grown[: len(table)] = table
    for token, row in rows.items():
        grown[vocabulary.ids[token]] = row
    return grown


def _name_tokens(target: Path, named: Mapping[str, str]) -> None:
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | named, indent=2) + "\n")


def _write_template(target: Path, template: str) -> None:
    """The template as a file of its own, which goes before any other place."""
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n")
    (target / TEMPLATE).write_text(template)
