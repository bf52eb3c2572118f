"""Built, moved, copied, saved, averaged, shared: statistics are float32 or wider, never lost and never uninitialized."""
import copy
import inspect
import io
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from norm_cases import ALL, CASES, REQUIRED, C, assert_all_close, batch, make, new, train
from torch import nn
from torch.nn.utils import parametrize, prune

from fairseq_powernorm.fold import unfoldable
from fairseq_powernorm.norms import NORMS, RunningNorm, norm_options
from fairseq_powernorm.statistics import RunningStatistics

NARROW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("default", [*NARROW, torch.float32, torch.float64])
@pytest.mark.parametrize("name, variant", CASES)
def test_statistics_are_wide_whatever_the_default(name, variant, default):
    """Built under another default dtype: parameters follow it, statistics are float32 or wider and exact at the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        norm = new(name)
    finally:
        torch.set_default_dtype(before)
    assert norm.weight.dtype == default
    for key, buffer in norm.named_buffers():
        assert buffer.dtype == torch.promote_types(default, torch.float32)
        assert (buffer == norm.STATISTICS.get(key, 0.0)).all()


CASTS = {
    "half": lambda norm: norm.half(),
    "bfloat16": lambda norm: norm.bfloat16(),
    "to": lambda norm: norm.to(torch.float16),
    "type": lambda norm: norm.type(torch.bfloat16),
    "parent": lambda norm: nn.Sequential(norm).half()[0],
    "assigned": lambda norm: [setattr(norm, k, b.half()) for k, b in dict(norm.named_buffers()).items()],
    "data": lambda norm: [setattr(b, "data", b.data.half()) for b in norm.buffers()],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name, variant", CASES)
def test_narrow_copies_of_statistics_are_widened(name, variant, cast):
    """However a norm is made narrower, the next step is taken in float32; a module's own cast keeps every bit."""
    norm, plain = make(name, variant), make(name, variant)
    CASTS[cast](norm)
    if cast in ("half", "bfloat16", "to", "type", "parent"):
        assert all(torch.equal(one, other) for one, other in zip(norm.buffers(), plain.buffers()))
    norm.float()
    tolerance = 1e-2 if cast in ("bfloat16", "type") else 1e-3  # as weight, or the statistics, have been rounded
    train(norm, steps=1)
    for one, other in zip(norm.buffers(), train(plain, steps=1)[-len(list(plain.buffers())):]):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("name, variant", CASES)
def test_loading_takes_the_values_of_the_file(name, variant, dtype, assign):
    """A checkpoint in any dtype: its values arrive, widened where it is narrower than float32."""
    norm = make(name, variant)
    saved = {key: (value * 2).round() for key, value in norm.state_dict().items()}
    kept = dict(norm.named_parameters()) if dtype is torch.int64 else ()  # torch has no gradients of integers
    saved = {key: value if key in kept else value.to(dtype) for key, value in saved.items()}
    norm = new(name, variant)
    assert norm.load_state_dict(saved, assign=assign) == ([], [])
    for key, buffer in norm.named_buffers():
        assert buffer.dtype in (torch.float32, torch.float64) and torch.equal(buffer.double(), saved[key].double())


@pytest.mark.parametrize("name, variant", CASES)
def test_statistics_have_no_gradient(name, variant):
    """Loaded with assign=True from parameters, as another package may keep them: they stay buffers, and train as such."""
    norm = make(name, variant)
    expected, state = train(copy.deepcopy(norm)), {key: value.clone() for key, value in norm.state_dict().items()}
    norm.load_state_dict({key: nn.Parameter(value) for key, value in state.items()}, assign=True)
    for one, other in zip(train(norm), expected):
        assert torch.equal(one, other)
    assert not any(buffer.requires_grad for buffer in norm.buffers())


def materialized(norm, how):
    if how == "to_empty":
        return norm.to_empty(device="cpu")
    if how == "parent":
        return nn.Sequential(nn.Linear(2, 2, device="meta"), norm).to_empty(device="cpu")[1]
    return norm._apply(lambda tensor: torch.full_like(tensor, torch.nan, device="cpu"))


