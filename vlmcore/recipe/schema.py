"""What a recipe may say: frozen pydantic models whose field names are ms-swift's and Megatron's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from vlmcore.layout import Layout
from vlmcore.recipe.gates import parse_gate
from vlmcore.recipe.section import (
    BenchmarkName,
    CrossFieldError,
    Dtype,
    Fraction,
    GateText,
    NonNegative,
    Operational,
    Section,
    Source,
    StageName,
)
from vlmcore.recipe.stage_faults import Fault
from vlmcore.recipe.train_stage import TrainStage

_STAGES_OF_DATA = ("raw", "shards", "energon", "audit")  # a benchmark's questions are one too
# What may stand behind a source, as in ms-swift: hf:USER/NAME:SUBSET#5000
_BEHIND_SOURCE = {
    "limit": re.compile(r"(?P<source>.*)#(?P<value>\d+)\s*"),
    "subset": re.compile(r"(?P<source>(?:hf|modelscope):[^:]+):(?P<value>[^:/\s]+)\s*"),
}


class Model(Section):
    """The two donors: a vision-language model, and optionally the LLM that replaces its own."""

    vlm: Source = Field(
        description="Donor of the vision tower, the processor and the shell: an HF id, `path:DIR` "
        "or `builtin:NAME`."
    )
    llm: Source | None = Field(
        default=None, description="Donor LLM put into the shell, named likewise; left out: no swap."
    )
    shell: Literal[
        "auto", "exaone4_5", "internvl", "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl",
        "qwen3_vl_moe",
    ] = Field(
        default="auto",
        description="Family of the class that holds the swapped model; auto: the vision donor's "
        "own. exaone4_5 holds Qwen2.5-VL's tower with any LLM.",
    )  # fmt: skip


class Dataset(Section):
    """One source of conversations and what becomes of it."""

    source: Source = Field(
        description="`hf:USER/NAME`, `modelscope:USER/NAME`, `http(s)://…`, `s3://…`, another URL "
        "that fsspec reads, `path:DIR_OR_FILE` or `builtin:NAME`; `#5000` behind it is its limit, "
        "`:SUBSET` behind a hub's its subset."
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub's repository; empty: its main branch. The "
        "artifact is pinned to the commit; a full commit needs no hub to plan with.",
    )
    subset: str | None = Field(
        default=None, description="The source's name of a subset; empty: its default or only one."
    )
    split: str | None = Field(
        default=None,
        description="The source's name of its only split that is read; empty: all. Three numbers "
        "here are `split_ratios`.",
    )
    include: tuple[str, ...] = Field(
        default=(), description="Globs of the source's files that are fetched; empty: all."
    )
    limit: int | None = Field(
        default=None, gt=0, description="Rows of each split that are read, from its start."
    )
    sample: int | None = Field(
        default=None, gt=0, description="Rows of each split drawn at random from those."
    )
    sample_seed: int = Field(default=0, ge=0, description="Which rows `sample` draws.")
    format: Literal[
        "messages", "sharegpt", "llava", "alpaca", "query_response", "text", "parquet",
        "webdataset", "auto",
    ] = Field(
        default="messages",
        description="Layout of the raw rows: `messages` is ms-swift's and OpenAI's; `auto`, "
        "`parquet` and `webdataset` tell it by each row's columns.",
    )  # fmt: skip
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="The source's column to the name that the format knows it by, such as "
        "{formula: response}.",
    )
    prompt: str | None = Field(
        default=None, description="Question put to rows that have an answer but none of their own."
    )
    media_dir: str = Field(
        default="", description="Folder of the dataset that its rows' image paths are relative to."
    )
    options: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="Options of a builtin source, such as num_train."
    )
    max_bad_ratio: Fraction = Field(
        default=0.01, description="Share of unusable rows (0 to 1) past which the stage stops."
    )
    max_chars: int = Field(
        default=1_000_000,
        gt=0,
        description="Characters of a conversation; longer ones are left out.",
    )
    duplicates: Literal["keep", "exact", "perceptual"] = Field(
        default="keep",
        description="Repeated samples: kept, or left out but the first. `exact`: same texts and "
        "bytes; `perceptual`: also same texts with images that look the same.",
    )
    split_ratios: tuple[NonNegative, NonNegative, NonNegative] | None = Field(
        default=None,
        description="Parts of train, val and test, such as [9, 1, 0]; empty: the source's splits.",
    )
    split_by: Literal["image", "sample", "group"] = Field(
        default="image",
        description="What is never in two splits: an image, a sample, or a value of group_column.",
    )
    split_seed: int = Field(default=0, ge=0, description="Which sample goes to which split.")
    group_column: str | None = Field(
        default=None, description="Column whose value keeps rows together with split_by: group."
    )
    sample_type: Literal["chat", "vqa", "captioning"] = Field(
        default="chat",
        description="Energon's sample type: conversations, or its VQASample or CaptioningSample.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="How often it is drawn from where a stage reads several datasets, relative to "
        "the others.",
    )
    max_samples_per_shard: int = Field(
        default=10_000, gt=0, description="Samples in one webdataset shard at most."
    )
    max_shard_bytes: int = Field(
        default=4 * 1024**3, gt=0, description="Bytes of one webdataset shard at most."
    )
    num_workers: int = Operational(
        default=2, gt=0, description="Processes that write shards; does not change the result."
    )
    dask_scheduler: str | None = Operational(
        default=None,
        description="Dask cluster whose workers write the shards, such as tcp://10.0.0.5:8786; "
        "they see the store under the same path. Empty: this machine's processes.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fields_behind_source(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("source"), str):
            return value
        for field, pattern in _BEHIND_SOURCE.items():
            if found := pattern.fullmatch(value["source"]):
                told = int(found["value"]) if field == "limit" else found["value"]
                if value.get(field) not in (None, told):
                    behind = value["source"].removeprefix(found["source"]).strip()
                    text = f"{value[field]}, but the source says {behind}; leave one of them out"
                    raise CrossFieldError([((field,), text)])
                value = {**value, "source": found["source"], field: told}
        return value

    @model_validator(mode="before")
    @classmethod
    def _ratios_as_split(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("split"), list | tuple):
            return value
        if value.get("split_ratios") is not None:
            raise CrossFieldError([(("split_ratios",), "`split` holds ratios too; leave one out")])
        rest = {name: given for name, given in value.items() if name != "split"}
        return {**rest, "split_ratios": value["split"]}

    @model_validator(mode="after")
    def _dealt_as_asked(self) -> Dataset:
        faults: list[Fault] = []
        if self.split_ratios is not None and not any(self.split_ratios):
            faults.append((("split_ratios",), "all are 0; give one split a part"))
        if self.split_by == "group" and self.group_column is None:
            faults.append((("group_column",), "empty, but split_by is `group`; name the column"))
        if faults:
            raise CrossFieldError(faults)
        return self


class Convert(Section):
    """HF safetensors to Megatron-Core torch_dist, and the precision test that follows."""

    on_the_fly: bool = Field(
        default=False,
        description="Training reads HF safetensors straight into its ranks and writes them "
        "straight out; no Megatron checkpoint stands between. Short: `convert: on_the_fly`.",
    )
    check: bool = Field(default=True, description="Compare HF and Megatron-Core logits in fp32.")
    tolerance: float = Field(
        default=1e-4,
        gt=0,
        description="Largest absolute logit difference that passes; fp32 sums in another order "
        "differ by about 1e-6 at logits near 1.",
    )
    tensor_model_parallel_size: tuple[int, ...] = Field(
        default=(1, 2), min_length=1, description="Tensor parallel sizes that the test runs at."
    )
    pipeline_model_parallel_size: int = Field(
        default=1, gt=0, description="Pipeline stages of the test, at each tensor parallel size."
    )
    virtual_pipeline_model_parallel_size: int = Field(
        default=1, gt=0, description="Model chunks that each pipeline stage holds in the test."
    )
    expert_model_parallel_size: int = Field(
        default=1, gt=0, description="Parts that the test deals a layer's experts into."
    )
    expert_tensor_parallel_size: int = Field(
        default=1, gt=0, description="Parts that the test cuts each expert into."
    )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Where the test runs."""
        return tuple(
            Layout(
                tensor_model_parallel_size=size,
                pipeline_model_parallel_size=self.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=self.virtual_pipeline_model_parallel_size,
                expert_model_parallel_size=self.expert_model_parallel_size,
                expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            )
            for size in self.tensor_model_parallel_size
        )

    @model_validator(mode="before")
    @classmethod
    def _in_one_word(cls, value: Any) -> Any:
        return {"on_the_fly": True} if value == "on_the_fly" else value


