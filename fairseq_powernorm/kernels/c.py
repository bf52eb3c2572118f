"""The C backend for float32 and bfloat16 on a CPU: one sweep over the rows forward, one backward (``csrc/powernorm.c``).

The library is plain C and called through ctypes, so it is tied to no version of torch. It makes no threads of its own: it
runs on the OpenMP runtime that torch has loaded, with ``torch.get_num_threads()`` threads. For the same number of
threads results are the same bit for bit; with another one, the last bit of a per-channel sum may differ.
Saved for the backward pass are ``x``, one float per row and group, and a few per channel.
"""
import ctypes
import os
from pathlib import Path
from typing import Any, List, Optional, Tuple, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import build, eager, memory, native
from .interface import Backward, BatchSpec, BatchStep, Forward, OwnStep, PowerNormSpec, StepSpec

#: number of an element type in the C code
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CPU = torch.device("cpu")
_NO_FORWARD_STEP: Tuple[Any, ...] = None, None, 0.0, 0.0, 0.0, 0.0
_NO_BACKWARD_STEP: Tuple[Any, ...] = None, 0.0, 0.0
_NO_BATCH_STEP: Tuple[Any, ...] = None, None, None, 0.0
#: what the functions of the C code return
_NO_MEMORY, _NOT_FINITE = 1, 2
_FORWARD_BATCH, _BACKWARD_BATCH, _SKIP_PADDING = 1, 2, 4

_LIBRARY = build.HERE / build.NAME
#: the C library, once it has been loaded: a ctypes.CDLL, whose functions are found when they are called
_library: Any = None
_instructions = ""
_threaded = False
_unavailable: Optional[str] = None


def _load(library: Path) -> ctypes.CDLL:
    global _instructions, _threaded
    loaded = ctypes.CDLL(str(library))
    number, size, pointer, real = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    rows: List[Any] = [pointer, size, size, size, size]
    shape: List[Any] = [number, size, size, size, number]
    loaded.pn_evaluate.argtypes = [*shape, *rows, pointer, pointer, pointer, real, pointer]
    loaded.pn_forward.argtypes = [
        *shape, *rows, *[pointer] * 5, real, real, number, *[pointer] * 6, real, real, real, real
    ]
    loaded.pn_backward.argtypes = [*shape, *rows, *rows, *[pointer] * 5, real, real, *[pointer] * 5, real, real]
    loaded.pn_batch_forward.argtypes = [*shape, *rows, *[pointer] * 5, real, number, *[pointer] * 7, real]
    loaded.pn_batch_backward.argtypes = [*shape, *rows, *rows, *[pointer] * 4, number, number, *[pointer] * 4]
    loaded.pn_batch_evaluate.argtypes = [*shape, *rows, *[pointer] * 4, real, pointer]
    loaded.pn_advance_forward.argtypes = [size, size, *[pointer] * 3, *[real] * 5]
    loaded.pn_advance_backward.argtypes = [size, size, pointer, pointer, real, real]
    loaded.pn_use_instructions.argtypes, loaded.pn_use_instructions.restype = [number], ctypes.c_char_p
    loaded.pn_stream_from.argtypes, loaded.pn_stream_from.restype = [size], size
    loaded.pn_far_from.argtypes, loaded.pn_far_from.restype = [size], size
    loaded.pn_use_threads.argtypes, loaded.pn_use_threads.restype = [pointer, pointer, pointer], None
    _instructions = loaded.pn_use_instructions(-1).decode()
    _threaded = _use_torchs_threads(loaded)
    return loaded


def _use_torchs_threads(library: ctypes.CDLL) -> bool:
    """Give the library the OpenMP runtime that torch's own code is linked to; False if there is none."""
    try:
        # looking a symbol up in torch's library finds it in what that library depends on, under whatever file name
        torchs = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"), os.RTLD_NOLOAD)
        entries = [
            ctypes.cast(getattr(torchs, name), ctypes.c_void_p)
            for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        ]
    except (OSError, AttributeError):
        return False
    library.pn_use_threads(*entries)
    return True