@pytest.mark.parametrize("how", ["to_empty", "parent", "apply"])
@pytest.mark.parametrize("name, variant", ALL)
def test_built_on_the_meta_device(name, variant, how):
    """Memory given after construction on the meta device holds no NaN in a statistic, and reset_parameters sets the rest."""
    with torch.device("meta"):
        norm = new(name, variant)
    norm = materialized(norm, how)
    fresh = new(name, variant)
    for one, other in zip(norm.buffers(), fresh.buffers()):
        assert torch.equal(one, other)
    norm.reset_parameters()
    for key, value in fresh.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value), key


@pytest.mark.parametrize("name, variant", CASES)
def test_resets(name, variant):
    """reset_running_stats gives a norm whose next steps are a new one's; reset_parameters sets weight and bias, too."""
    norm = make(name, variant)
    train(norm, steps=2)
    weight = norm.weight.detach().clone()
    norm.reset_running_stats()
    assert torch.equal(norm.weight, weight) and norm.steps() == 0
    norm.zero_grad()
    norm.reset_parameters()
    fresh = new(name, variant, groups=2)
    assert all(torch.equal(one, other) for one, other in zip(train(norm), train(fresh)))


def copies(norm):
    """Name -> a copy of the norm by every way that people copy modules."""
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    yield "deepcopy", copy.deepcopy(norm)
    yield "pickle", pickle.loads(pickle.dumps(norm))
    yield "torch.save", torch.load(buffer, weights_only=False)
    averaged = torch.optim.swa_utils.AveragedModel(norm, use_buffers=True)
    averaged.update_parameters(norm)
    yield "average", averaged.module
    restored = copy.deepcopy(norm)
    restored.reset_parameters()
    restored.load_state_dict(norm.state_dict())
    yield "state_dict", restored


@pytest.mark.parametrize("name, variant", CASES)
def test_copies_go_on_alone(name, variant):
    """A copy trains as the original does, and shares no memory with it."""
    norm = make(name, variant)
    train(norm, steps=2)
    norm.zero_grad()
    made = dict(copies(norm))
    expected = train(norm, first=2)
    for way, twin in made.items():
        twin.zero_grad()
        assert all(torch.equal(one, other) for one, other in zip(train(twin, first=2), expected)), way
        assert not {b.data_ptr() for b in twin.buffers()} & {b.data_ptr() for b in norm.buffers()}


@pytest.mark.parametrize("name, variant", CASES)
def test_inference_mode(name, variant):
    """Built, evaluated or moved under inference_mode, a norm trains afterwards as any other does."""
    expected = train(make(name, variant))
    with torch.inference_mode():
        norm = make(name, variant)
        norm.eval()(batch()[0], batch()[2])
    assert all(torch.equal(one, other) for one, other in zip(train(norm), expected))
    norm = make(name, variant)
    with torch.inference_mode():
        for key, buffer in dict(norm.named_buffers()).items():
            setattr(norm, key, buffer.clone())
    assert all(torch.equal(one, other) for one, other in zip(train(norm), expected))


@pytest.mark.parametrize("name, variant", CASES)
def test_statistics_estimated_under_inference_mode(name, variant):
    """A training pass under inference_mode or no_grad takes the same step of the forward statistics."""
    norms = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        norm = make(name, variant).train()
        with context():
            norm(*batch()[::2])
        norms.append(norm)
    for norm in norms[1:]:
        assert all(torch.equal(one, other) for one, other in zip(norm.buffers(), norms[0].buffers()))


@pytest.mark.parametrize("name, variant", CASES)
def test_shared_memory(name, variant):
    """A step taken by somebody else in shared memory, as other processes do, is seen by the next pass."""
    expected = train(make(name, variant, warmup_updates=3), steps=4)
    norm = make(name, variant, warmup_updates=3).share_memory()
    other = make(name, variant, warmup_updates=3)
    for key, buffer in list(norm.named_buffers()):
        setattr(other, key, torch.empty(0).set_(buffer.untyped_storage(), 0, buffer.shape))  # no common version counter
    train(other, steps=2)
    found = train(norm, steps=2, first=2)
    count = len(list(norm.buffers()))
    assert_all_close(found[-count:], expected[-count:])


