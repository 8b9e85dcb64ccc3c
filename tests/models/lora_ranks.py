"""On every rank: adapters of several models at several layouts; arguments: cases, results.

Each case: base, adapter, the sample's place among the precision samples, the reference of peft on
transformers (logits, and the weights that make the loss a number), layouts, a folder for results.
Every layout loads the adapter from peft's folder and from what the layout before saved.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from peft import LoraConfig
from torch import Tensor

from vlmcore.errors import TrainError
from vlmcore.families import family_of, read_config
from vlmcore.layout import Layout
from vlmcore.models.build import build_model
from vlmcore.models.direct import load_hf_weights
from vlmcore.models.lora import apply_lora, load_adapter, save_adapter
from vlmcore.training.distributed import model_parallel, process_group
from vlmcore.training.precision_samples import Sample, precision_samples
from vlmcore.training.precision_states import MegatronStates
from vlmcore.weights.adapter_plan import plan_adapters
from vlmcore.weights.adapters import FreshAdapter, McoreAdapter, PeftAdapter


def adapters_of(chunks: list) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": parameter
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
        if ".adapter." in name
    }


def backward(chunk: torch.nn.Module, sample: Sample, weights_SV: Tensor, layout: Layout) -> None:
    """Gradients of Σ logits · weights, the same number on each rank."""
    num_tokens, vocabulary = weights_SV.shape
    padding = -num_tokens % layout.tensor_model_parallel_size
    ids = torch.nn.functional.pad(sample.input_ids, (0, padding))
    positions = torch.nn.functional.pad(sample.position_ids, (0, padding))
    logits = chunk(ids, positions, None, **sample.vision_inputs)
    (logits[0, :num_tokens, :vocabulary] * weights_SV).sum().backward()


def whole_gradient(parameter: Tensor, layout: Layout) -> Tensor:
    """What Megatron's reductions leave of a gradient, for one sample seen by every rank."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    if not getattr(
        parameter, "allreduce", True
    ):  # an expert gets the tokens of all ranks around it
        seen_by = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
        gradient /= seen_by / (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)
    return gradient


def run(case: dict, layout: Layout, out: Path, before: Path | None) -> dict:
    base = Path(case["base"])
    sample = precision_samples(base)[case["sample"]]
    reference = torch.load(case["reference"])
    chunks = build_model(base, layout=layout, parallel_output=False)
    load_hf_weights(chunks, base)
    source = PeftAdapter(base, Path(case["adapter"]))
    apply_lora(chunks, source.plan)
    if before is not None:
        load_adapter(chunks, McoreAdapter(base, before))
    resharded = {name: parameter.clone() for name, parameter in adapters_of(chunks).items()}
    load_adapter(chunks, source)
    adapters = adapters_of(chunks)
    same = before is None or all(torch.equal(adapters[name], resharded[name]) for name in adapters)
    trainable = {
        f"{i}.{name}"
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }
    config = read_config(base)
    num_layers = family_of(config).language_model(config).num_layers
    for chunk in chunks:
        chunk.eval()
    logits = MegatronStates(chunks, layout, num_layers=num_layers).logits(sample)
    logits = logits[:, : reference["logits"].shape[-1]]
    save_adapter(chunks, source.plan, out / "saved")
    if layout.pipeline_model_parallel_size == 1:
        backward(chunks[0], sample, reference["weights"], layout)
        with torch.no_grad():
            for parameter in adapters.values():
                parameter.copy_(whole_gradient(parameter, layout))
        save_adapter(chunks, source.plan, out / "gradients")
    load_adapter(chunks, FreshAdapter(source.plan, seed=0))
    save_adapter(chunks, source.plan, out / "fresh")
    return {
        "max_diff": float((logits - reference["logits"]).abs().max()),
        "resharded": same,
        "only_adapters_train": trainable == set(adapters),
        "adapters_here": len(adapters),
    }


def refusal(base: Path, layout: Layout, **config: object) -> str:
    """What is said of an adapter that Megatron's ranks cannot hold."""
    with model_parallel(layout, seed=0):
        try:
            apply_lora(build_model(base, layout=layout), plan_adapters(base, LoraConfig(**config)))
        except TrainError as error:
            return str(error)
    return "taken"


def main(cases: str, results: str) -> None:
    found: dict = {}
    with process_group(num_threads=1):
        for name, case in json.loads(Path(cases).read_text()).items():
            before = None
            for sizes in case["layouts"]:
                layout = Layout(**sizes)
                out = Path(case["out"]) / str(layout)
                with model_parallel(layout, seed=0):
                    found[f"{name} {layout}"] = run(case, layout, out, before)
                    dist.barrier()
                before = out / "saved"
        base = Path(case["base"])  # the last case's, with two kv heads
        refused = [
            refusal(base, Layout(tensor_model_parallel_size=4), target_modules=["k_proj"]),
            refusal(base, Layout(), target_modules=["lm_head"]),
            refusal(base, Layout(), target_modules=["k_proj"], lora_dropout=0.1),
        ]
        found = {"layouts": found, "refused": refused}
        if dist.get_rank() == 0:
            Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