class Export(Section):
    """The HF checkpoint that a trained stage becomes."""

    dtype: Dtype = Field(default="bfloat16", description="Dtype of the saved weights.")
    max_shard_size: str = Field(
        default="4GB",
        pattern=r"^\d+(\.\d+)?\s*[KMG]B$",
        description="Largest safetensors file, such as 4GB.",
    )


class Serve(Section):
    """How a checkpoint is served while it is scored."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="`auto`: vLLM where it is installed, else transformers serve."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Dtype the server computes in; auto: the checkpoint's."
    )
    max_model_len: int = Field(default=8192, gt=0, description="Tokens of a request at most.")
    limit_mm_per_prompt: dict[Literal["image", "video", "audio"], int] = Field(
        default={"image": 1, "video": 0},
        description="Images, videos and audios in one prompt at most.",
    )
    enforce_eager: bool = Field(default=False, description="vLLM: skip graph capture and compile.")
    extra_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Further vLLM flags, such as {tensor-parallel-size: 2}."
    )
    host: str = Operational(default="127.0.0.1", description="Address the server listens on.")
    port: int | None = Operational(
        default=None, ge=1, le=65535, description="Port of the server; empty: any free one."
    )
    startup_timeout_s: float = Operational(
        default=900, gt=0, description="Seconds until a server that is not ready counts as failed."
    )


class Evaluate(Section):
    """One benchmark, scored through the served model's OpenAI API."""

    benchmark: BenchmarkName = Field(
        description="Name under which the score appears, e.g. holdout or MMMU_DEV_VAL."
    )
    data: str | None = Field(
        default=None, description="Dataset under `data:` whose held-out split is asked."
    )
    split: Literal["test", "val"] = Field(default="test", description="Which held-out split.")
    metric: Literal["exact_match"] = Field(default="exact_match", description="How it is scored.")
    checkpoints: tuple[StageName, ...] = Field(
        default=(),
        description="What is scored: names of train stages, or `swap` for the model before any "
        "training; empty: the last stage.",
    )
    limit: int | None = Field(default=None, gt=0, description="Samples asked at most; empty: all.")
    max_tokens: int = Field(default=64, gt=0, description="Tokens of an answer at most.")
    concurrency: int = Operational(default=16, gt=0, description="Requests in flight.")


