"""What is known of a model before one is built: its config and its tensors' names, without torch.

Names come from the headers of the safetensors, in the form that transformers has in memory, so a
plan can hold a stage against a model in milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmcore.families import Config, Family, LanguageModel, family_of, read_config
from vlmcore.families.base import HEAD, TEXT_PREFIX
from vlmcore.families.rows import FuseGateUp, FuseQKV, Rename, Row, StackExperts, Subtree
from vlmcore.surgery.shells import choose_shell
from vlmcore.weights.safetensors_io import SafetensorsFolder

_EXPERT = re.compile(r"(?P<stack>.*\.experts\.)\d+\.(?P<name>gate|up|down)_proj\.weight")
_LAYERS = "decoder.layers."
# Megatron-Core 0.16 stores these norms under TransformerEngine's names; its modules have their own
_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """A model that may not be made yet.

    Attributes:
        family: Its own, of a swapped model the shell's.
        decoder: Shape of its language model.
        decoder_dir: Model folder whose config.json says so.
        num_deepstack: First decoder layers that image features are added to.
        rows: Its weight map.
        dims: Name in memory → number of dimensions of every tensor.
    """

    family: Family
    decoder: LanguageModel
    decoder_dir: Path
    num_deepstack: int
    rows: tuple[Row, ...]
    dims: Mapping[str, int]

    @property
    def linear_layers(self) -> list[str]:
        """Names of its linear layers, which alone have matrices, embeddings and routers aside."""
        names = (n.removesuffix(".weight") for n, dims in self.dims.items()
                 if dims == 2 and n.endswith(".weight"))  # fmt: skip
        return [n for n in names if "embed" not in n.rpartition(".")[2] and not self._is_router(n)]

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template stands beside its tokenizer, which is the decoder's."""
        settings = self.decoder_dir / "tokenizer_config.json"
        places = ("chat_template.jinja", "additional_chat_templates")
        return any((self.decoder_dir / place).exists() for place in places) or (
            settings.is_file() and bool(json.loads(settings.read_text()).get("chat_template"))
        )

    @property
    def stacked_experts(self) -> list[str]:
        """Names of the parameters that hold all experts of a layer."""
        return [name for name, dims in self.dims.items() if ".experts." in name and dims == 3]

    def _is_router(self, name: str) -> bool:
        return self.decoder.moe is not None and name.endswith(".mlp.gate")

    def megatron_parameters(self) -> Iterator[str]:
        """Names of its parameters in the Megatron model."""
        for row in self.rows:
            match row:
                case Rename(hf=hf, mcore=mcore):
                    yield from self._placed(hf, mcore)
                case FuseQKV(q=hf, mcore=mcore) | FuseGateUp(gate=hf, mcore=mcore):
                    yield from self._placed(hf, mcore)
                case Subtree(hf=hf, mcore=mcore):
                    yield from (mcore + n.removeprefix(hf) for n in self.dims if n.startswith(hf))
                case StackExperts(hf=hf, mcore=mcore):
                    assert self.decoder.moe is not None
                    stem = mcore.removesuffix("experts.")
                    for number in range(self.decoder.moe.num_experts):
                        expert = f"{stem}local_experts.{number}.linear_fc"
                        yield from self._placed(f"{hf}gate_up_proj", f"{expert}1.weight")
                        yield from self._placed(f"{hf}down_proj", f"{expert}2.weight")

    def _placed(self, hf: str, mcore: str) -> Iterator[str]:
        for stored, own in _NORMS.items():
            mcore = mcore.replace(stored, own)
        for layer in range(self.decoder.num_layers) if "{layer}" in hf else [0]:
            if hf.replace("{layer}", str(layer)) in self.dims:
                yield mcore.replace(_LAYERS, f"{_LAYERS}{layer}.")


def outline(hf_dir: Path) -> ModelOutline:
    """The model of an HF folder.

    Raises:
        WeightError: The folder is damaged, or no family covers it.
    """
    config = read_config(hf_dir)
    family = family_of(config)
    decoder = family.language_model(config)
    return ModelOutline(
        family=family,
        decoder=decoder,
        decoder_dir=hf_dir,
        num_deepstack=_num_deepstack(config),
        rows=family.rows(config),
        dims=_dims(hf_dir, family, decoder),
    )


def outline_of_swap(vlm_dir: Path, llm_dir: Path, *, shell: str) -> ModelOutline:
    """The model that a swap will make of two HF folders.

    Raises:
        WeightError: A folder is damaged, or no shell holds the pair.
    """
    vlm, llm = outline(vlm_dir), outline(llm_dir)
    family = choose_shell(vlm.family, llm.family, shell).family
    text = ("model.", TEXT_PREFIX)
    eyes = {n: d for n, d in vlm.dims.items() if not n.startswith((TEXT_PREFIX, HEAD))}
    return ModelOutline(
        family=family,
        decoder=llm.decoder,
        decoder_dir=llm_dir,
        num_deepstack=vlm.num_deepstack,
        rows=family.rows({"model_type": family.model_type, "text_config": read_config(llm_dir)}),
        dims=eyes | {n.replace(*text, 1) if n.startswith("model.") else n: d
                     for n, d in llm.dims.items()},
    )  # fmt: skip


def _num_deepstack(config: Config) -> int:
    return len((config.get("vision_config") or {}).get("deepstack_visual_indexes") or ())


def _dims(hf_dir: Path, family: Family, decoder: LanguageModel) -> dict[str, int]:
    grouped = tuple(prefix for prefixes in family.groups.values() for prefix in prefixes)
    dims: dict[str, int] = {}
    for key, info in SafetensorsFolder(hf_dir).items():
        name = family.memory_key(key)
        if found := _EXPERT.fullmatch(name):
            half = "down_proj" if found["name"] == "down" else "gate_up_proj"
            dims[found["stack"] + half] = 3
        elif name.startswith(grouped) and not (decoder.tied_embeddings and name.startswith(HEAD)):
            dims[name] = len(info.shape)
    return dims
