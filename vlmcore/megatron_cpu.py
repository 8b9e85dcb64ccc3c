"""The one place where Megatron-Core is taught to run without CUDA.

`install()` does nothing where CUDA is there. Otherwise it makes the calls that Megatron-Core 0.16
sends to `torch.cuda` land on the CPU: device arguments, streams and events, RNG state, and the
places where Megatron asks a tensor for its CUDA type name. It ends when Megatron-Core takes the
device from its config instead of from `torch.cuda`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


def install() -> None:
    """Teaches this process; safe to call twice. Call before Megatron modules are built."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    # compiling Megatron's small fused functions for a CPU costs minutes and gains nothing; the
    # compiler's import alone, where Megatron asks for it, takes two seconds
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch.compile = _uncompiled  # type: ignore[assignment]
    _replace_cuda_calls()
    _replace_megatron_calls()
    _replace_collectives()
    _mode = _CudaIsCpu()
    _mode.__enter__()


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """What stands for `torch.compile`, as a decorator with options and without."""
    return function if function is not None else lambda decorated: decorated


def suspended() -> contextlib.AbstractContextManager[object]:
    """Code that is not Megatron's runs at full speed inside: `install()` slows every torch call."""
    if _mode is None:
        return contextlib.nullcontext()
    return torch._C.DisableTorchFunction()


def device() -> torch.device:
    """Where this rank's tensors live."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _names_cuda(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, int) or (isinstance(value, str) and value.startswith("cuda"))


class _CudaIsCpu(TorchFunctionMode):
    """Every torch call with a CUDA device, pinned memory or a stream runs on the CPU instead."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        if func is Tensor.record_stream:
            return None
        if func is Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is Tensor.type and len(args) == 1 and not kwargs:
            # the optimizers compare with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _Event:
    """A CUDA event where everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _Stream(_Event):
    """A CUDA stream where everything has already happened."""

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


@contextlib.contextmanager
def _same_stream(_: Any) -> Iterator[None]:
    yield


def _no_op() -> Callable[..., None]:
    """A new function that does nothing; torch's tracer wants a different one for each name."""
    return lambda *_, **__: None


def _replace_cuda_calls() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("synchronize", "empty_cache", "set_device", "set_stream"):
        setattr(cuda, name, _no_op())
    cuda.Stream, cuda.Event, cuda.stream = _Stream, _Event, _same_stream
    cuda.current_stream = lambda *_, **__: stream
    cuda.default_stream = lambda *_, **__: stream
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _no_op(), _no_op()


def _replace_megatron_calls() -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer.moe import token_dispatcher

    module: Any = tp_random
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    module = schedules  # a model asks for its device by `current_device` alone
    module.forward_step = _at_full_speed(schedules.forward_step)
    module.backward_step = _at_full_speed(schedules.backward_step)
    module = token_dispatcher
    module.maybe_move_tensor_to_cpu = _host_value
    module = mappings
    module._gather_along_first_dim = _uneven_gather(mappings._gather_along_first_dim)
    module._reduce_scatter_along_first_dim = _uneven_reduce_scatter(
        mappings._reduce_scatter_along_first_dim
    )


def _at_full_speed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return function(*args, **kwargs)

    return call


def _replace_collectives() -> None:
    """One rank alone need not wait until gloo's threads have handed it what it has."""
    from megatron.core.distributed import param_and_grad_buffer

    distributed: Any = dist
    for name in ("all_reduce", "broadcast"):
        setattr(distributed, name, _unless_alone(getattr(dist, name), _no_op()))
    buffer: Any = param_and_grad_buffer
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffer, name, _unless_alone(getattr(buffer, name), _copy_own))


def _unless_alone(collective: Callable[..., Any], alone: Callable[..., None]) -> Callable[..., Any]:
    def call(*args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        if dist.get_world_size(group) > 1:
            return collective(*args, group=group, async_op=async_op, **kwargs)
        alone(*args, **kwargs)
        return _Event() if async_op else None

    return call


def _copy_own(target: Tensor, source: Tensor, **_: Any) -> None:
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)


def _host_value(value: Any, *, as_numpy: bool = False, **_: Any) -> Any:
    """The dispatcher's split sizes, which Megatron leaves as tensors unless they come from CUDA."""
    return value.numpy() if as_numpy and isinstance(value, Tensor) else value


def _uneven_gather(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gathers parts of different length too (experts cut over ranks), which gloo does not."""

    def gather(
        part: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, *args: Any
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even(part, group, None, *args)
        padded = part.new_zeros(max(output_split_sizes), *part.shape[1:])
        padded[: len(part)] = part
        whole = even(padded, group).split(len(padded))
        return torch.cat([x[:size] for x, size in zip(whole, output_split_sizes, strict=True)])

    return gather


def _uneven_reduce_scatter(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reverse: each rank gets the sum of its part, whatever its length."""

    def reduce_scatter(
        whole: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, *args: Any
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even(whole, group, None, *args)
        longest = max(input_split_sizes)
        padded = whole.new_zeros(group.size(), longest, *whole.shape[1:])
        for i, part in enumerate(whole.split(list(input_split_sizes))):
            padded[i, : len(part)] = part
        mine: Tensor = even(padded.flatten(0, 1), group)
        return mine[: input_split_sizes[group.rank()]]

    return reduce_scatter