class Recipe(Section):
    """A whole pipeline: two donors, data, stages, export, serving, benchmarks, gates."""

    name: StageName = Field(description="Name of the recipe; runs and reports carry it.")
    seed: int = Field(default=1234, ge=0, description="Seed of everything that is not a stage's.")
    model: Model = Field(description="The donors.")
    data: dict[StageName, Dataset] = Field(min_length=1, description="Datasets by name.")
    convert: Convert = Field(default_factory=Convert, description="HF to Megatron-Core.")
    train: tuple[TrainStage, ...] = Field(min_length=1, description="Stages, in their order.")
    export: Export = Field(default_factory=Export, description="Back to HF safetensors.")
    serve: Serve = Field(default_factory=Serve, description="The model server.")
    evaluate: tuple[Evaluate, ...] = Field(default=(), description="Benchmarks.")
    gates: tuple[GateText, ...] = Field(
        default=(),
        description="Conditions on scores, `[checkpoint.]benchmark.metric >= value`; a missed one "
        "ends the run with exit code 3. No checkpoint: the last one that the benchmark scores.",
    )

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        faults = [*self._train_faults(), *self._evaluate_faults(), *self._gate_faults()]
        if faults:
            raise CrossFieldError(faults)
        return self

    def _train_faults(self) -> list[Fault]:
        faults: list[Fault] = []
        names = [stage.name for stage in self.train]
        models = [stage.model for stage in self.train]
        for index, stage in enumerate(self.train):
            if stage.name in names[:index]:
                faults.append((("train", index), f"a second stage named {stage.name}; rename it"))
            if stage.name == "swap":
                text = "`swap` names the checkpoint before training; pick another name"
                faults.append((("train", index, "name"), text))
            faults += [
                (("train", index, "data"), self._no_dataset(name))
                for name in stage.data
                if name not in self.data
            ]
            faults += [(("train", index, field), text) for field, text in self._unreadable(stage)]
            if stage.model == "llm" and self.model.llm is None:
                text = "`llm` is trained, but model.llm is empty; name a donor LLM"
                faults.append((("train", index, "model"), text))
            if stage.model == "llm" and "vlm" in models[:index]:
                text = "stages with `model: llm` come before the swap; move this one to the front"
                faults.append((("train", index, "model"), text))
        return faults

    def _unreadable(self, stage: TrainStage) -> Iterable[tuple[str, str]]:
        """What a stage reads of its datasets although it is told not to be there."""
        read = {"data": "train"}
        if stage.eval_interval is not None:
            read["eval_interval"] = stage.eval_split
        for name in stage.data:
            if name not in self.data:
                continue
            kind, ratios = self.data[name].sample_type, self.data[name].split_ratios
            if kind != "chat":
                text = f"data.{name}.sample_type is {kind}, which other trainers read"
                yield "data", f"{text}; set it to chat"
            for field, split in read.items():
                if ratios and not ratios[("train", "val", "test").index(split)]:
                    found = f"data.{name}.split_ratios {list(ratios)} gives {split} nothing"
                    yield field, f"{found}, but the stage reads it; give it a part"

    def _evaluate_faults(self) -> list[Fault]:
        faults: list[Fault] = []
        names = [entry.benchmark for entry in self.evaluate]
        for index, entry in enumerate(self.evaluate):
            if entry.benchmark in names[:index]:
                text = f"a second benchmark named {entry.benchmark}; rename it"
                faults.append((("evaluate", index), text))
            if entry.benchmark in _STAGES_OF_DATA:
                text = f"`data.….{entry.benchmark}` is another stage of a dataset; rename it"
                faults.append((("evaluate", index, "benchmark"), text))
            if entry.data is None:
                text = f"empty; name a dataset under `data:` ({_listed(self.data)})"
                faults.append((("evaluate", index, "data"), text))
            elif entry.data not in self.data:
                faults.append((("evaluate", index, "data"), self._no_dataset(entry.data)))
            faults += [
                (
                    ("evaluate", index, "checkpoints"),
                    f"checkpoint {name!r} is none of {_listed(self.checkpoints)}",
                )
                for name in entry.checkpoints
                if name not in self.checkpoints
            ]
        return faults

    def _gate_faults(self) -> list[Fault]:
        faults: list[Fault] = []
        entries = {entry.benchmark: entry for entry in self.evaluate}
        for index, text in enumerate(self.gates):
            gate = parse_gate(text)
            entry = entries.get(gate.benchmark)
            where = ("gates", index)
            if entry is None:
                found = f"benchmark {gate.benchmark!r} is not under `evaluate:`"
                faults.append((where, f"gate {text!r}: {found} ({_listed(entries)}); add it"))
                continue
            if gate.metric != entry.metric:
                found = f"benchmark {gate.benchmark} gives {entry.metric}, not {gate.metric!r}"
                faults.append((where, f"gate {text!r}: {found}"))
            scored = self.scored_checkpoints(entry)
            if gate.checkpoint is not None and gate.checkpoint not in scored:
                found = f"benchmark {gate.benchmark} does not score checkpoint {gate.checkpoint!r}"
                remedy = f"it scores {_listed(scored)}; add it to its checkpoints"
                faults.append((where, f"gate {text!r}: {found}; {remedy}"))
        return faults

    def _no_dataset(self, name: str) -> str:
        return f"dataset {name!r} is not under `data:` ({_listed(self.data)})"

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of the vision-language checkpoints, in the order they come about."""
        return ("swap", *(stage.name for stage in self.train if stage.model == "vlm"))

    def scored_checkpoints(self, entry: Evaluate) -> tuple[str, ...]:
        """Names of the checkpoints that a benchmark scores: those it lists, else the last one."""
        return entry.checkpoints or self.checkpoints[-1:]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