def unavailable() -> Optional[str]:
    """Why this kernel cannot be used on this machine; None if it can."""
    global _library, _unavailable
    if _library is None and _unavailable is None:
        if not build.is_current(_LIBRARY):
            _unavailable = build.why_missing(_LIBRARY)
        else:
            try:
                _library = _load(_LIBRARY)
            except (OSError, AttributeError) as error:
                _unavailable = f"its library does not load: {error}"
    return _unavailable


def serves(device_type: str, dtype: torch.dtype, *, asked: bool = False) -> bool:
    """Is this kernel made for tensors of that kind?"""
    return device_type == "cpu" and dtype in _DTYPES


def describe() -> str:
    """What is in use, for people."""
    return f"C ({_instructions}, {'threads of torch' if _threaded else 'one thread'}, {native.describe()})"


def use_instructions(number: int) -> str:
    """Use one of the sets of instructions that the kernel is compiled for, for tests and measurements.

    Args:
        number: from 0, the plainest, on; -1, or more than this processor has, for the best

    Returns:
        the name of the one in use
    """
    return str(_library.pn_use_instructions(number).decode())


def stream_from(size: int) -> int:
    """Store tensors of so many bytes or more past the caches, and say how many it was; for tests and measurements."""
    return int(_library.pn_stream_from(size))


def far_from(size: int) -> int:
    """Take the rows of tensors of so many bytes or more one by one, and say how many it was; for tests and measurements."""
    return int(_library.pn_far_from(size))


def autograd() -> Any:
    """The autograd function in C++ over this kernel, see :mod:`.native`; None where that in Python serves."""
    return native.extension(_library)


