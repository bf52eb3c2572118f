"""The C kernel for float32 and bfloat16 on a CPU: one sweep over the rows forward, one backward (``csrc/powernorm.c``).

The library is plain C and called through ctypes, so it is tied to no version of torch. It makes no threads of its own: it
runs on the OpenMP runtime that torch has loaded, with ``torch.get_num_threads()`` threads. For the same number of
threads results are the same bit for bit; with another one, the last bit of a per-channel sum may differ.
Saved for the backward pass are ``x``, one float per row and group, and a few per channel.
"""
import ctypes
import os
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import build
from .reference import Backward, Forward, OwnStep, PowerNormSpec

#: number of an element type in the C code
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
#: a norm with float32 statistics may leave their step to this kernel
TAKES_STEPS = True
_NO_STEP = (None, None, 0.0, 0.0, 0.0)
_FORWARD_BATCH, _BACKWARD_BATCH, _SKIP_PADDING = 1, 2, 4

_LIBRARY = build.HERE / build.NAME
_library: Optional[ctypes.CDLL] = None
_instructions = ""
_threaded = False
_unavailable: Optional[str] = None


def _load(library) -> ctypes.CDLL:
    global _instructions, _threaded
    loaded = ctypes.CDLL(str(library))
    number, size, pointer, real = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    rows = [pointer, size, size, size]
    shape = [number, size, size, size, number]
    loaded.pn_evaluate.argtypes = [*shape, *rows, pointer, pointer, pointer, real, pointer]
    loaded.pn_forward.argtypes = [
        *shape, *rows, *[pointer] * 5, real, real, number, *[pointer] * 6, real, real, real
    ]
    loaded.pn_backward.argtypes = [
        *shape, *rows, *rows, *[pointer] * 5, real, real, *[pointer] * 5, real, real
    ]
    loaded.pn_use_instructions.argtypes, loaded.pn_use_instructions.restype = [number], ctypes.c_char_p
    loaded.pn_stream_from.argtypes, loaded.pn_stream_from.restype = [size], None
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
            _unavailable = build.why_missing()
        else:
            try:
                _library = _load(_LIBRARY)
            except (OSError, AttributeError) as error:
                _unavailable = f"its library does not load: {error}"
    return _unavailable


def serves(device_type: str, dtype: torch.dtype, asked: bool = False) -> bool:
    """Is this kernel made for tensors of that kind?"""
    return device_type == "cpu" and dtype in _DTYPES


def describe() -> str:
    """What is in use, for people."""
    return f"C ({_instructions}, {'threads of torch' if _threaded else 'one thread'})"


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("C kernel: out of memory")


def _shape(x: Tensor, groups: int) -> Tuple[int, int, int, int, int]:
    channels = x.size(-1)
    return _DTYPES[x.dtype], x.numel() // channels if channels else 0, channels, groups, torch.get_num_threads()


def _rows(x: Tensor) -> Tuple[Tensor, int, int, int]:
    """A tensor of the values of ``x``, and where its rows lie: ``inner``, stride of every inner-th row, stride of the others."""
    if not x.is_contiguous():
        if x.stride(-1) == 1 and x.dim() == 2:
            return x, 1, x.stride(0), 0
        if x.stride(-1) == 1 and x.dim() == 3:
            return x, x.size(1), x.stride(0), x.stride(1)
        x = x.contiguous()
    return x, 1, x.size(-1), 0


def _floats(vector: Optional[Tensor], channels: int) -> Optional[Tensor]:
    """``vector`` (``C``) as contiguous float32 on the CPU."""
    if vector is None:
        return None
    if vector.numel() != channels or not vector.is_cpu:
        raise ValueError(
            f"per-channel tensor of shape {tuple(vector.shape)} on {vector.device}: expected {channels} values on cpu"
        )
    if vector.dtype is not torch.float32:
        vector = vector.float()
    return vector if vector.is_contiguous() else vector.contiguous()


