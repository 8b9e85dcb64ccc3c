"""EvalScope's native path through the OpenAI API, with our benchmark adapter; imports EvalScope."""

from __future__ import annotations

import json
from typing import Any

from evalscope import TaskConfig, run_task
from evalscope.api.benchmark import BenchmarkMeta, VisionLanguageAdapter
from evalscope.api.dataset import Sample
from evalscope.api.messages import ChatMessageUser, ContentImage, ContentText
from evalscope.api.registry import register_benchmark
from evalscope.constants import EvalType, Tags

from vlmcore.evaluation.job import Answer, Job, Result

REQUEST_TIMEOUT_S = 300
RETRIES = 2
MODEL_ID = "model"  # only names folders: the model that is asked may have a path for a name
# EvalScope turns a request that the server refuses for its length or content into an answer
REFUSED = {"model_length", "content_filter"}


class LocalRecords(VisionLanguageAdapter):
    """One image and one question a sample, read from the JSONL file that `dataset_id` names."""

    def load_from_disk(self, **kwargs: Any) -> Any:
        """The file itself, not a dataset of a hub that lies on the disk."""
        return super().load_from_disk(use_local_loader=True)

    def record_to_sample(self, record: dict[str, Any]) -> Sample:
        """The image first, then the question, as training conversations have it."""
        content = [ContentImage(image=record["image"]), ContentText(text=record["question"])]
        return Sample(
            input=[ChatMessageUser(content=content)],
            target=record["answer"],
            metadata={"id": record["id"]},
        )


def run(job: Job) -> Result:
    """Ask every record; an exception of EvalScope's at the first one that fails for good."""
    meta = BenchmarkMeta(
        name=job.benchmark,
        pretty_name=job.benchmark,
        description=f"Records of {job.records}",
        dataset_id=str(job.records),
        tags=[Tags.QA, Tags.MULTI_MODAL],
        metric_list=[job.metric],
        eval_split="test",
    )
    register_benchmark(meta)(LocalRecords)
    report = run_task(_task_config(job))[job.benchmark]
    summary = report.execution_summary
    refused = _refused(job)
    return Result(
        metrics={_plain(metric.name): metric.score for metric in report.metrics},
        num_samples=summary.requested,
        errored=summary.requested - summary.succeeded + len(refused),
        answers=[answer for answer in _answers(job) if answer.id not in refused],
    )


def _task_config(job: Job) -> TaskConfig:
    return TaskConfig(
        model=job.model_name,
        model_id=MODEL_ID,
        api_url=job.base_url,
        api_key="EMPTY",
        eval_type=EvalType.OPENAI_API,
        datasets=[job.benchmark],
        eval_batch_size=job.concurrency,
        generation_config={
            "max_tokens": job.max_tokens,
            "temperature": 0.0,
            "timeout": REQUEST_TIMEOUT_S,
            "retries": RETRIES,
            "retry_interval": 1,
        },
        work_dir=str(job.work_dir),
        no_timestamp=True,
    )


def _plain(metric: str) -> str:
    """`exact_match` of EvalScope's `exact_match:mean`."""
    return metric.partition(":")[0]


def _answers(job: Job) -> list[Answer]:
    answers = []
    for row in _rows(job, "reviews"):
        score = row["sample_score"]["score"]
        answers.append(
            Answer(
                id=row["sample_score"]["sample_metadata"]["id"],
                prediction=score["prediction"],
                correct=score["value"][job.metric] == 1,
            )
        )
    return answers


def _refused(job: Job) -> set[str]:
    return {
        row["metadata"]["id"]
        for row in _rows(job, "predictions")
        if row["model_output"]["choices"][0]["stop_reason"] in REFUSED
    }


def _rows(job: Job, kind: str) -> list[dict[str, Any]]:
    """Rows that EvalScope wrote for this benchmark: `reviews` (scores) or `predictions`."""
    files = (job.work_dir / kind / MODEL_ID).glob(f"{job.benchmark}_*.jsonl")
    return [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
