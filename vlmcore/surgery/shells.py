"""Which stock class holds which vision tower with which LLM exactly: a table, and what it refuses.

A pair is in the table only where the shell's text model was measured to give the LLM's own logits
(max difference 0.0 in fp32, transformers 5.19). Nearly right is not enough: Qwen3's weights in
Qwen2.5-VL's own class agree with Qwen3 on 21 to 54 % of the tokens, and no loader says a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlmcore.errors import WeightError
from vlmcore.families import FAMILIES, Family

AUTO = "auto"
ANY = ("llama", "qwen2", "qwen3", "qwen3_moe")  # shells that build whatever text_config names


@dataclass(frozen=True, kw_only=True)
class Shell:
    """A stock vision-language class, and how it wants the donors' parts.

    Attributes:
        model_type: Its family.
        llms: Families of the LLMs that it holds exactly.
        vlms: Families of the vision donors that lead to it by themselves.
        adopts: Further vision donors; only where the shell is asked for by name.
        text_type: `model_type` of its own text config; None: the LLM's own text model is built.
        text_class: Class of that text model; None: the LLM's own.
        image: How its chat template writes an image; `video` likewise, None: it takes no video.
        needs: LLM config fields that its text model does not read, with the value it computes.
        vision_type: `model_type` of its vision config, for towers of another family; None: no other
            family's tower fits.
        vision_from: Vision config field → the donor's field that gives its value, for such towers.
        processor: Class of its processor, likewise.
    """

    model_type: str
    llms: tuple[str, ...]
    vlms: tuple[str, ...]
    adopts: tuple[str, ...] = ()
    text_type: str | None = None
    text_class: str | None = None
    image: str
    video: str | None
    needs: Mapping[str, object] = field(default_factory=dict)
    vision_type: str | None = None
    vision_from: Mapping[str, str] = field(default_factory=dict)
    processor: str | None = None

    @property
    def family(self) -> Family:
        """The family file of the shell's class."""
        return FAMILIES[self.model_type]


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

SHELLS: Mapping[str, Shell] = {
    shell.model_type: shell
    for shell in (
        Shell(
            model_type="qwen3_vl",
            llms=("qwen3",),
            vlms=("qwen3_vl", "qwen3_vl_moe"),
            text_type="qwen3_vl_text",
            text_class="Qwen3VLTextModel",
            image=_QWEN_IMAGE,
            video=_QWEN_VIDEO,
            vision_type="qwen3_vl_vision",
        ),
        Shell(
            model_type="qwen3_vl_moe",
            llms=("qwen3_moe",),
            vlms=("qwen3_vl_moe", "qwen3_vl"),
            text_type="qwen3_vl_moe_text",
            text_class="Qwen3VLMoeTextModel",
            image=_QWEN_IMAGE,
            video=_QWEN_VIDEO,
            needs={"norm_topk_prob": True},
            vision_type="qwen3_vl_moe_vision",
        ),
        Shell(
            model_type="qwen2_5_vl",
            llms=("qwen2",),
            vlms=("qwen2_5_vl",),
            text_type="qwen2_5_vl_text",
            text_class="Qwen2_5_VLTextModel",
            image=_QWEN_IMAGE,
            video=_QWEN_VIDEO,
        ),
        Shell(
            model_type="exaone4_5",
            llms=ANY,
            vlms=("exaone4_5",),
            adopts=("qwen2_5_vl",),
            image=_QWEN_IMAGE,
            video=_QWEN_VIDEO,
            vision_type="exaone4_5_vision",
            vision_from={"num_key_value_heads": "num_heads"},  # no grouping, as in Qwen2.5-VL
            processor="Exaone4_5_Processor",
        ),
        Shell(
            model_type="internvl",
            llms=ANY,
            vlms=("internvl",),
            image="<IMG_CONTEXT>\n",
            video="<video>\n",
        ),
        Shell(model_type="llava", llms=ANY, vlms=("llava",), image="<image>\n", video=None),
        Shell(
            model_type="llava_onevision",
            llms=ANY,
            vlms=("llava_onevision",),
            image="<image>\n",
            video="<video>\n",
        ),
    )
}

