/*
 * Power Normalization as an autograd function in C++: what kernels/c.py and functional/power.py do in Python, for the calls that
 * can be served without question. The sweeps are those of powernorm.c, whose entry points bind() is given; here are the gate for
 * tensors, memory, and autograd. Whatever the gate does not let through is left to Python: train() and evaluate() return None
 * before anything has been done, and a backward pass calls a function that train() was given.
 *
 * Compiled on the user's machine for the torch that is installed there (kernels/native.py): one file, since torch's headers
 * take longer to compile than all that is said here, and once is enough.
 */
#define PY_SSIZE_T_CLEAN
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/csrc/Exceptions.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---------------------------------------------------------------- what Python has given

using ForwardFunction = int(
    int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, int64_t, const uint8_t *, const float *, const float *,
    const float *, const float *, double, double, int, void *, float *, float *, double *, float *, float *, double, double, double,
    double);
using BackwardFunction = int(
    int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, int64_t, const void *, int64_t, int64_t, int64_t,
    int64_t,
    const float *, const uint8_t *, const float *, const float *, const float *, double, double, void *, float *, float *, double *,
    float *, double, double);
using EvaluateFunction = int(
    int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, int64_t, const float *, const float *, const float *,
    double, void *);

ForwardFunction *sweep_forward;
BackwardFunction *sweep_backward;
EvaluateFunction *sweep_evaluate;
PyObject *name_open, *name_acquire, *name_release;

enum { OK = 0, NO_MEMORY = 1, NOT_FINITE = 2 };
enum { FORWARD_BATCH = 1, BACKWARD_BATCH = 2, SKIP_PADDING = 4 };
constexpr int64_t GRAIN = 16384; // elements for which it pays to let other Python threads run meanwhile

void check(int status)
{
    if (status == NO_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, "C kernel: out of memory");
        throw python_error();
    }
}

// ---------------------------------------------------------------- Python objects

struct WithGil {
    PyGILState_STATE state = PyGILState_Ensure();
    ~WithGil() { PyGILState_Release(state); }
};

struct WithoutGil {
    PyThreadState *state;
    explicit WithoutGil(bool release) : state(release ? PyEval_SaveThread() : nullptr) {}
    ~WithoutGil()
    {
        if (state)
            PyEval_RestoreThread(state);
    }
};

[[noreturn]] void raise_python_error()
{
    python_error error;
    error.persist();
    throw error;
}

// A reference that is owned; the GIL is held wherever one is made, and taken where one is dropped.
struct Object {
    PyObject *object = nullptr;
    Object() = default;
    explicit Object(PyObject *stolen) : object(stolen) {}
    Object(const Object &) = delete;
    Object &operator=(const Object &) = delete;
    ~Object() { clear(); }
    void keep(PyObject *other)
    {
        Py_XINCREF(other);
        object = other;
    }
    void clear()
    {
        if (object && Py_IsInitialized()) {
            WithGil gil;
            Py_CLEAR(object);
        }
    }
};

// A Python lock, held; made and dropped with the GIL held, which waiting for it gives up.
struct Held {
    PyObject *lock;
    explicit Held(PyObject *lock) : lock(lock)
    {
        Object done(PyObject_CallMethodObjArgs(lock, name_acquire, nullptr));
        if (!done.object)
            raise_python_error();
    }
    ~Held()
    {
        PyObject *type, *value, *trace; // a Python error may be on its way
        PyErr_Fetch(&type, &value, &trace);
        Object done(PyObject_CallMethodObjArgs(lock, name_release, nullptr));
        PyErr_Restore(type, value, trace);
    }
};

// ---------------------------------------------------------------- the gate

uint64_t plain_keys, usual_modes;

// Is torch doing something else with operations than computing them: tracing, transforms, dispatch modes?
bool transformed()
{
    return (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~usual_modes) != 0;
}

