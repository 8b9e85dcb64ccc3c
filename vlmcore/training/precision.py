"""The precision test: HF and Megatron-Core logits on the same samples, in fp32.

Run as `torchrun -m vlmcore.training.precision --hf DIR --mcore DIR --out FILE --tp 1 2`. Samples
come from the model's own processor: text, one image, two images of different size. Positions come
from our own rule, so the test covers them too.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from vlmcore import megatron_cpu  # noqa: E402
from vlmcore.dataloading.encode import ConversationEncoder, Message  # noqa: E402
from vlmcore.families import family_of, read_config  # noqa: E402
from vlmcore.models.build import build_model, load_weights  # noqa: E402
from vlmcore.training.distributed import model_parallel, process_group  # noqa: E402
from vlmcore.weights.convert import CHECKPOINT, SIDECAR  # noqa: E402

_SIZES = {"one image": [(96, 64)], "two images": [(64, 64), (128, 32)]}


@dataclass(frozen=True)
class PrecisionResult:
    """Logit differences of one sample at one layout, over all of its tokens."""

    tensor_model_parallel_size: int
    sample: str
    num_tokens: int
    max_diff: float
    mean_diff: float
    top1_agreement: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the largest difference is within the tolerance."""
        return self.max_diff <= self.tolerance


@dataclass(frozen=True)
class _Sample:
    name: str
    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [3, 1, S]
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    token_types: Tensor  # [1, S], 1 at image placeholders

    @property
    def vision(self) -> dict[str, Tensor]:
        if self.pixel_values is None or self.image_grid_thw is None:
            return {}
        return {"pixel_values": self.pixel_values, "image_grid_thw": self.image_grid_thw}


def precision_test(
    hf_dir: Path,
    mcore_dir: Path,
    *,
    layouts: list[int],
    tolerance: float,
    round_to: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[PrecisionResult]:
    """Compares at every tensor parallel size; call inside `process_group` on every rank.

    Args:
        hf_dir: HF model folder.
        mcore_dir: Megatron model folder.
        layouts: Tensor parallel sizes.
        tolerance: Largest absolute logit difference that passes.
        round_to: Dtype that the HF folder's weights were saved in; Megatron's are rounded to it.
        seed: Of the layout's generators.
    """
    samples = list(_samples(hf_dir))
    reference = _hf_logits(hf_dir, samples)
    results = []
    for size in layouts:
        with model_parallel(tensor_model_parallel_size=size, seed=seed):
            model = build_model(
                mcore_dir / SIDECAR, tensor_model_parallel_size=size, parallel_output=False
            ).to(megatron_cpu.device())
            load_weights(model, mcore_dir / CHECKPOINT)
            model.to(round_to).to(torch.float32).eval()
            for sample, expected in zip(samples, reference, strict=True):
                found = _mcore_logits(model, sample)[..., : expected.shape[-1]]
                difference = (found - expected).abs()
                agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
                results.append(
                    PrecisionResult(
                        tensor_model_parallel_size=size,
                        sample=sample.name,
                        num_tokens=sample.input_ids.shape[1],
                        max_diff=float(difference.max()),
                        mean_diff=float(difference.mean()),
                        top1_agreement=float(agreement),
                        tolerance=tolerance,
                    )
                )
    return results


def _samples(hf_dir: Path) -> Iterator[_Sample]:
    encoder = ConversationEncoder(hf_dir, task="sft")
    yield _encode(encoder, "text", "What is 12 + 30?", [])
    if encoder.family.vision is not None:
        for name, sizes in _SIZES.items():
            images = [_pattern(width, height) for width, height in sizes]
            yield _encode(encoder, name, "<image>" * len(images) + "What is shown?", images)


def _encode(
    encoder: ConversationEncoder, name: str, question: str, images: list[Image.Image]
) -> _Sample:
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "An answer of a few tokens: 0123456789."},
    ]
    text = encoder.encode(messages, [encoder.grid(image.size) for image in images])
    pixels, grids = encoder.patches(images) if images else (None, None)
    ids = text.input_ids[None]
    return _Sample(
        name, ids, text.position_ids[:, None], pixels, grids, (ids == encoder.image_token_id).int()
    )


def _pattern(width: int, height: int) -> Image.Image:
    """An image in which no two patches are alike."""
    x = torch.arange(width).expand(height, -1)
    y = torch.arange(height)[:, None].expand(-1, width)
    channels = torch.stack([x * 7 + y * 3, x * y, 255 - x * 2 + y * 5], dim=-1) % 256
    return Image.fromarray(channels.to(torch.uint8).numpy())


@torch.no_grad()
def _hf_logits(hf_dir: Path, samples: list[_Sample]) -> list[Tensor]:
    import transformers

    family = family_of(read_config(hf_dir))
    cls = getattr(transformers, family.architecture)
    model = cls.from_pretrained(hf_dir, dtype=torch.float32).to(megatron_cpu.device()).eval()
    logits = []
    for sample in samples:
        extra: dict[str, Any] = dict(sample.vision)
        if family.vision is not None:
            extra["mm_token_type_ids"] = sample.token_types
        logits.append(model(input_ids=sample.input_ids, **extra).logits)
    return logits


@torch.no_grad()
def _mcore_logits(model: Any, sample: _Sample) -> Tensor:
    logits: Tensor = model(sample.input_ids, sample.position_ids, None, **sample.vision)
    return logits


def main() -> None:
    """Writes the results as JSON on rank 0; judging them is the caller's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="HF model folder")
    parser.add_argument("--mcore", type=Path, required=True, help="Megatron model folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="tensor parallel sizes")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--round-to", default="float32", help="dtype the HF weights are saved in")
    args = parser.parse_args()
    with process_group(num_threads=1):
        results = precision_test(
            args.hf,
            args.mcore,
            layouts=args.tp,
            tolerance=args.tolerance,
            round_to=getattr(torch, args.round_to),
        )
        if dist.get_rank() == 0:
            rows = [{**asdict(result), "passed": result.passed} for result in results]
            args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