# vision modules whose code is one and the same under two names (transformers generates both)
TWIN_TOWERS = (
    {"Qwen3VLVisionModel", "Qwen3VLMoeVisionModel"},
    {"Qwen2_5_VisionTransformerPretrainedModel", "Exaone4_5_VisionModel"},
)

# (shell, LLM) → why its own text model cannot hold that LLM
NOT_EXACT: Mapping[tuple[str, str], str] = {
    ("qwen2_5_vl", "qwen3"): "its decoder has no q_norm and k_norm, so all of Qwen3's would be "
    "dropped, and its q, k and v biases would have no source (measured: 21 to 54 % of the tokens "
    "agree with the LLM's)",
    ("qwen2_5_vl", "qwen3_moe"): "its decoder has no experts, no q_norm and k_norm",
    ("qwen2_5_vl", "llama"): "its q, k and v biases would have no source",
    ("qwen3_vl", "qwen2"): "its decoder has no q, k and v biases, and its q_norm and k_norm would "
    "have no source",
    ("qwen3_vl", "qwen3_moe"): "its decoder has no experts",
    ("qwen3_vl", "llama"): "its q_norm and k_norm would have no source",
    ("qwen3_vl_moe", "qwen2"): "every layer of its decoder has experts, and its q_norm and k_norm "
    "would have no source",
    ("qwen3_vl_moe", "qwen3"): "every layer of its decoder has experts",
    ("qwen3_vl_moe", "llama"): "every layer of its decoder has experts, and its q_norm and k_norm "
    "would have no source",
}


def choose_shell(vlm: Family, llm: Family, asked: str = AUTO) -> Shell:
    """The shell for a pair of donors.

    Args:
        vlm: Family of the vision donor.
        llm: Family of the LLM donor.
        asked: A shell by name, or `auto`: one that the vision donor leads to.

    Raises:
        WeightError: No stock class holds the pair exactly, or the one asked for does not; with the
            reason and what can be done instead.
    """
    if vlm.vision is None:
        raise WeightError(f"model.vlm is a {vlm.model_type}, which has no vision tower")
    if llm.vision is not None:
        raise WeightError(
            f"model.llm is a {llm.model_type}; expected a text-only model, one of {', '.join(ANY)}"
        )
    if asked not in {AUTO, *SHELLS}:
        raise WeightError(f"no shell is named {asked!r}; there are {', '.join(sorted(SHELLS))}")
    for shell in SHELLS.values() if asked == AUTO else [SHELLS[asked]]:
        vlms = shell.vlms if asked == AUTO else shell.vlms + shell.adopts
        if vlm.model_type in vlms and llm.model_type in shell.llms:
            return shell
    refused = vlm.model_type if asked == AUTO else asked
    raise WeightError(
        f"{llm.model_type} into {vlm.model_type}: {_reason(vlm, llm, refused)}. Instead:\n  "
        + "\n  ".join(_alternatives(vlm, llm))
    )


def _reason(vlm: Family, llm: Family, refused: str) -> str:
    shell = SHELLS[refused]
    name = shell.family.architecture
    if vlm.model_type not in shell.vlms + shell.adopts:
        return f"{name} has another vision tower than {vlm.model_type}"
    return f"{name} does not hold this LLM exactly: {NOT_EXACT[refused, llm.model_type]}"


def _alternatives(vlm: Family, llm: Family) -> list[str]:
    """What to do instead: another shell for the same donors, other donors."""
    found = [
        f"this tower and this LLM in {shell.family.architecture}: "
        + (
            f"vlmflow swap --vlm A --llm B --out C --shell {shell.model_type} "
            f"(in a recipe: model.shell: {shell.model_type})"
            if vlm.model_type in shell.adopts
            else "leave --shell (in a recipe: model.shell) out"
        )
        for shell in SHELLS.values()
        if vlm.model_type in shell.vlms + shell.adopts and llm.model_type in shell.llms
    ]
    holders = sorted({one for s in SHELLS.values() if llm.model_type in s.llms for one in s.vlms})
    held = sorted({one for s in SHELLS.values() if vlm.model_type in s.vlms for one in s.llms})
    return [
        *found,
        f"this LLM with another vision donor: {', '.join(holders)}",
        f"this vision donor with another LLM: {', '.join(held)}",
    ]
