"""The precision test: HF and Megatron-Core logits on the same samples, in fp32, at many layouts.

Run on as many ranks as hold whole replicas of every layout: `torchrun -m
vlmcore.training.precision --hf DIR --mcore DIR --out FILE --layouts JSON`. Samples come from the
model's own processor, positions from our own rule, so the test covers them too. Rank 0 alone runs
the HF model and compares.

Tolerances: logits of a few units, summed in another order in fp32, differ by about 1e-6 for a tiny
model; rounding grows with width and depth, to some 1e-5 at thousands of summands. A misplaced or
wrong weight shows at 1e-2 and above, so 1e-4 parts the two.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from vlmcore import megatron_cpu  # noqa: E402
from vlmcore.errors import VlmflowError  # noqa: E402
from vlmcore.families import Family, family_of, read_config  # noqa: E402
from vlmcore.layout import Layout  # noqa: E402
from vlmcore.models.build import build_model  # noqa: E402
from vlmcore.models.fit import require_layout  # noqa: E402
from vlmcore.models.folder import load_folder  # noqa: E402
from vlmcore.training.distributed import model_parallel, process_group  # noqa: E402
from vlmcore.training.precision_samples import Sample, precision_samples  # noqa: E402
from vlmcore.training.precision_states import (  # noqa: E402
    MegatronStates,
    States,
    transformers_states,
)
from vlmcore.training.progress import report_error  # noqa: E402
from vlmcore.weights.sidecar import config_dir  # noqa: E402


@dataclass(frozen=True)
class LogitDiff:
    """Differences of logits over some tokens."""

    num_tokens: int
    max_diff: float
    mean_diff: float
    top1_agreement: float


@dataclass(frozen=True)
class PrecisionResult:
    """One sample at one layout.

    Attributes:
        all_tokens: Over the whole sample.
        loss_tokens: Over the positions that predict the answer.
        diverges_at: Where the two models part first, if they are past the tolerance.
    """

    layout: Layout
    sample: str
    all_tokens: LogitDiff
    loss_tokens: LogitDiff
    tolerance: float
    diverges_at: str | None

    @property
    def passed(self) -> bool:
        """Whether the largest difference is within the tolerance."""
        return self.all_tokens.max_diff <= self.tolerance

    def row(self) -> dict[str, Any]:
        """JSON values; the layout's sizes and the figures over all tokens stand at the top."""
        return {
            "layout": str(self.layout),
            **asdict(self.layout),
            "sample": self.sample,
            **asdict(self.all_tokens),
            "loss_tokens": asdict(self.loss_tokens),
            "tolerance": self.tolerance,
            "passed": self.passed,
            "diverges_at": self.diverges_at,
        }


