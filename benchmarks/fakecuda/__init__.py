"""A CUDA device made of CPU memory, where torch has none: programs run unchanged with tensors whose device is `cuda:0`.

    from benchmarks import fakecuda       # before torch, in a process of its own: torch asks for CUDA once
    fakecuda.install()
    with fakecuda.waits() as seen: ...    # what the host would have waited for, and where in the program

Values are real: each operator runs on the CPU (`fakecuda.cpp`). torch's variable-length attention is replaced by a slow
form that refuses what FlashAttention refuses. What cannot be seen here: the kernels' own rounding and speed, races
between streams, fragmentation. `benchmarks.simulate` runs on it with tensors that have no values at all.

The library is compiled by g++ at the first use (a minute) and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("fakecuda.cpp")
#: What torch.cuda is asked for and need not be done here.
_NOTHING_TO_DO = (
    "init", "_lazy_init", "synchronize", "manual_seed", "manual_seed_all", "seed_all", "empty_cache", "ipc_collect",
    "set_stream",
)  # fmt: skip


def _load() -> ctypes.CDLL:
    """The library, compiled where that was not done yet."""
    if "torch" in sys.modules:
        raise ImportError("benchmarks.fakecuda must be imported before torch, which asks for CUDA once.")
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None, "torch is installed"
    root = Path(found.origin).parent
    if not version("torch").endswith("+cpu") and list(root.glob("lib/libtorch_cuda*")):
        raise ImportError("this torch has CUDA of its own.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llm2vec-fakecuda")
    name = sha256(f"{version('torch')} {root} {SOURCE.read_text(encoding='utf-8')}".encode()).hexdigest()[:16]
    made = cache / f"{name}.so"
    if not made.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        link = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
        aside = made.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), *include, *link, "-o", str(aside)]
        subprocess.run(command, check=True)
        aside.replace(made)
    for library in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / library), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


_library = _load()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # before torch.cuda claims to be there


def install(memory: int = 80 * 10**9) -> None:
    """Make the device.

    Args:
        memory: bytes that it says it has.
    """
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name="a CUDA device made of CPU memory", total_memory=memory, major=9, minor=0, multi_processor_count=132,
        warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, gcnArchName="",
        shared_memory_per_block=49152,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "_is_compiled": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_capability": (9, 0), "get_device_properties": properties, "get_device_name": properties.name,
        "is_bf16_supported": True, "is_tf32_supported": True, "memory_stats": {}, "mem_get_info": (memory, memory),
        **dict.fromkeys(_NOTHING_TO_DO),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, _always(answer))
    cuda.memory_allocated = cuda.memory_reserved = _always_asking(torch.ops.fakecuda.memory)
    cuda.max_memory_allocated = cuda.max_memory_reserved = _always_asking(torch.ops.fakecuda.peak)
    cuda.reset_peak_memory_stats = _always_asking(torch.ops.fakecuda.reset_peak)
    cuda.set_device = _always(None)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = _always(_Stream())
    cuda.stream = cuda.StreamContext = cuda.device = cuda.device_of = _Stream
    cuda.get_rng_state = cuda.random.get_rng_state = _always_asking(torch.get_rng_state)
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    cuda.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    torch.version.cuda = "13.0"
    torch.cuda.amp.common.amp_definitely_not_available = _always(False)
    torch.backends.cuda.is_built = _always(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.Tensor.record_stream = _always(None)  # type: ignore[method-assign]
    torch.UntypedStorage.resize_ = _resized(torch.UntypedStorage.resize_)  # type: ignore[method-assign, assignment]
    torch.UntypedStorage.clone = _cloned  # type: ignore[method-assign]
    _replace_varlen()


@contextmanager
def waits() -> Iterator[list[tuple[str, str]]]:
    """Within it: what the host would have waited for the device for, and the innermost line of the project."""
    seen: list[tuple[str, str]] = []

    def note(what: bytes) -> None:
        frames = [f for f in traceback.extract_stack() if "/llm2vec/" in f.filename]
        where = "libraries"
        if frames:
            where = f"{frames[-1].filename.rpartition('/llm2vec/')[2]}:{frames[-1].lineno} {frames[-1].name}"
        seen.append((what.decode(), where))

    callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(note)
    _library.fakecuda_on_wait(callback)
    try:
        yield seen
    finally:
        _library.fakecuda_on_wait(None)


class _Stream:
    """Stands for streams, events and contexts: there is one queue, and all of it is done at once."""

    cuda_stream = stream_id = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        """The event itself."""
        return event or self

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds."""
        return 0.0

    def wait_stream(self, *_: Any) -> None:
        """Nothing to wait for."""

    wait_event = synchronize = record = wait = wait_stream


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _always_asking(ask: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *_, **__: ask()


def _resized(resize: Any) -> Callable[[Any, int], Any]:
    def of_device(storage: Any, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, size)
        torch.ops.fakecuda.resize_storage(torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage), size)
        return storage

    return of_device