@pytest.mark.parametrize("name, variant", CASES)
def test_batch_first_everywhere(name, variant):
    """batch_first is the same norm on the transposed input; with B = T the mask is not ambiguous."""
    norm, twin = make(name, variant), make(name, variant, batch_first=True)
    x, dy, mask = batch()
    x, dy, mask = x[:3], dy[:3], mask[:, :3]
    found = []
    for each, transpose in ((norm, False), (twin, True)):
        leaf = x.clone().requires_grad_()
        y = each(leaf.transpose(0, 1) if transpose else leaf, mask)
        y = y.transpose(0, 1) if transpose else y
        y.backward(dy)
        found.append([y, leaf.grad, *each.buffers()])
    assert_all_close(*found)


@pytest.mark.parametrize("name", NORMS)
def test_batch_first_is_an_option_of_every_norm(name):
    """build_norm takes it for all of them, and a mask of the other layout is refused."""
    norm = new(name, batch_first=True)
    with pytest.raises(ValueError, match=r"padding_mask of shape \(5, 3\): expected \(3, 5\)"):
        norm(torch.randn(3, 5, C), torch.zeros(5, 3, dtype=torch.bool))


@pytest.mark.parametrize("name, variant", ALL)
def test_device_and_dtype_of_the_constructor(name, variant):
    """As in torch's modules: skip_init works, parameters have the dtype, statistics are wide."""
    options = {**REQUIRED.get(name, {}), **({"variant": variant} if variant else {})}
    norm = new(name, variant, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in norm.parameters())
    assert all(b.is_meta and b.dtype == torch.float32 for b in norm.buffers())
    made = nn.utils.skip_init(NORMS[name], C, dtype=torch.float64, **options)
    assert all(p.dtype == torch.float64 and not p.is_meta for p in made.parameters())


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("name, variant", CASES)
def test_without_weight_or_without_bias(name, variant, missing):
    """One of the two parameters set to None is as if it were 1 or 0 and not trained."""
    norm, other = make(name, variant), make(name, variant)
    setattr(norm, missing, None)
    with torch.no_grad():
        getattr(other, missing).fill_(1.0 if missing == "weight" else 0.0)
    getattr(other, missing).requires_grad_(False)
    keep = "bias" if missing == "weight" else "weight"
    results = []
    for each in (norm, other):
        found = train(each)
        results.append([*found[:7], getattr(each, keep).grad, *each.buffers(), *each.scale_and_shift()])
    assert_all_close(*results)
    norm.reset_parameters()


