/*
 * Checks of normalization by statistics of the batch (csrc/batch.h): PN-V, batch normalization, and that which fills padding.
 * Included by sanitize_kernel.c, whose buffers and places they use.
 */

/* |a - b| within tolerance of a number of that size. */
static int near(double a, double b, double size, double tolerance)
{
    return fabs(a - b) <= tolerance * (size + fabs(b));
}

enum { SECOND_MOMENT, CENTRED, FILLED, BATCH_KINDS };

/*
 * One shape of normalization by statistics of the batch, placed as in check(): all passes with one and with four threads, which
 * take their step themselves or hand out the sums. Row n of y and dx lies as row n of x, side by side with the others.
 */
static void check_batch(int dtype, int64_t N, int64_t C, int64_t G, int masked, int layout, int kind)
{
    const size_t bytes = dtype ? 2 : 4;
    const double rounded = dtype ? 1e-2 : 1e-5, alpha = 0.9, eps = 1e-5;
    const int64_t stride = layout == APART ? 2 * C : C, inner = N > 1 && N % 2 == 0 ? N / 2 : N, width = G ? C / G : C;
    const struct input rows = {NULL, 1, stride, 0, 1}, dense = {NULL, 1, C, 0, 1}, first = {NULL, inner, C * inner, 1, inner};
    const struct input at = layout == CHANNELS_FIRST ? first : rows, out = layout == CHANNELS_FIRST ? first : dense;
    const struct input dy_at = layout == CHANNELS_FIRST || layout == GRADIENT_CHANNELS_FIRST ? first : dense;
    const int centred = kind != SECOND_MOMENT, fill = kind == FILLED;
    const int64_t parts = 1 + centred + fill;
    void *x = elements(dtype, !N ? 0 : layout == CHANNELS_FIRST ? N * C : (N - 1) * stride + C), *dy = elements(dtype, N * C);
    void *y = memory((size_t)(N * C) * bytes), *dx = memory((size_t)(N * C) * bytes);
    float *weight = floats(C, 0.5f, 1.5f), *bias = floats(C, -1.0f, 1.0f), *mean = floats(C, -1.0f, 1.0f);
    float *moment = floats(C, 0.5f, 1.5f), *r = memory((size_t)(N * G) * 4), *saved = memory((size_t)C * 8);
    float *grad_weight = memory((size_t)C * 4), *grad_bias = memory((size_t)C * 4);
    double *tally = memory((size_t)(parts * C + 2) * 8), *tally_b = memory((size_t)((1 + centred) * C + 2) * 8);
    double *u = memory((size_t)(N * C) * 8), *du = memory((size_t)C * 8), *sums = calloc((size_t)C * 4 + 1, 8);
    uint8_t *valid = masked ? memory((size_t)N) : NULL;
    int64_t count = masked ? 0 : N;
    for (int64_t n = 0; n < N && masked; n++)
        count += valid[n] = masked == 1 && rand() % 3 > 0;
    const double number = fill ? (double)N : count ? (double)count : 1.0;
    for (int many = 0; many < 2; many++) {
        float *own_mean = copy(mean, (size_t)C * 4), *own_moment = copy(moment, (size_t)C * 4), iters = 3.0f;
        int status = pn_batch_forward(dtype, N, C, G, many ? 4 : 1, x, PLACE(at), valid, weight, bias, centred ? mean : NULL, moment,
                                      eps, fill, y, G ? r : NULL, saved, many ? NULL : tally,
                                      many && centred ? own_mean : NULL, many ? own_moment : NULL, many ? &iters : NULL, alpha);
        status |= pn_batch_backward(dtype, N, C, G, many ? 4 : 1, x, PLACE(at), dy, PLACE(dy_at), G ? r : NULL, valid, weight, saved,
                                    centred, fill, dx, grad_weight, grad_bias, many ? NULL : tally_b);
        expect(status == OK, "status of a pass over a batch", N, C, G);
        memset(sums, 0, (size_t)C * 32);
        for (int64_t n = 0; n < N; n++)
            for (int64_t c = 0; c < C; c++) {
                u[n * C + c] = element(dtype, x, place(&at, n, c)) * (G ? r[n * G + c / width] : 1.0);
                sums[c] += !valid || valid[n] ? u[n * C + c] : 0.0;
            }
        for (int64_t c = 0; c < C; c++) {
            const double whole = !centred ? 0.0 : count ? sums[c] / (double)count : mean[c];
            expect(near(saved[c], whole, 1.0, 1e-5), "mean", N, C, G);
            double square = 0.0, about_zero = 0.0;
            for (int64_t n = 0; n < N; n++) {
                const double centre = u[n * C + c] - whole, g = element(dtype, dy, place(&dy_at, n, c));
                const int counts = !valid || valid[n];
                square += counts ? centre * centre : 0.0;
                about_zero += counts ? u[n * C + c] * u[n * C + c] : 0.0;
                sums[C + c] += counts || !fill ? g : 0.0;
                sums[2 * C + c] += counts || !fill ? g * (u[n * C + c] - saved[c]) : 0.0;
                sums[3 * C + c] += g;
            }
            const double found = 1.0 / ((double)saved[C + c] * saved[C + c]) - eps, var = count ? square / number : moment[c];
            expect(near(found, var, 1.0, 1e-5), "moment", N, C, G);
            expect(near(grad_bias[c], sums[3 * C + c], 1.0, 4e-5), "gradient of bias of a batch", N, C, G);
            expect(near(grad_weight[c], sums[2 * C + c] * saved[C + c], 1.0 + saved[C + c], 4e-5), "gradient of weight", N, C, G);
            if (!many) {
                expect(near(tally[(centred ? 1 : 0) * C + c], about_zero, 1.0, 4e-5), "sum of squares of a batch", N, C, G);
                expect(!centred || near(tally[c], sums[c], 1.0, 4e-5), "sum", N, C, G);
                expect(!fill || tally[2 * C + c] == (double)N, "number of rows", N, C, G);
                expect(tally[parts * C] == (double)count && tally[parts * C + 1] == 1.0, "count", N, C, G);
                expect(tally_b[(1 + centred) * C] == (double)count, "count of a gradient", N, C, G);
                continue;
            }
            const double unbiased = centred && number > 1.0 ? var * number / (number - 1.0) : var;
            expect(iters == 4.0f, "step count of a batch", N, C, G);
            expect(near(own_moment[c], count ? alpha * moment[c] + (1.0 - alpha) * unbiased : moment[c], 1.0, 1e-5),
                   "running moment", N, C, G);
            expect(near(own_mean[c], count && centred ? alpha * mean[c] + (1.0 - alpha) * whole : mean[c], 1.0, 1e-5),
                   "running mean", N, C, G);
        }
        for (int64_t n = 0; n < N; n++) {
            const int counts = !valid || valid[n];
            for (int64_t first_channel = 0; first_channel < C; first_channel += width) {
                double along = 0.0, worst = 0.0;
                for (int64_t c = first_channel; c < first_channel + width; c++) {
                    const double centre = u[n * C + c] - saved[c], inv = saved[C + c], scale = inv * weight[c];
                    const double b = scale * inv * inv * sums[2 * C + c] / number;
                    const double wanted = !counts && fill ? bias[c] : centre * scale + bias[c];
                    expect(near(element(dtype, y, place(&out, n, c)), wanted, 1.0 + scale, rounded), "y of a batch", N, C, G);
                    du[c] = element(dtype, dy, place(&dy_at, n, c)) * scale;
                    if (counts)
                        du[c] -= centre * b + (centred ? scale * sums[C + c] / (count ? (double)count : 1.0) : 0.0);
                    along += du[c] * u[n * C + c] / (double)width;
                    worst = fmax(worst, scale + fabs(b) + fabs(du[c])); /* as large as what cancels out */
                }
                for (int64_t c = first_channel; c < first_channel + width; c++) {
                    const double root = G ? r[n * G + c / width] : 1.0;
                    const double wanted = !counts && fill ? 0.0 : root * (du[c] - (G ? u[n * C + c] * along : 0.0));
                    expect(near(element(dtype, dx, place(&out, n, c)), wanted, root * worst, rounded), "dx of a batch", N, C, G);
                }
            }
        }
        free(own_mean), free(own_moment);
    }
    int status = pn_batch_evaluate(dtype, N, C, G, 4, x, PLACE(at), weight, bias, mean, moment, eps, y);
    for (int64_t i = 0; i < N * C; i++) {
        const double scale = weight[i % C] / sqrt(moment[i % C] + eps);
        expect(near(element(dtype, y, place(&out, i / C, i % C)), (u[i] - mean[i % C]) * scale + bias[i % C], 1.0, rounded),
               "evaluation with a mean", N, C, G);
    }
    /* what may be missing is missing */
    status |= pn_batch_evaluate(dtype, N, C, G, 4, x, PLACE(at), NULL, NULL, mean, moment, eps, y);
    status |= pn_batch_forward(dtype, N, C, G, 4, x, PLACE(at), NULL, NULL, NULL, centred ? mean : NULL, moment, eps, fill, y,
                               G ? r : NULL, saved, NULL, NULL, NULL, NULL, 0.0);
    status |= pn_batch_backward(dtype, N, C, G, 4, x, PLACE(at), dy, PLACE(dy_at), G ? r : NULL, NULL, NULL, saved, centred, fill,
                                NULL, grad_weight, grad_bias, NULL);
    expect(status == OK, "the rest of a batch", N, C, G);
    /* a gradient of padding that is not finite is said to be so, and no gradient of x is written */
    if (count < N) {
        int64_t padded = 0;
        while (valid[padded])
            padded++;
        set_element(dtype, dy, place(&dy_at, padded, C - 1), INFINITY);
        memset(dx, 0xff, (size_t)(N * C) * bytes);
        status = pn_batch_backward(dtype, N, C, G, 4, x, PLACE(at), dy, PLACE(dy_at), G ? r : NULL, valid, weight, saved, centred,
                                   fill, dx, grad_weight, grad_bias, tally_b);
        expect(status == NOT_FINITE, "status of a gradient that is not finite", N, C, G);
        for (size_t i = 0; i < (size_t)(N * C) * bytes; i++)
            expect(((const uint8_t *)dx)[i] == 0xff, "dx that is not written", N, C, G);
    }
    void *all[] = {x, dy, y, dx, weight, bias, mean, moment, r, saved, grad_weight, grad_bias, tally, tally_b, u, du, sums, valid};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}
