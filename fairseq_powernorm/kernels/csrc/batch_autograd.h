/*
 * Normalization by statistics of the batch (PN-V, batch normalization) as an autograd function. Included by autograd.cpp, whose
 * gate, memory and Python objects it uses.
 */

using BatchForwardFunction = int(
    int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, int64_t, const uint8_t *, const float *,
    const float *, const float *, const float *, double, int, void *, float *, float *, double *, float *, float *, float *, double);
using BatchBackwardFunction = int(
    int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, int64_t, const void *, int64_t, int64_t, int64_t,
    int64_t, float *, const uint8_t *, const float *, const float *, int, int, void *, float *, float *, double *);
using BatchEvaluateFunction = int(
    int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, int64_t, const float *, const float *,
    const float *, const float *, double, void *);

BatchForwardFunction *sweep_batch_forward;
BatchBackwardFunction *sweep_batch_backward;
BatchEvaluateFunction *sweep_batch_evaluate;
PyObject *name_recording;

// BatchSpec of kernels/interface.py.
struct BatchSpec {
    int64_t groups;
    double eps;
    bool centre, fill;

    bool read(PyObject *spec)
    {
        if (!PyTuple_Check(spec) || PyTuple_GET_SIZE(spec) != 4)
            return false;
        groups = PyLong_AsLongLong(PyTuple_GET_ITEM(spec, 0));
        eps = PyFloat_AsDouble(PyTuple_GET_ITEM(spec, 1));
        centre = PyTuple_GET_ITEM(spec, 2) == Py_True;
        fill = PyTuple_GET_ITEM(spec, 3) == Py_True;
        return !PyErr_Occurred();
    }
};

struct BatchNormBackward : torch::autograd::Node {
    SavedVariable x, r, weight, bias, saved, valid;
    bool released = false;
    bool channels_second = false; // the output is B x C x ..., the input B x ... x C
    Tensor mean, moment; // of running statistics, which stand in for a batch without rows
    BatchSpec spec;
    Object switches, python_backward, collect, constants;

    std::string name() const override { return spec.centre ? "MaskedBatchNormBackward" : "PowerNormVBackward"; }

    void release_variables() override
    {
        for (SavedVariable *each : {&x, &r, &weight, &bias, &saved, &valid})
            each->reset_data();
        for (Object *each : {&switches, &python_backward, &collect, &constants})
            each->clear();
        released = true;
    }