// Is this tensor strided memory of a CPU that holds all its elements: no wrapper, subclass or lazy view of any kind?
bool plain(const Tensor &tensor)
{
    if ((tensor.key_set().raw_repr() & ~plain_keys) != 0 || !tensor.has_storage())
        return false;
    if (tensor.numel() == 0)
        return true;
    int64_t last = tensor.storage_offset();
    for (int64_t i = 0; i < tensor.dim(); i++)
        last += (tensor.size(i) - 1) * tensor.stride(i);
    return tensor.const_data_ptr() != nullptr
        && static_cast<size_t>(last + 1) * tensor.element_size() <= tensor.storage().nbytes();
}

// The tensor in a Python object of torch's own classes, if it is plain; undefined otherwise. None: undefined, and `none` is set.
Tensor unpack(PyObject *object, bool *none = nullptr)
{
    if (object == Py_None && none) {
        *none = true;
        return {};
    }
    if (!THPVariable_CheckExact(object))
        return {};
    const Tensor &tensor = THPVariable_Unpack(object);
    return plain(tensor) && !tensor._fw_grad(0).defined() ? tensor : Tensor();
}

bool has_type_of_sweeps(const Tensor &tensor)
{
    return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16;
}

// A parameter or statistic of `channels` values that may be read.
bool readable(const Tensor &tensor, int64_t channels)
{
    return tensor.numel() == channels
        && (has_type_of_sweeps(tensor) || tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kDouble);
}

// Memory of so many values of that type, one behind the other.
bool is_memory(const Tensor &tensor, int64_t count, at::ScalarType type)
{
    return plain(tensor) && tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous();
}

bool is_mask(const Tensor &tensor, int64_t rows)
{
    return tensor.defined() && tensor.scalar_type() == at::kBool && tensor.numel() == rows && tensor.is_contiguous();
}

// A gradient of x that may be read.
bool is_like(const Tensor &grad, const Tensor &x)
{
    return plain(grad) && grad.scalar_type() == x.scalar_type() && grad.sizes() == x.sizes();
}

// Numbers of that type that may be written: they are nobody else's.
bool writable(const Tensor &tensor, int64_t count, at::ScalarType type)
{
    return tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous() && !tensor.requires_grad()
        && (!tensor.is_inference() || c10::InferenceMode::is_enabled());
}

// ---------------------------------------------------------------- memory

Tensor empty(at::IntArrayRef size, at::ScalarType type = at::kFloat)
{
    return at::detail::empty_cpu(size, at::TensorOptions().dtype(type));
}

// A vector as contiguous float32.
Tensor floats(const Tensor &vector)
{
    if (!vector.defined() || (vector.scalar_type() == at::kFloat && vector.is_contiguous()))
        return vector;
    at::AutoDispatchBelowADInplaceOrView below;
    return vector.to(at::kFloat).contiguous();
}

template <typename T>
const T *at_or_null(const Tensor &tensor)
{
    return tensor.defined() ? static_cast<const T *>(tensor.const_data_ptr()) : nullptr;
}

template <typename T>
T *written(const Tensor &tensor)
{
    return tensor.defined() ? static_cast<T *>(tensor.mutable_data_ptr()) : nullptr;
}

void changed(const Tensor &tensor)
{
    if (!tensor.is_inference())
        tensor.unsafeGetTensorImpl()->bump_version();
}

// How many rows of each example lie side by side in place of their channels; 0: none (memory.positions of Python).
int64_t positions(const Tensor &x)
{
    if (x.dim() < 3 || x.stride(-1) == 1)
        return 0;
    int64_t side_by_side = 1;
    for (int64_t i = x.dim() - 2; i > 0; i--) {
        if (x.size(i) == 1)
            continue;
        if (x.stride(i) != side_by_side)
            return 0;
        side_by_side *= x.size(i);
    }
    return side_by_side > 1 ? side_by_side : 0;
}

