"""Clocks of the host and of the GPU, turns of all contenders, memory: how a call is measured."""
import ctypes
import statistics
import time
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional

import torch
from torch import Tensor

#: seconds that a call takes
Measure = Callable[[Callable[[], object]], float]


def keep_memory() -> None:
    """Tell glibc to keep freed memory, from now on; elsewhere nothing is changed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


#: seconds; a longer call is not repeated untimed
QUICK = 0.2
#: of whole models, of which a norm is so small a part that few rounds do not show it
ROUNDS_OF_MODELS = 7


def clock(function: Callable[[], object]) -> float:
    """Seconds that a call takes, by the clock."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def device_clock(function: Callable[[], object]) -> float:
    """Seconds that a call takes on the GPU, its host's work included, by the clock."""
    torch.cuda.synchronize()

    def until_done() -> None:
        function()
        torch.cuda.synchronize()

    return clock(until_done)


class DeviceEvents:
    """Seconds that the GPU itself works for a call: between two events, behind other work while the host prepares it.

    That work writes more than the caches hold.
    """

    BYTES, SECONDS = 1 << 28, 0.003

    def __init__(self) -> None:
        self.other = torch.empty(self.BYTES, dtype=torch.uint8, device="cuda")
        self.times = 1
        self.times = max(1, round(self.SECONDS / min(self(self.other.zero_) for _ in range(3))))

    def __call__(self, function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.times):
            self.other.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def host_seconds(function: Callable[[], object]) -> float:
    """Seconds after which the host goes on while the GPU works on a call, median."""
    found = []
    for _ in range(11):
        torch.cuda.synchronize()
        found.append(clock(function))
    torch.cuda.synchronize()
    return statistics.median(found)


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    slow: Collection[str] = (),
    measure: Measure = clock,
    rounds: int = 5,
) -> Dict[str, List[float]]:
    """name -> times in seconds, one per round; those named in `slow` take part in the first five rounds only.

    seconds: for how long, but at least that many rounds; 0: one round. A timed call follows an untimed one, where that is
    quick: what is timed is then the state that a contender leaves to itself, not that of the one before.
    """
    for function in functions.values():
        function()
    quick = [name for name, function in functions.items() if seconds and clock(function) < QUICK]
    times: Dict[str, List[float]] = {name: [] for name in functions}
    begin, order = time.perf_counter(), list(functions)
    number = 0
    while True:
        number += 1
        for name in order:
            if number <= 5 or name not in slow:
                if name in quick:
                    functions[name]()
                times[name].append(measure(functions[name]))
        order = order[1:] + order[:1]
        if number >= rounds and time.perf_counter() - begin > seconds or not seconds:
            return times


def quartiles(values: List[float]) -> List[float]:
    """First quartile, median and third quartile."""
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def summarize(times: Dict[str, List[float]], must_move: Optional[int] = None) -> Dict[str, Dict[str, Any]]:
    """For each contender: time, ratio to LayerNorm and fraction of the bandwidth limit; medians and quartiles."""
    copy = statistics.median(times.pop("copy")) if "copy" in times else None
    found: Dict[str, Dict[str, Any]] = {}
    for name, values in times.items():
        low, middle, high = quartiles(values)
        ratios = quartiles([value / layer for value, layer in zip(values, times["layer"])])
        found[name] = {"seconds": middle, "seconds_quartiles": [low, high], "ratio": ratios[1],
                       "ratio_quartiles": [ratios[0], ratios[2]], "rounds": len(values)}
        if copy is not None and must_move is not None:
            found[name]["bandwidth_fraction"] = copy * must_move / 2 / middle
    return found


def saved_bytes(norm: Any, x: Tensor, mask: Optional[Tensor]) -> float:
    """Bytes of the storages kept for the backward pass, parameters left out, by those of x."""
    known = {p.untyped_storage().data_ptr() for p in norm.parameters()}
    kept: Dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x, mask)
    del y
    return sum(kept.values()) / (x.numel() * x.element_size())


def peak_bytes(call: Callable[[], object], x: Tensor) -> float:
    """Largest amount of memory that the call held at a time beyond what was there, by the bytes of x."""
    call()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / (x.numel() * x.element_size())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / (x.numel() * x.element_size())