    variable_list apply(variable_list &&grads) override
    {
        if (!grads[0].defined())
            return variable_list(3);
        const Tensor grad_y = channels_second ? grads[0].movedim(1, -1) : grads[0]; // it may be differentiated once more
        TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
        const Tensor x_ = x.unpack(), r_ = r.unpack(), weight_ = weight.unpack(), bias_ = bias.unpack();
        const Tensor saved_ = saved.unpack(), valid_ = valid.unpack();
        variable_list found(3);
        if (!at::GradMode::is_enabled() && fits(grad_y, x_, r_, weight_, saved_, valid_) && undisturbed()
            && sweep(grad_y, x_, r_, weight_, saved_, valid_, found))
            return found;
        WithGil gil;
        return by_python({grad_y, x_, r_, weight_, bias_, saved_, valid_});
    }

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
            && is_memory(saved_, 2 * channels, at::kFloat) && (!valid_.defined() || is_memory(valid_, rows, at::kBool));
    }

    // Nobody records the sums of this pass, and the batch of a stage still runs. If it does not, Python says what is wrong.
    bool undisturbed() const
    {
        if (!switches.object || switches.object == Py_None)
            return true;
        WithGil gil;
        Object open(PyObject_GetAttr(switches.object, name_open)), recording(PyObject_GetAttr(switches.object, name_recording));
        if (!open.object || !recording.object)
            raise_python_error();
        return open.object == Py_True && recording.object == Py_False;
    }

    // False: nothing has been done, a gradient is not finite for the sake of padding that is not.
    bool sweep(
        const Tensor &grad_y, const Tensor &x_, const Tensor &r_, const Tensor &weight_, const Tensor &saved_,
        const Tensor &valid_, variable_list &found)
    {
        const int64_t channels = x_.size(-1), rows = channels ? x_.numel() / channels : 0;
        const Rows x_rows(x_), grad_rows(grad_y);
        const Tensor wide = floats(weight_), grad_x = task_should_compute_output(0) ? like(x_) : Tensor();
        const Tensor grad_weight = empty({channels}), grad_bias = empty({channels});
        const int status = sweep_batch_backward(
            type_number(x_), rows, channels, spec.groups, at::get_num_threads(), x_rows.data(), x_rows.inner, x_rows.outer_stride,
            x_rows.inner_stride, x_rows.channel_stride, grad_rows.data(), grad_rows.inner, grad_rows.outer_stride,
            grad_rows.inner_stride, grad_rows.channel_stride, const_cast<float *>(at_or_null<float>(r_)), at_or_null<uint8_t>(valid_), at_or_null<float>(wide),
            at_or_null<float>(saved_), spec.centre, spec.fill, written<void>(grad_x), written<float>(grad_weight),
            written<float>(grad_bias), nullptr);
        if (status == NO_MEMORY) {
            WithGil gil;
            PyErr_SetString(PyExc_MemoryError, "C kernel: out of memory");
            raise_python_error();
        }
        if (status == NOT_FINITE)
            return false;
        found[0] = grad_x;
        if (weight_.defined())
            found[1] = grad_weight;
        if (task_should_compute_output(2))
            found[2] = grad_bias;
        return true;
    }

    variable_list by_python(const std::vector<Tensor> &tensors) const
    {
        Object arguments(PyTuple_New(14));
        if (!arguments.object)
            raise_python_error();
        Py_ssize_t number = 0;
        const auto put = [&](PyObject *object) { // takes the reference
            if (!object)
                raise_python_error();
            PyTuple_SET_ITEM(arguments.object, number++, object);
        };
        const auto put_borrowed = [&](PyObject *object) {
            Py_INCREF(object);
            put(object);
        };
        put_borrowed(collect.object);
        put_borrowed(constants.object);
        for (const Tensor &each : tensors)
            put(THPVariable_Wrap(each)); // None for one that is not defined
        put(THPVariable_Wrap(mean));
        put(THPVariable_Wrap(moment));
        for (size_t i = 0; i < 3; i++) // a parameter that there is not needs no gradient
            put_borrowed(next_edge(i).is_valid() && task_should_compute_output(i) ? Py_True : Py_False);
        Object result(PyObject_CallObject(python_backward.object, arguments.object));
        if (!result.object)
            raise_python_error();
        variable_list found(3);
        for (int i = 0; i < 3; i++) {
            PyObject *each = PyTuple_GET_ITEM(result.object, i);
            if (each != Py_None)
                found[i] = THPVariable_Unpack(each);
        }
        return found;
    }
};

/*
 * train_batch(x, weight, bias, valid, mean, moment, iters, spec, alpha, forward_into, switches, python_backward, collect,
 * channels_second): a forward pass of training over rows x; with channels_second the output is B x C x ... alpha: weight of the old statistics, which take their step here; None: they do not. forward_into: a
 * vector of a stage, or None. switches: of the stage, or None. python_backward(collect, spec, grad_y, x, r, weight, bias, saved,
 * valid, mean, moment, want_x, want_weight, want_bias) computes the gradients that are not computed here. Returns None, with
 * nothing done, where the pass is left to Python.
 */