// Memory for the values of the rows x, laid out alike (memory.empty of Python).
Tensor like(const Tensor &x)
{
    const int64_t side_by_side = x.is_contiguous() ? 0 : positions(x);
    if (!side_by_side)
        return empty(x.sizes(), x.scalar_type());
    std::vector<int64_t> strides(x.dim(), side_by_side);
    strides[0] = x.size(-1) * side_by_side;
    int64_t step = 1;
    for (int64_t i = x.dim() - 2; i > 0; i--) {
        strides[i] = step;
        step *= x.size(i);
    }
    return at::detail::empty_strided_cpu(x.sizes(), strides, at::TensorOptions().dtype(x.scalar_type()));
}

// Rows whose channels come last, from a tensor whose channels may come second, or back; no view, as autograd sees it.
Tensor moved(const Tensor &x, int64_t from, int64_t to)
{
    at::AutoDispatchBelowADInplaceOrView below;
    return x.movedim(from, to);
}

// The output of a pass over rows x as B x C x ...: contiguous, unless channels are adjacent in x (memory.channels_second of Python).
Tensor with_channels_second(const Tensor &y, const Tensor &x)
{
    const Tensor order = moved(y, -1, 1);
    if (x.stride(-1) == 1)
        return order;
    at::AutoDispatchBelowADInplaceOrView below;
    return order.contiguous();
}

// Where the rows of a tensor lie, and how many there are.
struct Rows {
    Tensor values;
    int64_t inner = 1, outer_stride, inner_stride = 0, channel_stride = 1;

    explicit Rows(const Tensor &x) : values(x), outer_stride(x.size(-1))
    {
        if (x.is_contiguous())
            return;
        if (x.stride(-1) == 1 && x.dim() == 2) {
            outer_stride = x.stride(0);
        } else if (x.stride(-1) == 1 && x.dim() == 3) {
            inner = x.size(1);
            outer_stride = x.stride(0);
            inner_stride = x.stride(1);
        } else if (const int64_t side_by_side = positions(x)) {
            inner = side_by_side;
            outer_stride = x.stride(0);
            inner_stride = 1;
            channel_stride = x.stride(-1);
        } else {
            at::AutoDispatchBelowADInplaceOrView below;
            values = x.contiguous();
        }
    }
    const void *data() const { return values.const_data_ptr(); }
};

int type_number(const Tensor &x)
{
    return x.scalar_type() == at::kBFloat16;
}

// Memory for per-channel sums, which a thread keeps.
double *sums_of(size_t count)
{
    static thread_local std::vector<double> memory;
    if (memory.size() < count)
        memory.resize(count);
    return memory.data();
}

void add_to(const Tensor &total, const double *sums)
{
    double *into = written<double>(total);
    for (int64_t i = 0; i < total.numel(); i++)
        into[i] += sums[i];
    changed(total);
}

// ---------------------------------------------------------------- constants

// PowerNormSpec and StepSpec of kernels/interface.py.
struct Spec {
    int64_t groups;
    double eps, nu_scale, gradient_scale, jump;
    int flags;
    bool skip_padding;

    bool read(PyObject *spec)
    {
        if (!PyTuple_Check(spec) || PyTuple_GET_SIZE(spec) != 8)
            return false;
        PyObject *scale = PyTuple_GET_ITEM(spec, 3);
        if (!PyFloat_Check(scale) && !PyLong_Check(scale))
            return false; // a tensor on some device
        groups = PyLong_AsLongLong(PyTuple_GET_ITEM(spec, 0));
        eps = PyFloat_AsDouble(PyTuple_GET_ITEM(spec, 1));
        nu_scale = PyFloat_AsDouble(PyTuple_GET_ITEM(spec, 2));
        gradient_scale = PyFloat_AsDouble(scale);
        skip_padding = PyTuple_GET_ITEM(spec, 6) == Py_True;
        flags = (PyTuple_GET_ITEM(spec, 4) == Py_True ? FORWARD_BATCH : 0)
            | (PyTuple_GET_ITEM(spec, 5) == Py_True ? BACKWARD_BATCH : 0) | (skip_padding ? SKIP_PADDING : 0);
        jump = PyFloat_AsDouble(PyTuple_GET_ITEM(spec, 7));
        return !PyErr_Occurred();
    }
};