@pytest.mark.parametrize("name, variant", CASES)
def test_symbolic_tracing_takes_a_norm_as_a_whole(name, variant):
    """torch.fx: the traced model calls the norm, training and statistics included."""
    model = nn.Sequential(nn.Linear(C, C), make(name, variant))
    traced = torch.fx.symbolic_trace(model)
    x = batch()[0]
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    twin = copy.deepcopy(model)
    assert torch.equal(traced(x), twin(x)) and torch.equal(traced.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("name, variant", CASES)
def test_tensors_that_are_no_dense_rows_are_refused(name, variant):
    """Nested and sparse input: a ValueError that says what is expected."""
    norm = make(name, variant)
    for x in (torch.nested.nested_tensor([torch.ones(2, C), torch.ones(2, C)]), torch.ones(3, C).to_sparse()):
        for training in (True, False):
            with pytest.raises(ValueError, match="expected a dense"):
                norm.train(training)(x)


@pytest.mark.parametrize("garbage", [0.0, -1.0, 1e-41, torch.nan, torch.inf, -1.6e18, 0.5])
@pytest.mark.parametrize("name, variant", CASES)
def test_statistics_that_a_loader_left_without_a_value(name, variant, garbage, caplog):
    """Set in place of meta tensors: what can be no value begins as in a new norm, with a warning; values stay."""
    filled = make(name, variant)
    train(filled, steps=2)
    for present in (None, *filled.STATISTICS):
        norm = make(name, variant).to("meta")
        for key, parameter in filled.named_parameters():
            setattr(norm, key, parameter)
        for key, buffer in filled.named_buffers():
            value = buffer.clone() if key == present else torch.full_like(buffer, garbage)
            if key == present:  # as Hugging Face's loading does
                value._is_hf_initialized = True
            setattr(norm, key, value)
        norm.eval()(batch()[0])
        for key, buffer in norm.named_buffers():
            start = norm.STATISTICS.get(key, 0.0)
            if key == present:
                assert torch.equal(buffer, getattr(filled, key))
            elif key == "iters" or garbage not in (0.0, 0.5) or (start == 1.0 and garbage == 0.0):
                assert (buffer == start).all(), key
            assert torch.isfinite(buffer).all()
    assert "has no value yet" in caplog.text or garbage in (0.0, 1e-41)


@pytest.mark.parametrize("name, variant", CASES)
def test_what_a_checkpoint_lacks_begins_as_in_a_new_norm(name, variant):
    """A loader that marks what the checkpoint had (here ``weight``) and puts memory in place of the rest: whatever stands
    there, were it a value, each of the rest begins as in a new norm, before any pass.
    """
    norm, new = make(name, variant).to("meta"), make(name, variant)
    new.reset_parameters()
    loaded = torch.nn.Parameter(torch.full((C,), 3.0))
    loaded._is_hf_initialized = True
    norm.weight = loaded
    for key, value in [*new.named_parameters(), *new.named_buffers()]:
        if key != "weight":
            left = torch.full_like(value, 7.0)
            setattr(norm, key, torch.nn.Parameter(left) if isinstance(value, torch.nn.Parameter) else left)
    assert torch.equal(norm.weight, loaded)
    for key, value in new.state_dict().items():
        if key != "weight":
            assert torch.equal(norm.state_dict()[key], value), key


COUNTS = {"warmup_updates", "rescale_after", "r_updates", "d_updates", "total_updates", "window", "groups"}


@pytest.mark.parametrize("value", [float("nan"), 1.5, -1, True, 10**20])
@pytest.mark.parametrize("name, option", [(n, o) for n in NORMS for o in norm_options(n) if o in COUNTS])
def test_what_is_no_count_is_refused(name, option, value):
    """By the class as well, which nobody has checked the types for: no comparison with it would ever be true."""
    with pytest.raises(ValueError, match=re.escape(f"{option}={value!r}: must")):
        NORMS[name](C, **{**REQUIRED.get(name, {}), option: value})


@pytest.mark.parametrize("value", ["false", 0, 1.0, None])
@pytest.mark.parametrize("name", NORMS)
def test_what_is_no_flag_is_refused(name, value):
    """Text that says "false" would count as true."""
    defaults = {key: each.default for key, each in inspect.signature(NORMS[name].__init__).parameters.items()}
    flags = [key for key, default in defaults.items() if isinstance(default, bool)]
    assert "batch_first" in flags and ("affine" in flags or name == "ada")
    for option in flags:
        with pytest.raises(ValueError, match=re.escape(f"{option}={value!r}: must be True or False")):
            NORMS[name](C, **{**REQUIRED.get(name, {}), option: value})


@pytest.mark.parametrize("name", NORMS)
def test_settings_that_are_set_later_are_checked(name):
    """As those of the constructor are: what is refused leaves the old value, and no kernel ever sees it."""
    norm = new(name)
    options = {*norm.CHECKS, *COUNTS, "variant"} & vars(norm).keys()
    assert {"layout"} <= options and (hasattr(norm, "eps") <= ("eps" in options))
    for option in options:
        before = getattr(norm, option)
        for value in ("typo", float("nan"), -1, C + 1 if option == "groups" else torch.ones(2)):
            with pytest.raises(ValueError, match=f"{option}=.*: must"):
                setattr(norm, option, value)
        assert getattr(norm, option) == before


def test_a_window_of_another_shape_is_refused():
    """One that was saved as C x W has as many values, which would be those of other channels."""
    norm = new("mabn:window=4", dim=8)
    state = {**norm.state_dict(), "window_m2": torch.arange(32.0).view(8, 4)}
    with pytest.raises(RuntimeError, match="size mismatch for window_m2"):
        norm.load_state_dict(state)
    norm.load_state_dict({**state, "window_m2": state["window_m2"].t().reshape(4, 1, 8)})
    assert torch.equal(norm.window_m2[:, 0], torch.arange(4.0))


@pytest.mark.parametrize("name", ["mabn", "un"])
def test_the_state_of_another_norm_has_no_window(name):
    """Training goes on from its running variance, not from a window of zeros: outputs keep their size."""
    other = new("rbn")
    x = 3.0 * torch.randn(200, C)
    for _ in range(200):
        other(x - x.mean(0))
    state = {key: value for key, value in other.state_dict().items() if key != "running_mean"}
    norm = new(f"{name}:window=4,warmup_updates=0,rescale_after=0")
    window = torch.rand(4, C)
    norm.load_state_dict({"window_m2": window}, strict=False)
    norm.load_state_dict(state, strict=False)
    assert torch.equal(norm.window_m2, window)  # which came by itself before
    norm.load_state_dict({**state, "window_m2": torch.zeros(4, C)}, strict=False)
    assert not norm.window_m2.any()  # what is given is taken
    norm.load_state_dict(state, strict=False)
    assert 0.9 < float(norm(x).std()) < 1.1


@pytest.mark.parametrize("value", [float("nan"), 0, 1.5, "8", np.array([8, 8])])
@pytest.mark.parametrize("name", NORMS)
def test_what_is_no_number_of_channels_is_refused(name, value):
    """By name and value."""
    with pytest.raises(ValueError, match=re.escape(f"dim={value!r}: must")):
        NORMS[name](value, **REQUIRED.get(name, {}))


@pytest.mark.parametrize("name, variant", ALL)
def test_values_of_a_state_dict_stay(name, variant):
    """Loaded in place of meta tensors they are values, whatever they are (an average of models has half steps, a dead
    channel no moment) and whatever is done next, as ``_init_weights`` of Hugging Face's models marks each module.
    """
    norm = make(name, variant)
    for key, value in norm.state_dict().items():
        if key == "iters" or key.startswith("running_") and "mean" not in key:
            value.fill_(2.5 if key == "iters" else 0.0)
    saved = copy.deepcopy(norm.state_dict())
    loaded = make(name, variant).to("meta")
    copies = {f"0.{key}": value.clone() for key, value in saved.items()}
    nn.Sequential(loaded).load_state_dict(copies, assign=True)
    loaded._is_hf_initialized = True
    x = batch()[0]
    norm.eval(), loaded.eval()
    torch.testing.assert_close(loaded(x), norm(x), equal_nan=True, rtol=0, atol=0)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, saved[key]), key