PyObject *train_batch(PyObject *, PyObject *const *arguments, Py_ssize_t count)
{
    HANDLE_TH_ERRORS
    if (count != 14) {
        PyErr_SetString(PyExc_TypeError, "train_batch() takes 14 arguments");
        return nullptr;
    }
    auto spec = BatchSpec();
    const bool own = arguments[8] != Py_None;
    double alpha = 0.0;
    if (!transformed() && spec.read(arguments[7]) && own)
        alpha = PyFloat_AsDouble(arguments[8]);
    if (PyErr_Occurred())
        return nullptr;
    bool none[5] = {false, false, false, false, false};
    const Tensor x = unpack(arguments[0]), weight = unpack(arguments[1], &none[0]), bias = unpack(arguments[2], &none[1]);
    const Tensor valid = unpack(arguments[3], &none[2]), mean = unpack(arguments[4], &none[3]), moment = unpack(arguments[5]);
    const Tensor iters = unpack(arguments[6]), forward_into = unpack(arguments[9], &none[4]);
    if (transformed() || !x.defined() || !has_type_of_sweeps(x) || x.dim() < 1 || !moment.defined() || !iters.defined()
        || mean.defined() != spec.centre)
        Py_RETURN_NONE;
    const int64_t channels = x.size(-1), rows = channels ? x.numel() / channels : 0;
    const int64_t parts = 1 + spec.centre + (spec.centre && spec.fill);
    const auto vector = [&](const Tensor &tensor, bool is_none) {
        return is_none || (tensor.defined() && readable(tensor, channels));
    };
    const auto statistic = [&](const Tensor &tensor, int64_t size) {
        return own ? writable(tensor, size, at::kFloat)
                   : tensor.scalar_type() == at::kFloat && tensor.numel() == size && tensor.is_contiguous();
    };
    if (!vector(weight, none[0]) || !vector(bias, none[1]) || channels == 0 || !(none[2] || is_mask(valid, rows))
        || !statistic(moment, channels) || (mean.defined() && !statistic(mean, channels)) || !statistic(iters, 1)
        || !(none[4] || (forward_into.defined() && writable(forward_into, parts * channels + 2, at::kDouble)))
        || (spec.groups > 0 && channels % spec.groups != 0))
        Py_RETURN_NONE;

    const Rows x_rows(x);
    const Tensor wide_weight = floats(weight), wide_bias = floats(bias);
    Tensor y = like(x);
    const Tensor saved = empty({2, channels}), r = spec.groups > 0 ? empty({rows, spec.groups}) : Tensor();
    double *tally = forward_into.defined() ? sums_of(parts * channels + 2) : nullptr;
    int status;
    {
        WithoutGil others(rows * channels >= GRAIN);
        status = sweep_batch_forward(
            type_number(x), rows, channels, spec.groups, at::get_num_threads(), x_rows.data(), x_rows.inner, x_rows.outer_stride,
            x_rows.inner_stride, x_rows.channel_stride, at_or_null<uint8_t>(valid), at_or_null<float>(wide_weight),
            at_or_null<float>(wide_bias), at_or_null<float>(mean), at_or_null<float>(moment), spec.eps, spec.fill, y.mutable_data_ptr(), written<float>(r),
            written<float>(saved), tally, own && mean.defined() ? written<float>(mean) : nullptr,
            own ? written<float>(moment) : nullptr, own ? written<float>(iters) : nullptr, alpha);
    }
    check(status);
    if (own)
        for (const Tensor *each : {&mean, &moment, &iters})
            if (each->defined())
                changed(*each);
    if (forward_into.defined())
        add_to(forward_into, tally);
    const bool channels_second = arguments[13] == Py_True;
    if (channels_second)
        y = with_channels_second(y, x);
    if (torch::autograd::compute_requires_grad(x, weight, bias)) {
        auto *node = new BatchNormBackward();
        const NodePointer owner = Nodes<NodePointer>::own(node);
        node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
        node->x = SavedVariable(x, false);
        node->r = SavedVariable(r, false);
        node->weight = SavedVariable(weight, false);
        node->bias = SavedVariable(bias, false);
        node->saved = SavedVariable(saved, false);
        node->valid = SavedVariable(valid, false);
        node->channels_second = channels_second;
        node->mean = mean;
        node->moment = moment;
        node->spec = spec;
        node->constants.keep(arguments[7]);
        node->switches.keep(arguments[10]);
        node->python_backward.keep(arguments[11]);
        node->collect.keep(arguments[12]);
        torch::autograd::set_history(y, owner);
    }
    return THPVariable_Wrap(y);
    END_HANDLE_TH_ERRORS
}