struct Step {
    double alpha = 0.0, nu_scale = 0.0, warmup = 0.0, trusted_after = 0.0, jump = 0.0, nu_lowest = 0.0;

    bool read(PyObject *step)
    {
        if (!PyTuple_Check(step) || PyTuple_GET_SIZE(step) != 7)
            return false;
        alpha = PyFloat_AsDouble(PyTuple_GET_ITEM(step, 0));
        nu_scale = PyFloat_AsDouble(PyTuple_GET_ITEM(step, 1));
        warmup = PyFloat_AsDouble(PyTuple_GET_ITEM(step, 3));
        trusted_after = PyFloat_AsDouble(PyTuple_GET_ITEM(step, 4));
        jump = PyFloat_AsDouble(PyTuple_GET_ITEM(step, 5));
        nu_lowest = PyFloat_AsDouble(PyTuple_GET_ITEM(step, 6));
        return !PyErr_Occurred();
    }
};

// ---------------------------------------------------------------- the backward pass

struct PowerNormBackward : torch::autograd::Node {
    SavedVariable x, r, weight, saved, valid;
    bool released = false;
    Tensor nu;   // read when the backward pass runs, by the method's definition: not a saved tensor
    Tensor into; // where a stage wants the sums; undefined: nu takes its step here
    bool own = false;
    bool channels_second = false; // the output is B x C x ..., the input B x ... x C
    Spec spec;
    Step step;
    Object switches, python_backward, collect, guard, constants;

    std::string name() const override { return "PowerNormBackward"; }

    void release_variables() override
    {
        x.reset_data();
        r.reset_data();
        weight.reset_data();
        saved.reset_data();
        valid.reset_data();
        // Python's garbage collector does not see them here: a norm that keeps its output would never be freed
        for (Object *each : {&switches, &python_backward, &collect, &guard, &constants})
            each->clear();
        released = true;
    }

    variable_list apply(variable_list &&grads) override
    {
        const Tensor grad_y = std::move(grads[0]);
        if (!grad_y.defined())
            return variable_list(3);
        TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
        if (!at::GradMode::is_enabled())
            return gradients(grad_y);
        variable_list found;
        {
            at::AutoGradMode off(false);
            found = gradients(grad_y);
        }
        for (Tensor &each : found)
            if (each.defined())
                each.requires_grad_();
        // whoever differentiates the approximate gradient once more gets an error, not a part of the derivative
        torch::autograd::DelayedError error(
            "the gradient of PowerNorm in training is an approximation: it can't be differentiated", 3);
        return error.apply(std::move(found));
    }

    variable_list gradients(const Tensor &given)
    {
        const Tensor grad_y = channels_second ? moved(given, 1, -1) : given;
        const Tensor x_ = x.unpack(), r_ = r.unpack(), weight_ = weight.unpack(), saved_ = saved.unpack(), valid_ = valid.unpack();
        const bool want_x = task_should_compute_output(0);
        WithGil gil;
        if (fits(grad_y, x_, r_, weight_, saved_, valid_)) {
            Held held(guard.object);
            if (may_count()) {
                variable_list found(3);
                if (sweep(grad_y, x_, r_, weight_, saved_, valid_, want_x, found))
                    return found;
            }
        }
        return by_python(grad_y, x_, r_, weight_, saved_, valid_, want_x);
    }