@pytest.mark.parametrize("name, variant", ALL)
def test_loading_as_transformers_4_does(name, variant):
    """Each tensor by a ``load_state_dict`` of its own: first memory for what the checkpoint lacks; then what it has is
    marked, and the module is; then the values come. What was lacking begins as in a new norm, values stay.
    """
    for present in range(2):
        norm, new_, filled = make(name, variant).to("meta"), make(name, variant), make(name, variant)
        new_.reset_parameters()
        if hasattr(filled, "iters"):
            filled.iters.fill_(2.5)
        saved = filled.state_dict()
        lacking = list(saved)[present::2]
        for key in lacking:
            norm.load_state_dict({key: torch.full_like(saved[key], 7.0)}, strict=False, assign=True)
        for key, tensor in norm.state_dict(keep_vars=True).items():
            if key not in lacking:
                tensor._is_hf_initialized = True
        norm._is_hf_initialized = True
        for key in saved:
            if key not in lacking:
                norm.load_state_dict({key: saved[key].clone()}, strict=False, assign=True)
        norm.eval()(batch()[0])
        for key, value in norm.state_dict().items():
            assert torch.equal(value, (new_.state_dict() if key in lacking else saved)[key]), key


@pytest.mark.parametrize("look", [lambda norm: norm.state_dict(), unfoldable])
@pytest.mark.parametrize("name, variant", CASES)
def test_no_look_finds_statistics_without_a_value(name, variant, look):
    """As in a pass: before they are saved or folded, they begin as in a new norm."""
    filled = make(name, variant)
    filled.iters.fill_(5.0)
    norm = make(name, variant).to("meta")
    for key, tensor in (*filled.named_parameters(), *filled.named_buffers()):
        setattr(norm, key, torch.full_like(tensor, torch.nan) if key in norm.STATISTICS else tensor)
    look(norm)
    for key, start in norm.STATISTICS.items():
        assert (getattr(norm, key) == start).all(), key