def _like(x: Tensor) -> Tensor:
    """Contiguous memory for the values of ``x``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _at(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _mask(valid: Optional[Tensor], rows: int) -> Optional[Tensor]:
    if valid is None:
        return None
    if valid.dtype is not torch.bool or valid.numel() != rows or not valid.is_cpu:
        raise ValueError(f"mask of shape {tuple(valid.shape)}, {valid.dtype} on {valid.device}: expected {rows} bool on cpu")
    return valid if valid.is_contiguous() else valid.contiguous()


def second_moment(x: Tensor, valid: Optional[Tensor], groups: int) -> Tensor:
    """See :func:`.reference.second_moment`."""
    shape = _shape(x, groups)
    ones = torch.ones(shape[2])
    x, *strides = _rows(x)
    valid = _mask(valid, shape[1])
    saved, tally = torch.empty(3, shape[2]), torch.empty(shape[2] + 2, dtype=torch.float64)
    _check(_library.pn_forward(
        *shape, _at(x), *strides, _at(valid), None, None, _at(ones), None, 0.0, float("inf"), _SKIP_PADDING, None, None,
        _at(saved), _at(tally), *_NO_STEP,
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
    """See :func:`.reference.power_forward`; takes the step ``step``, if there is one, and gives no tally then."""
    shape = _shape(x, spec.groups)
    rows, channels = shape[1:3]
    weight, bias = _floats(weight, channels), _floats(bias, channels)
    psi2, batch = _floats(psi2, channels), _floats(batch, channels)
    valid = _mask(valid, rows)
    y = _like(x)
    r = torch.empty(rows, spec.groups) if spec.groups else None
    saved = torch.empty(3, channels)
    if step is None:
        tally, stepping = torch.empty(channels + 2, dtype=torch.float64), _NO_STEP
    else:
        tally, stepping = None, (step.psi2.data_ptr(), step.iters.data_ptr(), step.alpha, step.limit, step.share)
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
    want_x: bool = True,
    step: Optional[OwnStep] = None,
) -> Backward:
    """See :func:`.reference.power_backward`; takes the step ``step``, if there is one, and gives no tally then."""
    shape = _shape(x, spec.groups)
    rows, channels = shape[1:3]
    weight, nu = _floats(weight, channels), _floats(nu, channels)
    valid = _mask(valid, rows) if spec.skip_padding else None
    grad_x = _like(x) if want_x else None
    grad_weight, grad_bias = torch.empty(channels), torch.empty(channels)
    if step is None:
        tally, stepping = torch.empty(2 * channels + 2, dtype=torch.float64), (None, 0.0, 0.0)
    else:
        tally, stepping = None, (step.nu.data_ptr(), step.nu_scale, step.nu_lowest)
    scale = float(spec.gradient_scale)
    x, *strides = _rows(x)
    grad_y, *grad_strides = _rows(grad_y)
    _check(_library.pn_backward(
        *shape, x.data_ptr(), *strides, grad_y.data_ptr(), *grad_strides, _at(r), _at(valid), _at(weight),
        saved.data_ptr(), nu.data_ptr(), scale * spec.nu_scale, scale, _at(grad_x), grad_weight.data_ptr(),
        grad_bias.data_ptr(), _at(tally), *stepping,
    ))
    if step is not None:
        increment_version(step.nu)
    return Backward(grad_x, grad_weight, grad_bias, tally)


def evaluate(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], psi2: Optional[Tensor], groups: int, eps: float
) -> Tensor:
    """See :func:`.reference.evaluate`, but without gradient."""
    shape = _shape(x, groups)
    weight, bias, psi2 = _floats(weight, shape[2]), _floats(bias, shape[2]), _floats(psi2, shape[2])
    y = _like(x)
    x, *strides = _rows(x)
    _check(_library.pn_evaluate(
        *shape, x.data_ptr(), *strides, _at(weight), _at(bias), _at(psi2), eps, y.data_ptr()
    ))
    return y