    // The gate: saved tensors come back from wherever hooks have put them.
    bool fits(
        const Tensor &grad_y, const Tensor &x_, const Tensor &r_, const Tensor &weight_, const Tensor &saved_,
        const Tensor &valid_) const
    {
        if (transformed() || !plain(x_) || !has_type_of_sweeps(x_) || x_.dim() < 1)
            return false;
        const int64_t channels = x_.size(-1), rows = channels ? x_.numel() / channels : 0;
        return is_like(grad_y, x_) && r_.defined() == (spec.groups > 0)
            && (!r_.defined() || is_memory(r_, rows * spec.groups, at::kFloat))
            && (!weight_.defined() || (plain(weight_) && readable(weight_, channels)))
            && is_memory(saved_, 3 * channels, at::kFloat) && (!valid_.defined() || is_memory(valid_, rows, at::kBool))
            && plain(nu) && writable(nu, channels, at::kFloat)
            && (!into.defined() || (plain(into) && writable(into, 2 * channels + 2, at::kDouble)));
    }

    // Does the batch of a stage still run? If not, Python says what is wrong.
    bool may_count() const
    {
        if (own)
            return true;
        Object open(PyObject_GetAttr(switches.object, name_open));
        if (!open.object)
            raise_python_error();
        return open.object == Py_True;
    }

    // False: nothing has been done, a gradient is not finite for the sake of padding that is not.
    bool sweep(
        const Tensor &grad_y, const Tensor &x_, const Tensor &r_, const Tensor &weight_, const Tensor &saved_,
        const Tensor &valid_, bool want_x, variable_list &found)
    {
        const int64_t channels = x_.size(-1), rows = channels ? x_.numel() / channels : 0;
        const Rows x_rows(x_), grad_rows(grad_y);
        const Tensor wide = floats(weight_), grad_x = want_x ? like(x_) : Tensor();
        const Tensor grad_weight = empty({channels}), grad_bias = empty({channels});
        double *tally = into.defined() ? sums_of(2 * channels + 2) : nullptr;
        int status;
        {
            WithoutGil others(rows * channels >= GRAIN);
            status = sweep_backward(
                type_number(x_), rows, channels, spec.groups, at::get_num_threads(), x_rows.data(), x_rows.inner,
                x_rows.outer_stride, x_rows.inner_stride, x_rows.channel_stride, grad_rows.data(), grad_rows.inner,
                grad_rows.outer_stride, grad_rows.inner_stride, grad_rows.channel_stride, at_or_null<float>(r_),
                spec.skip_padding ? at_or_null<uint8_t>(valid_) : nullptr, at_or_null<float>(wide), at_or_null<float>(saved_), at_or_null<float>(nu), spec.gradient_scale * spec.nu_scale,
                spec.gradient_scale, written<void>(grad_x), written<float>(grad_weight), written<float>(grad_bias), tally,
                own ? written<float>(nu) : nullptr, step.nu_scale, step.nu_lowest);
        }
        check(status);
        if (status == NOT_FINITE && valid_.defined() && !spec.skip_padding)
            return false;
        if (own)
            changed(nu);
        if (into.defined())
            add_to(into, tally);
        found[0] = grad_x;
        if (weight_.defined())
            found[1] = grad_weight;
        if (task_should_compute_output(2))
            found[2] = grad_bias;
        return true;
    }

    variable_list by_python(
        const Tensor &grad_y, const Tensor &x_, const Tensor &r_, const Tensor &weight_, const Tensor &saved_,
        const Tensor &valid_, bool want_x) const
    {
        PyObject *arguments = PyTuple_New(11);
        if (!arguments)
            raise_python_error();
        Object owned(arguments);
        const auto put = [&](int i, PyObject *object) {
            if (!object)
                raise_python_error();
            PyTuple_SET_ITEM(arguments, i, object);
        };
        const auto borrowed = [](PyObject *object) {
            Py_INCREF(object);
            return object;
        };
        put(0, borrowed(collect.object));
        put(1, borrowed(guard.object));
        put(2, borrowed(constants.object));
        int i = 3;
        for (const Tensor *each : {&grad_y, &x_, &r_, &weight_, &saved_, &valid_, &nu}) {
            PyObject *wrapped = THPVariable_Wrap(*each); // None for one that is not defined
            put(i++, wrapped);
        }
        put(10, borrowed(want_x ? Py_True : Py_False));
        Object result(PyObject_CallObject(python_backward.object, arguments));
        if (!result.object)
            raise_python_error();
        variable_list found(3);
        for (int k = 0; k < 3; k++) {
            PyObject *each = PyTuple_GET_ITEM(result.object, k);
            if (each != Py_None && (k != 2 || task_should_compute_output(2)))
                found[k] = THPVariable_Unpack(each);
        }
        return found;
    }
};