def _check(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("C kernel: out of memory")


def _shape(x: Tensor, groups: int) -> Tuple[int, int, int, int, int]:
    channels = x.size(-1)
    if groups < 0 or (groups > 0 and channels % groups):
        raise ValueError(f"groups={groups}: must be 0 (no layer scale) or divide the {channels} channels")
    return _DTYPES[x.dtype], x.numel() // channels if channels else 0, channels, groups, torch.get_num_threads()


def _rows(x: Tensor) -> Tuple[Tensor, int, int, int, int]:
    """The values of ``x``, and where its rows lie: ``inner``, stride of every inner-th row, of the others, of channels."""
    if not x.is_contiguous():
        if x.stride(-1) == 1 and x.dim() == 2:
            return x, 1, x.stride(0), 0, 1
        if x.stride(-1) == 1 and x.dim() == 3:
            return x, x.size(1), x.stride(0), x.stride(1), 1
        side_by_side = memory.positions(x)
        if side_by_side:
            return x, side_by_side, x.stride(0), 1, x.stride(-1)
        x = x.contiguous()
    return x, 1, x.size(-1), 0, 1


@overload
def _floats(vector: Tensor) -> Tensor: ...


@overload
def _floats(vector: None) -> None: ...


def _floats(vector: Optional[Tensor]) -> Optional[Tensor]:
    """A per-channel vector as contiguous float32."""
    if vector is None:
        return None
    if vector.dtype is not torch.float32:
        vector = vector.to(torch.float32)
    return vector if vector.is_contiguous() else vector.contiguous()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of our own: whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


def _at(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def second_moment(x: Tensor, valid: Optional[Tensor], groups: int) -> Tensor:
    """See :func:`.eager.second_moment`."""
    shape = _shape(x, groups)
    channels = shape[2]
    ones = torch.ones(channels, dtype=torch.float32, device=_CPU)
    x, *strides = _rows(x)
    saved, tally = _empty(3, channels), _empty(channels + 2, dtype=torch.float64)
    _check(_library.pn_forward(
        *shape, _at(x), *strides, _at(valid), None, None, _at(ones), None, 0.0, float("inf"), _SKIP_PADDING, None, None,
        _at(saved), _at(tally), *_NO_FORWARD_STEP,
    ))
    return tally


def power_forward(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    spec: PowerNormSpec,
    batch: Optional[Tensor] = None,
    step: Optional[OwnStep] = None,
) -> Forward:
    """See :func:`.eager.power_forward`."""
    shape = _shape(x, spec.groups)
    _, rows, channels, _, _ = shape
    weight, bias, psi2, batch = _floats(weight), _floats(bias), _floats(psi2), _floats(batch)
    y, saved = memory.empty(x), _empty(3, channels)
    r = _empty(rows, spec.groups) if spec.groups else None
    if step is None:
        tally, stepping = _empty(channels + 2, dtype=torch.float64), _NO_FORWARD_STEP
    else:
        constants = step.spec
        tally, stepping = None, (
            step.psi2.data_ptr(), step.iters.data_ptr(), constants.alpha_fwd, constants.warmup, constants.trusted_after,
            constants.jump,
        )
    flags = (
        _FORWARD_BATCH * spec.forward_batch + _BACKWARD_BATCH * spec.backward_batch + _SKIP_PADDING * spec.skip_padding
    )
    x, *strides = _rows(x)
    _check(_library.pn_forward(
        *shape, x.data_ptr(), *strides, _at(valid), _at(weight), _at(bias), psi2.data_ptr(), _at(batch), spec.eps, spec.jump,
        flags, y.data_ptr(), _at(r), saved.data_ptr(), _at(tally), *stepping,
    ))
    if step is not None:
        increment_version(step.psi2)
        increment_version(step.iters)
    return Forward(y, r, saved, tally)


def power_backward(
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    saved: Tensor,
    nu: Tensor,
    spec: PowerNormSpec,
    *,
    want_x: bool = True,
    step: Optional[OwnStep] = None,
) -> Backward:
    """See :func:`.eager.power_backward`."""
    shape = _shape(x, spec.groups)
    channels = shape[2]
    given_weight, weight, nu = weight, _floats(weight), _floats(nu)
    grad_x = memory.empty(x) if want_x else None
    grad_weight, grad_bias = _empty(channels), _empty(channels)
    if step is None:
        tally, stepping = _empty(2 * channels + 2, dtype=torch.float64), _NO_BACKWARD_STEP
    else:
        tally, stepping = None, (step.nu.data_ptr(), step.spec.nu_scale, step.spec.nu_lowest)
    scale = float(spec.gradient_scale)
    rows, *strides = _rows(x)
    grads, *grad_strides = _rows(grad_y)
    status = _library.pn_backward(
        *shape, rows.data_ptr(), *strides, grads.data_ptr(), *grad_strides, _at(r),
        _at(valid) if spec.skip_padding else None, _at(weight), saved.data_ptr(), nu.data_ptr(), scale * spec.nu_scale,
        scale, _at(grad_x), grad_weight.data_ptr(), grad_bias.data_ptr(), _at(tally), *stepping,
    )
    _check(status)
    if status == _NOT_FINITE and valid is not None and not spec.skip_padding:  # it has taken no step either
        return eager.power_backward(grad_y, x, r, given_weight, valid, saved, nu, spec, want_x=want_x, step=step)
    if step is not None:
        increment_version(step.nu)
    return Backward(grad_x, grad_weight, grad_bias, tally)


def advance_forward(tally: Tensor, psi2: Tensor, iters: Tensor, step: StepSpec) -> None:
    """See :func:`.eager.advance_forward`."""
    channels = tally.size(-1) - 2
    _library.pn_advance_forward(
        tally.numel() // (channels + 2), channels, tally.data_ptr(), psi2.data_ptr(), iters.data_ptr(), step.alpha_fwd,
        step.eps, step.warmup, step.trusted_after, step.jump,
    )
    increment_version(psi2)
    increment_version(iters)


def advance_backward(tally: Tensor, nu: Tensor, step: StepSpec) -> None:
    """See :func:`.eager.advance_backward`."""
    channels = tally.size(-1) // 2 - 1
    _library.pn_advance_backward(
        tally.numel() // (2 * channels + 2), channels, tally.data_ptr(), nu.data_ptr(), step.nu_scale, step.nu_lowest
    )
    increment_version(nu)


def evaluate(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], psi2: Optional[Tensor], groups: int, eps: float
) -> Tensor:
    """See :func:`.eager.evaluate`, but without gradient."""
    shape = _shape(x, groups)
    weight, bias, psi2 = _floats(weight), _floats(bias), _floats(psi2)
    y = memory.empty(x)
    x, *strides = _rows(x)
    _check(_library.pn_evaluate(
        *shape, x.data_ptr(), *strides, _at(weight), _at(bias), _at(psi2), eps, y.data_ptr()
    ))
    return y


# ---------------------------------------------------------------- statistics of the batch


def batch_forward(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    mean: Optional[Tensor],
    moment: Tensor,
    spec: BatchSpec,
    step: Optional[BatchStep] = None,
) -> Forward:
    """See :class:`.interface.BatchBackend`."""
    shape = _shape(x, spec.groups)
    _, rows, channels, _, _ = shape
    weight, bias, moment, mean = _floats(weight), _floats(bias), _floats(moment), _floats(mean) if spec.centre else None
    y, saved = memory.empty(x), _empty(2, channels)
    r = _empty(rows, spec.groups) if spec.groups else None
    if step is None:
        parts = 1 + spec.centre + (spec.centre and spec.fill)
        tally, stepping = _empty(parts * channels + 2, dtype=torch.float64), _NO_BATCH_STEP
    else:
        tally = None
        stepping = _at(step.mean), step.moment.data_ptr(), step.iters.data_ptr(), step.alpha_fwd
    x, *strides = _rows(x)
    _check(_library.pn_batch_forward(
        *shape, x.data_ptr(), *strides, _at(valid), _at(weight), _at(bias), _at(mean), moment.data_ptr(), spec.eps,
        spec.fill, y.data_ptr(), _at(r), saved.data_ptr(), _at(tally), *stepping,
    ))
    if step is not None:
        for each in (step.mean, step.moment, step.iters):
            if each is not None:
                increment_version(each)
    return Forward(y, r, saved, tally)


def batch_backward(
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    saved: Tensor,
    spec: BatchSpec,
    *,
    want_x: bool = True,
) -> Optional[Backward]:
    """See :class:`.interface.BatchBackend`."""
    shape = _shape(x, spec.groups)
    channels = shape[2]
    weight, grad_x = _floats(weight), memory.empty(x) if want_x else None
    grad_weight, grad_bias = _empty(channels), _empty(channels)
    tally = _empty((1 + spec.centre) * channels + 2, dtype=torch.float64)
    rows, *strides = _rows(x)
    grads, *grad_strides = _rows(grad_y)
    status = _library.pn_batch_backward(
        *shape, rows.data_ptr(), *strides, grads.data_ptr(), *grad_strides, _at(r), _at(valid), _at(weight),
        saved.data_ptr(), spec.centre, spec.fill, _at(grad_x), grad_weight.data_ptr(), grad_bias.data_ptr(),
        tally.data_ptr(),
    )
    _check(status)
    return None if status == _NOT_FINITE else Backward(grad_x, grad_weight, grad_bias, tally)


def batch_evaluate(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    mean: Tensor,
    moment: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """See :class:`.interface.BatchBackend`."""
    shape = _shape(x, groups)
    weight, bias, mean, moment = _floats(weight), _floats(bias), _floats(mean), _floats(moment)
    y = memory.empty(x)
    x, *strides = _rows(x)
    _check(_library.pn_batch_evaluate(
        *shape, x.data_ptr(), *strides, _at(weight), _at(bias), mean.data_ptr(), moment.data_ptr(), eps, y.data_ptr()
    ))
    return y