def precision_test(
    hf_dir: Path,
    mcore_dir: Path,
    *,
    layouts: Sequence[Layout],
    tolerance: float,
    round_to: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[PrecisionResult]:
    """Compares at every layout; call inside `process_group` on every rank.

    Args:
        hf_dir: HF model folder.
        mcore_dir: Megatron model folder.
        layouts: Each must have whole replicas on the ranks there are.
        tolerance: Largest absolute logit difference that passes.
        round_to: Dtype that the HF folder's weights were saved in; Megatron's are rounded to it.
        seed: Of the layouts' generators.

    Returns:
        The results on rank 0; nothing on the others.

    Raises:
        TrainError: A layout does not divide the model or the ranks.
    """
    for layout in layouts:
        require_layout(config_dir(mcore_dir), layout)
    leads = dist.get_rank() == 0
    samples = _told_by_first(precision_samples(hf_dir) if leads else None)
    reference = _reference(hf_dir, samples) if leads else None
    results = []
    for layout in layouts:
        with model_parallel(layout, seed=seed):
            results += _at_layout(
                mcore_dir, layout, samples, reference, tolerance=tolerance, round_to=round_to
            )
    return results


def _at_layout(
    mcore_dir: Path,
    layout: Layout,
    samples: Sequence[Sample],
    reference: Sequence[States] | None,
    *,
    tolerance: float,
    round_to: torch.dtype,
) -> list[PrecisionResult]:
    """Every sample at one layout; results where the reference is."""
    config = read_config(config_dir(mcore_dir))
    family = family_of(config)
    chunks = _loaded(mcore_dir, layout, round_to=round_to)
    runner = MegatronStates(chunks, layout, num_layers=family.language_model(config).num_layers)
    results = []
    for i, sample in enumerate(samples):
        with runner.recorded() as found:
            logits_SV = runner.logits(sample)
        diffs = _diffs(logits_SV, reference[i], sample) if reference else None
        hidden_SH = None
        if _told_by_first(diffs is not None and not diffs[0].max_diff <= tolerance):
            hidden_SH = runner.hidden(found, sample.input_ids.shape[1])
        if reference and diffs:
            place = None
            if hidden_SH:
                place = _divergence(hidden_SH, reference[i], sample, family, tolerance)
            results.append(PrecisionResult(layout, sample.name, *diffs, tolerance, place))
    return results


def _reference(hf_dir: Path, samples: Sequence[Sample]) -> list[States]:
    """What transformers computes; the model is gone afterwards."""
    import transformers

    family = family_of(read_config(hf_dir))
    cls = getattr(transformers, family.architecture)
    model: nn.Module = cls.from_pretrained(hf_dir, dtype=torch.float32)
    model = model.to(megatron_cpu.device()).eval()
    decoder = model.get_submodule(family.text_hf_prefix.removesuffix("."))
    return [transformers_states(model, decoder, sample) for sample in samples]


def _loaded(mcore_dir: Path, layout: Layout, *, round_to: torch.dtype) -> list[MegatronModule]:
    chunks = build_model(config_dir(mcore_dir), layout=layout, parallel_output=False)
    for chunk in chunks:
        chunk.to(megatron_cpu.device()).eval()
    load_folder(chunks, mcore_dir)
    for weight in (weight for chunk in chunks for weight in chunk.parameters()):
        weight.data = weight.data.to(round_to).float()
    return chunks


def _told_by_first(value: Any) -> Any:
    """What rank 0 passes, on every rank."""
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _diffs(found_SV: Tensor, reference: States, sample: Sample) -> tuple[LogitDiff, LogitDiff]:
    """Over all tokens, and over those that predict the answer."""
    found_SV = found_SV[:, : reference.logits.shape[1]]  # Megatron pads the vocabulary
    answer = slice(sample.num_prompt_tokens - 1, -1)
    return (
        _diff(found_SV, reference.logits),
        _diff(found_SV[answer], reference.logits[answer]),
    )


def _diff(found_SV: Tensor, expected_SV: Tensor) -> LogitDiff:
    difference = (found_SV - expected_SV).abs()
    agreement = (found_SV.argmax(-1) == expected_SV.argmax(-1)).float().mean()
    return LogitDiff(
        len(found_SV), float(difference.max()), float(difference.mean()), float(agreement)
    )


def _divergence(
    hidden_SH: dict[int, Tensor],
    reference: States,
    sample: Sample,
    family: Family,
    tolerance: float,
) -> str:
    """The first stage of the model past the tolerance.

    A token's difference is told in units of its root mean square, which the next norm divides by:
    single tokens of real models are a thousand times larger than the rest.
    """
    before = 0.0
    for index, expected_SH in reference.hidden.items():
        scale_S = expected_SH.pow(2).mean(-1).sqrt().clamp(min=1e-12)
        difference_S = (hidden_SH[index] - expected_SH).abs().amax(-1) / scale_S
        largest = float(difference_S.max())
        if not largest <= tolerance:
            name = f"{family.text_hf_prefix}layers.{index - 1}"
            if index == 0:
                seen = difference_S[sample.is_placeholder]
                apart = len(seen) and not float(seen.max()) <= tolerance
                name = "vision features" if apart else "embeddings"
            return f"{name} (largest {largest:.1e}, before it at most {before:.1e})"
        before = max(before, largest)
    return f"final norm or lm_head (before it at most {before:.1e})"


def main() -> None:
    """Writes the results as JSON on rank 0; a user's error is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="HF model folder")
    parser.add_argument("--mcore", type=Path, required=True, help="Megatron model folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--layouts", type=json.loads, required=True, help="JSON list of Layouts")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--round-to", default="float32", help="dtype the HF weights are saved in")
    args = parser.parse_args()
    with process_group(num_threads=1):
        try:
            results = precision_test(
                args.hf,
                args.mcore,
                layouts=[Layout(**sizes) for sizes in args.layouts],
                tolerance=args.tolerance,
                round_to=getattr(torch, args.round_to),
            )
        except VlmflowError as error:
            report_error(str(error))
            sys.exit(2)
        if dist.get_rank() == 0:
            rows = [result.row() for result in results]
            args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