// How a node is held depends on the version of torch.
template <typename Pointer>
struct Nodes;

template <typename Node>
struct Nodes<std::shared_ptr<Node>> {
    static std::shared_ptr<Node> own(Node *node)
    {
        return std::shared_ptr<Node>(node, [](Node *unused) { deleteNode(unused); }); // torch's, which does not recurse
    }
};

template <typename Node>
struct Nodes<c10::intrusive_ptr<Node>> {
    static c10::intrusive_ptr<Node> own(Node *node) { return c10::intrusive_ptr<Node>::unsafe_steal_from_new(node); }
};

using NodePointer = std::decay_t<decltype(torch::autograd::Edge::function)>;

// ---------------------------------------------------------------- what Python calls

/*
 * train(x, weight, bias, valid, psi2, nu, iters, spec, step, forward_into, backward_into, switches, python_backward, collect,
 * guard, channels_second): a forward pass of training over rows x; with channels_second the output is B x C x ... step: StepSpec where the statistics take their step here; else None. forward_into,
 * backward_into: vectors of a stage, or None. python_backward(collect, guard, spec, grad_y, x, r, weight, saved, valid, nu, want_x)
 * computes the gradients that are not computed here. Returns None, with nothing done, where the pass is left to Python.
 */
PyObject *train(PyObject *, PyObject *const *arguments, Py_ssize_t count)
{
    HANDLE_TH_ERRORS
    if (count != 16) {
        PyErr_SetString(PyExc_TypeError, "train() takes 16 arguments");
        return nullptr;
    }
    auto spec = Spec();
    auto step = Step();
    const bool own = arguments[8] != Py_None;
    if (transformed() || !spec.read(arguments[7]) || (own && !step.read(arguments[8]))) {
        if (PyErr_Occurred())
            return nullptr;
        Py_RETURN_NONE;
    }
    bool none[5] = {false, false, false, false, false};
    const Tensor x = unpack(arguments[0]), weight = unpack(arguments[1], &none[0]), bias = unpack(arguments[2], &none[1]);
    const Tensor valid = unpack(arguments[3], &none[2]), psi2 = unpack(arguments[4]), nu = unpack(arguments[5]);
    const Tensor iters = unpack(arguments[6]);
    const Tensor forward_into = unpack(arguments[9], &none[3]), backward_into = unpack(arguments[10], &none[4]);
    if (!x.defined() || !has_type_of_sweeps(x) || x.dim() < 1 || !psi2.defined() || !nu.defined() || !iters.defined())
        Py_RETURN_NONE;
    const int64_t channels = x.size(-1), rows = channels ? x.numel() / channels : 0;
    const auto vector = [&](const Tensor &tensor, bool is_none) {
        return is_none || (tensor.defined() && readable(tensor, channels));
    };
    const auto place = [&](const Tensor &tensor, bool is_none, int64_t size) {
        return is_none || (tensor.defined() && writable(tensor, size, at::kDouble));
    };
    if (!vector(weight, none[0]) || !vector(bias, none[1]) || channels == 0
        || !(none[2] || is_mask(valid, rows))
        || !writable(psi2, channels, at::kFloat) || !writable(nu, channels, at::kFloat) || !writable(iters, 1, at::kFloat)
        || !place(forward_into, none[3], channels + 2) || !place(backward_into, none[4], 2 * channels + 2)
        || spec.groups < 0 || (spec.groups > 0 && channels % spec.groups != 0))
        Py_RETURN_NONE;

    const Rows x_rows(x);
    const Tensor wide_weight = floats(weight), wide_bias = floats(bias);
    Tensor y = like(x);
    const Tensor saved = empty({3, channels});
    const Tensor r = spec.groups > 0 ? empty({rows, spec.groups}) : Tensor();
    double *tally = forward_into.defined() ? sums_of(channels + 2) : nullptr;
    int status;
    {
        WithoutGil others(rows * channels >= GRAIN);
        status = sweep_forward(
            type_number(x), rows, channels, spec.groups, at::get_num_threads(), x_rows.data(), x_rows.inner, x_rows.outer_stride,
            x_rows.inner_stride, x_rows.channel_stride, at_or_null<uint8_t>(valid), at_or_null<float>(wide_weight), at_or_null<float>(wide_bias),
            at_or_null<float>(psi2), nullptr, spec.eps, spec.jump, spec.flags, y.mutable_data_ptr(), written<float>(r),
            written<float>(saved), tally, own ? written<float>(psi2) : nullptr, own ? written<float>(iters) : nullptr, step.alpha,
            step.warmup, step.trusted_after, step.jump);
    }
    check(status);
    if (own) {
        changed(psi2);
        changed(iters);
    }
    if (forward_into.defined())
        add_to(forward_into, tally);
    const bool channels_second = arguments[15] == Py_True;
    if (channels_second)
        y = with_channels_second(y, x);
    if (torch::autograd::compute_requires_grad(x, weight, bias)) {
        auto *node = new PowerNormBackward();
        const NodePointer owner = Nodes<NodePointer>::own(node);
        node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
        node->x = SavedVariable(x, false);
        node->r = SavedVariable(r, false);
        node->weight = SavedVariable(weight, false);
        node->saved = SavedVariable(saved, false);
        node->valid = SavedVariable(valid, false);
        node->nu = nu;
        node->into = backward_into;
        node->own = own;
        node->channels_second = channels_second;
        node->spec = spec;
        node->step = step;
        node->constants.keep(arguments[7]);
        node->switches.keep(arguments[11]);
        node->python_backward.keep(arguments[12]);
        node->collect.keep(arguments[13]);
        node->guard.keep(arguments[14]);
        torch::autograd::set_history(y, owner);
    }
    return THPVariable_Wrap(y);
    END_HANDLE_TH_ERRORS
}