def _cloned(storage: Any) -> Any:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()


# --- FlashAttention's place ---


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """What the kernel refuses, or would compute nonsense from."""
    assert q.dtype in (torch.bfloat16, torch.float16), f"half precision, not {q.dtype}"
    assert q.dtype == k.dtype == v.dtype and q.shape[1] % k.shape[1] == 0, (q.dtype, k.dtype, v.dtype, q.shape, k.shape)
    for tensor in (q, k, v):
        assert tensor.dim() == 3 and tensor.stride(-1) == 1 and tensor.is_cuda, (tensor.shape, tensor.stride())
        assert tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256, f"head size {tensor.shape[-1]}"
    for ends, longest, tensor in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert ends.dtype == torch.int32 and ends.is_cuda and ends.is_contiguous() and isinstance(longest, int)
        on_host = torch.ops.fakecuda.cpu_alias(ends)
        assert on_host[-1] == len(tensor) and on_host.diff().max() == longest, (on_host, tensor.shape, longest)


def _texts(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q, k = (torch.ops.fakecuda.cpu_alias(ends).tolist() for ends in (cu_q, cu_k))
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    n, m = scores.shape[-2:]
    return scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf) if causal else scores


def _replace_varlen() -> None:
    from torch.nn.attention import varlen

    alias: Any = torch.ops.fakecuda.cpu_alias

    def of_text(tensor: Tensor, part: slice, times: int = 1) -> Tensor:
        return tensor[part].float().transpose(0, 1).repeat_interleave(times, 0)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, is_causal: bool = False,
        scale: float | None = None, *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        _check(q, k, v, cu_q, cu_k, max_q, max_k)
        output, log_sum = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        queries, keys, values, into, sums = map(alias, (q, k, v, output, log_sum))
        times = q.shape[1] // k.shape[1]
        for rows, columns in _texts(cu_q, cu_k):
            scores = _scores(of_text(queries, rows), of_text(keys, columns, times), is_causal, scale)
            sums[:, rows] = scores.logsumexp(-1)
            into[rows] = (scores.softmax(-1) @ of_text(values, columns, times)).transpose(0, 1).to(into.dtype)
        return output, log_sum, torch.zeros(2, dtype=torch.uint64, device=q.device)

    def backward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sum: Tensor, cu_q: Tensor, cu_k: Tensor,
        max_q: int, max_k: int, is_causal: bool, rng: Tensor, scale: float | None = None, *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        _check(q, k, v, cu_q, cu_k, max_q, max_k)
        assert g.dtype == q.dtype and g.stride(-1) == 1, (g.dtype, g.stride())
        made = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        gradient, queries, keys, values, out, sums, dq, dk, dv = map(alias, (g, q, k, v, output, log_sum, *made))
        factor, times = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[1] // k.shape[1]
        for rows, columns in _texts(cu_q, cu_k):
            query, go = of_text(queries, rows), of_text(gradient, rows)
            key, value = of_text(keys, columns, times), of_text(values, columns, times)
            share = (_scores(query, key, is_causal, scale) - sums[:, rows].unsqueeze(-1)).exp()
            delta = (go * of_text(out, rows)).sum(-1, keepdim=True)
            into_scores = share * (go @ value.mT - delta) * factor
            dq[rows] = (into_scores @ key).transpose(0, 1).to(dq.dtype)
            for into, of_heads in ((dk, into_scores.mT @ query), (dv, share.mT @ go)):
                into[columns] = of_heads.transpose(0, 1).unflatten(1, (-1, times)).sum(2).to(into.dtype)
        return made

    varlen._varlen_attn.register_kernel("cuda")(forward)
    varlen._varlen_attn_backward.register_kernel("cuda")(backward)
