"""What the machine can do and what a step takes: bandwidth, peak memory, launches."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# They allocate or look at memory, and compute nothing.
_FREE = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::as_strided"}
_FREE |= {f"aten::{x}" for x in ("view", "select", "slice", "unsqueeze", "expand", "transpose")}
_FREE |= {f"aten::{x}" for x in ("t", "detach", "split", "unbind", "diagonal", "permute", "alias")}
_FREE |= {f"aten::{x}" for x in ("_unsafe_view", "squeeze", "resize_", "_reshape_alias", "numpy_T")}


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(megabytes: int = 512) -> float:
    """Bytes a second, read and written, of a copy that no cache can hold."""
    source = torch.randn(megabytes * 2**18, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(15):
        synchronize()
        start = perf_counter()
        for _ in range(5):
            target.copy_(source)
        synchronize()
        times.append((perf_counter() - start) / 5)
    return 2 * source.nbytes / median(times)


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each step, medians of rounds in which all of them take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            synchronize()
            start = perf_counter()
            step()
            synchronize()
            if turn:  # the first one warms up
                times[name].append(perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def peak_memory(step: Callable[[], object]) -> int:
    """Bytes that one call allocates at its peak, above what was allocated before."""
    step()
    if DEVICE.type == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    allocated = [
        event["args"]["Bytes"] for event in _trace(step) if event.get("name") == "[memory]"
    ]
    level = peak = 0
    for change in allocated:
        level += change
        peak = max(peak, level)
    return peak


def launches(step: Callable[[], object]) -> int:
    """Kernels on CUDA; on a CPU calls of operators that compute, not counting those they make."""
    step()
    events = _trace(step)
    if DEVICE.type == "cuda":
        return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)
    calls = [x for x in events if x.get("cat") == "cpu_op" and x["name"].startswith("aten::")]
    calls.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    leaves = [
        call
        for call, following in zip(calls, [*calls[1:], None], strict=True)
        if following is None
        or following["tid"] != call["tid"]
        or following["ts"] >= call["ts"] + call["dur"]
    ]
    return sum(call["name"] not in _FREE for call in leaves)


def _trace(step: Callable[[], object]) -> list[dict]:
    activities = [ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((event for event in events if "ts" in event), key=lambda event: event["ts"])