#include "batch_autograd.h"

// evaluate(x, weight, bias, psi2, groups, eps, mean): as kernels.evaluate, where no gradient is wanted; else None.
PyObject *evaluate(PyObject *, PyObject *const *arguments, Py_ssize_t count)
{
    HANDLE_TH_ERRORS
    if (count != 7) {
        PyErr_SetString(PyExc_TypeError, "evaluate() takes 7 arguments");
        return nullptr;
    }
    bool none[4] = {false, false, false, false};
    if (transformed())
        Py_RETURN_NONE;
    const Tensor x = unpack(arguments[0]), weight = unpack(arguments[1], &none[0]), bias = unpack(arguments[2], &none[1]);
    const Tensor psi2 = unpack(arguments[3], &none[2]), mean = unpack(arguments[6], &none[3]);
    const int64_t groups = PyLong_AsLongLong(arguments[4]);
    const double eps = PyFloat_AsDouble(arguments[5]);
    if (PyErr_Occurred())
        return nullptr;
    if (!x.defined() || !has_type_of_sweeps(x) || x.dim() < 1 || torch::autograd::compute_requires_grad(x, weight, bias, psi2)
        || (!none[3] && !psi2.defined()))
        Py_RETURN_NONE;
    const int64_t channels = x.size(-1), rows = channels ? x.numel() / channels : 0;
    const auto vector = [&](const Tensor &tensor, bool is_none) {
        return is_none || (tensor.defined() && readable(tensor, channels));
    };
    if (!vector(weight, none[0]) || !vector(bias, none[1]) || !vector(psi2, none[2]) || !vector(mean, none[3])
        || channels == 0 || groups < 0 || (groups > 0 && channels % groups != 0))
        Py_RETURN_NONE;
    const Rows x_rows(x);
    const Tensor wide_weight = floats(weight), wide_bias = floats(bias), wide_psi2 = floats(psi2), wide_mean = floats(mean);
    const Tensor y = like(x);
    int status;
    {
        WithoutGil others(rows * channels >= GRAIN);
        if (mean.defined())
            status = sweep_batch_evaluate(
                type_number(x), rows, channels, groups, at::get_num_threads(), x_rows.data(), x_rows.inner, x_rows.outer_stride,
                x_rows.inner_stride, x_rows.channel_stride, at_or_null<float>(wide_weight), at_or_null<float>(wide_bias),
                at_or_null<float>(wide_mean), at_or_null<float>(wide_psi2), eps, y.mutable_data_ptr());
        else
            status = sweep_evaluate(
                type_number(x), rows, channels, groups, at::get_num_threads(), x_rows.data(), x_rows.inner, x_rows.outer_stride,
                x_rows.inner_stride, x_rows.channel_stride, at_or_null<float>(wide_weight), at_or_null<float>(wide_bias),
                at_or_null<float>(wide_psi2), eps, y.mutable_data_ptr());
    }
    check(status);
    return THPVariable_Wrap(y);
    END_HANDLE_TH_ERRORS
}