@pytest.mark.parametrize("name, variant", [case for case in ALL if case[0] != "ada"])
def test_pruned(name, variant):
    """The mask of a pruned weight is no statistic: resets leave it, casts treat it as torch does, a stage passes over it."""
    norm, other = make(name, variant), make(name, variant)
    kept = torch.arange(norm.weight.numel()) % 2 == 0
    prune.custom_from_mask(norm, "weight", kept)
    if isinstance(norm, RunningNorm):
        model = nn.ModuleList([norm, other])
        statistics = RunningStatistics(model)
        x, dy, mask = batch()
        with statistics.batch():
            other(norm(x, mask), mask).backward(dy)
        statistics.commit()
        statistics.release()
        norm.reset_running_stats()
        assert norm.steps() == 0 and other.steps() == 1
    if name not in ("layer", "rms"):  # whose own reset is torch's
        norm.reset_parameters()
        norm(batch()[0])
        assert torch.equal(norm.weight, new(name, variant).weight * kept)
    assert torch.equal(norm.weight_mask, kept.float())
    assert norm.half().weight_mask.dtype is torch.float16


@pytest.mark.parametrize("name, variant", CASES)
def test_a_norm_with_computed_parameters_is_copied(name, variant):
    """``deepcopy`` of a parametrized norm is on its own as any copy is."""

    class Absolute(nn.Module):
        def forward(self, weight):
            return weight.abs()

    norm = make(name, variant)
    parametrize.register_parametrization(norm, "weight", Absolute())
    RunningStatistics(norm)
    twin = copy.deepcopy(norm)
    assert type(twin) is type(norm) and twin.stage is None and norm.stage is not None
    assert all(torch.equal(one, other) for one, other in zip(train(twin)[:7], train(make(name, variant))))


@pytest.mark.parametrize("name, option", [(n, o) for n in NORMS for o in norm_options(n) if o not in ("device", "dtype")])
def test_numbers_of_numpy(name, option):
    """As an option, and set later, they (and fractions) are Python's: the same passes, and norms that differ in one are told
    apart.
    """
    plain = new(name)
    value = REQUIRED.get(name, {}).get(option, getattr(plain, option, None))
    if option in COUNTS and option != "groups":
        value = 3  # a boundary that three steps reach
    if not isinstance(value, (bool, int, float)):
        return
    kinds = {bool: [np.bool_], int: [np.int64, np.int32], float: [np.float64, Fraction]}[type(value)]
    for kind in kinds:
        one, other = (NORMS[name](C, **{**REQUIRED.get(name, {}), option: each}) for each in (value, kind(value)))
        assert all(torch.equal(a, b) for a, b in zip(train(one), train(other)))
        if option != "affine":
            setattr(other, option, kind(value))
            assert type(getattr(other, option)) is type(value)
        if isinstance(other, RunningNorm):
            assert one.settings() == other.settings()


@pytest.mark.parametrize("value", ["0.5", None, True, torch.tensor(0.5)])
@pytest.mark.parametrize("option", ["eps", "alpha_fwd", "alpha_bkw"])
def test_what_is_no_number_is_refused(option, value):
    """By name and value; a tensor would be no setting by which norms are told apart."""
    with pytest.raises(ValueError, match=f"{option}=.*: must"):
        NORMS["power"](C, **{option: value})