// bind(...): the addresses of the entry points, in the order of kernels/native.py.
PyObject *bind(PyObject *, PyObject *const *arguments, Py_ssize_t count)
{
    HANDLE_TH_ERRORS
    constexpr int ENTRIES = 6;
    if (count != ENTRIES) {
        PyErr_SetString(PyExc_TypeError, "bind() takes 6 arguments");
        return nullptr;
    }
    void *addresses[ENTRIES];
    for (int i = 0; i < ENTRIES; i++) {
        addresses[i] = PyLong_AsVoidPtr(arguments[i]);
        if (PyErr_Occurred())
            return nullptr;
    }
    sweep_forward = reinterpret_cast<ForwardFunction *>(addresses[0]);
    sweep_backward = reinterpret_cast<BackwardFunction *>(addresses[1]);
    sweep_evaluate = reinterpret_cast<EvaluateFunction *>(addresses[2]);
    sweep_batch_forward = reinterpret_cast<BatchForwardFunction *>(addresses[3]);
    sweep_batch_backward = reinterpret_cast<BatchBackwardFunction *>(addresses[4]);
    sweep_batch_evaluate = reinterpret_cast<BatchEvaluateFunction *>(addresses[5]);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"train", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(train)), METH_FASTCALL, nullptr},
    {"train_batch", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(train_batch)), METH_FASTCALL, nullptr},
    {"evaluate", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(evaluate)), METH_FASTCALL, nullptr},
    {"bind", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(bind)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "powernorm_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit_powernorm_autograd()
{
    HANDLE_TH_ERRORS
    name_open = PyUnicode_InternFromString("open");
    name_acquire = PyUnicode_InternFromString("acquire");
    name_release = PyUnicode_InternFromString("release");
    name_recording = PyUnicode_InternFromString("recording");
    // what a tensor of a CPU has, and what is on in a thread that does nothing special
    c10::InferenceMode off(false);
    plain_keys = empty({1}).key_set().raw_repr();
    usual_modes = c10::impl::tls_local_dispatch_key_set().included_.raw_repr();
    return PyModule_Create(&module);
    END_HANDLE_TH_ERRORS
}
