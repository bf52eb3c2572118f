/*
 * Runs every entry point of the C kernel over odd shapes, with threads of its own, for the compiler's sanitizers: see
 * sanitizers.sh. Every buffer is exactly as large as it must be. Sums, outputs, gradients of statistics of the batch and steps of
 * the statistics are those of plain loops in float64, roughly, and the number of threads changes nothing that can be seen.
 *
 * The kernel is included, not linked: a call that no longer fits its entry point does not compile.
 */
#include "../../fairseq_powernorm/kernels/csrc/powernorm.c"

#include <pthread.h>
#include <stdio.h>

/* ---------------------------------------------------------------- threads in place of OpenMP's */

struct member {
    void (*task)(void *);
    void *argument;
    int number, size;
};
static _Thread_local struct member self;

static void *start(void *argument)
{
    self = *(struct member *)argument;
    self.task(self.argument);
    return NULL;
}

static void run_team(void (*task)(void *), void *argument, unsigned threads, unsigned flags)
{
    (void)flags;
    pthread_t ids[64];
    struct member members[64];
    for (unsigned i = 0; i < threads; i++) {
        members[i] = (struct member){task, argument, (int)i, (int)threads};
        if (pthread_create(&ids[i], NULL, start, &members[i]))
            abort();
    }
    for (unsigned i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
}

static int member_number(void)
{
    return self.number;
}

static int member_team_size(void)
{
    return self.size;
}

/* ---------------------------------------------------------------- buffers */

static void *memory(size_t bytes)
{
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 1))
        abort();
    memset(p, 0xff, bytes); /* NaN: what is not written is seen */
    return p;
}

static float *floats(int64_t n, float low, float high)
{
    float *p = memory((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        p[i] = low + (high - low) * (float)rand() / (float)RAND_MAX;
    return p;
}

static void *elements(int dtype, int64_t n)
{
    float *p = floats(n, -2.0f, 2.0f);
    if (!dtype)
        return p;
    uint16_t *h = memory((size_t)n * sizeof(uint16_t));
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &p[i], 4);
        h[i] = (uint16_t)(bits >> 16);
    }
    free(p);
    return h;
}

static double element(int dtype, const void *p, int64_t i)
{
    if (!dtype)
        return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void set_element(int dtype, void *p, int64_t i, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (dtype)
        ((uint16_t *)p)[i] = (uint16_t)(bits >> 16);
    else
        ((float *)p)[i] = value;
}

static void *copy(const void *from, size_t bytes)
{
    return memcpy(memory(bytes), from, bytes);
}

static void expect(int right, const char *what, int64_t rows, int64_t channels, int64_t groups)
{
    if (!right) {
        fprintf(stderr, "wrong: %s at %lld x %lld, %lld groups\n", what, (long long)rows, (long long)channels, (long long)groups);
        exit(1);
    }
}

static int close_to(double a, double b, double tolerance)
{
    return fabs(a - b) <= tolerance * (1.0 + fabs(b));
}

#define PLACE(in) in.inner, in.outer_stride, in.inner_stride, in.channel_stride

static int64_t place(const struct input *in, int64_t row, int64_t channel)
{
    return offset(in, row) + channel * in->channel_stride;
}

enum { ROWS, APART, CHANNELS_FIRST, GRADIENT_CHANNELS_FIRST };

/*
 * One shape: all passes with one and with four threads. Rows of x lie side by side, apart by two rows, or with their channels
 * before them, in one or two examples; so do those of dy, or dy only.
 */
static void check(int dtype, int64_t N, int64_t C, int64_t G, int masked, int layout)
{
    const size_t bytes = dtype ? 2 : 4;
    const int64_t stride = layout == APART ? 2 * C : C, inner = N > 1 && N % 2 == 0 ? N / 2 : N;
    const struct input rows = {NULL, 1, stride, 0, 1}, dense = {NULL, 1, C, 0, 1}, first = {NULL, inner, C * inner, 1, inner};
    const struct input at = layout == CHANNELS_FIRST ? first : rows;
    const struct input dy_at = layout == CHANNELS_FIRST || layout == GRADIENT_CHANNELS_FIRST ? first : dense;
    void *x = elements(dtype, !N ? 0 : layout == CHANNELS_FIRST ? N * C : (N - 1) * stride + C), *dy = elements(dtype, N * C);
    float *weight = floats(C, 0.5f, 1.5f), *bias = floats(C, -1.0f, 1.0f), *psi2 = floats(C, 0.5f, 1.5f);
    float *nu = floats(C, -1.0f, 1.0f), *r = memory((size_t)(N * G) * 4), *saved = memory((size_t)C * 12);
    float *grad_weight = memory((size_t)C * 4), *grad_bias = memory((size_t)C * 4);
    double *tally = memory((size_t)(C + 2) * 8), *tally_b = memory((size_t)(2 * C + 2) * 8);
    void *y[2] = {memory((size_t)(N * C) * bytes), memory((size_t)(N * C) * bytes)};
    void *dx[2] = {memory((size_t)(N * C) * bytes), memory((size_t)(N * C) * bytes)};
    uint8_t *valid = masked ? memory((size_t)N) : NULL;
    for (int64_t n = 0; n < N && masked; n++)
        valid[n] = masked == 1 && rand() % 3 > 0;
    for (int flags = 0; flags < 8; flags++) {
        for (int many = 0; many < 2; many++) {
            const int threads = many ? 4 : 1;
            int status = pn_forward(dtype, N, C, G, threads, x, PLACE(at), valid, weight, bias, psi2, flags & 2 ? psi2 : NULL,
                                    1e-5, flags & 4 ? 1.1 : INFINITY, flags, y[many], G ? r : NULL, saved, tally, NULL, NULL, 0,
                                    0, 0, 0);
            status |= pn_backward(dtype, N, C, G, threads, x, PLACE(at), dy, PLACE(dy_at), G ? r : NULL, flags & 4 ? valid : NULL,
                                  weight, saved, nu, 0.1, 2.0, dx[many], grad_weight, grad_bias, tally_b, NULL, 0, 0);
            expect(status == OK, "status", N, C, G);
        }
        expect(!memcmp(y[0], y[1], (size_t)(N * C) * bytes), "y with threads", N, C, G);
        for (int64_t i = 0; i < N * C; i++)
            expect(close_to(element(dtype, dx[0], i), element(dtype, dx[1], i), dtype ? 1e-2 : 1e-5), "dx with threads", N, C, G);
    }
    for (int64_t i = 0; i < N * G; i++) {
        double squares = 0.0;
        for (int64_t c = 0; c < C / G; c++)
            squares += pow(element(dtype, x, place(&at, i / G, i % G * (C / G) + c)), 2.0);
        expect(close_to(r[i], 1.0 / sqrt(squares / (double)(C / G) + 1e-5), 1e-5), "reciprocal root", N, C, G);
    }
    for (int64_t c = 0; c < C; c++) {
        double total = 0.0, sum = 0.0;
        for (int64_t n = 0; n < N; n++) {
            double u = element(dtype, x, place(&at, n, c));
            if (G)
                u *= r[n * G + c / (C / G)];
            if (!valid || valid[n]) {
                total += u * u;
                sum += element(dtype, dy, place(&dy_at, n, c)); /* the last flags: padding is skipped */
            }
        }
        expect(close_to(tally[c], total, 4e-5), "sum of squares", N, C, G);
        expect(close_to(grad_bias[c], sum, 4e-5), "gradient of bias", N, C, G);
    }
    /* what may be missing is missing */
    int status = pn_evaluate(dtype, N, C, G, 4, x, PLACE(at), NULL, NULL, NULL, 0.0, y[0]);
    status |= pn_evaluate(dtype, N, C, G, 4, x, PLACE(at), weight, bias, psi2, 1e-5, y[0]);
    status |= pn_forward(dtype, N, C, G, 4, x, PLACE(at), valid, NULL, NULL, psi2, NULL, 1e-5, INFINITY, BACKWARD_BATCH, NULL,
                         NULL, saved, NULL, NULL, NULL, 0, 0, 0, 0);
    status |= pn_backward(dtype, N, C, G, 4, x, PLACE(at), dy, PLACE(dy_at), G ? r : NULL, valid, NULL, saved, nu, 0.1, 1.0, NULL,
                          grad_weight, grad_bias, NULL, NULL, 0, 0);
    expect(status == OK, "the rest", N, C, G);
    void *all[] = {x, dy, weight, bias, psi2, nu, r, saved, grad_weight, grad_bias, tally, tally_b, y[0], y[1], dx[0], dx[1],
                   valid};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}

/* Constants of the statistics' step. */
static const double ALPHA = 0.9, EPS = 1e-5, WARMUP = 5.0, TRUSTED_AFTER = 4.0, JUMP = 1.1, SCALE = 0.1, LOWEST = 0.5;

/*
 * The step that a pass takes is that of pn_advance_forward or pn_advance_backward with the pass's sums, bit for bit. With an
 * infinite value in the middle row, it is not taken if that row counts, and nothing is changed if it does not.
 */
static void check_own_step(int dtype, int64_t N, int64_t C, int64_t G, int masked, int infinite)
{
    const int64_t middle = N / 2;
    const size_t size = (size_t)C * sizeof(float);
    void *x = elements(dtype, N * C), *dy = elements(dtype, N * C), *dx = memory((size_t)(N * C) * (dtype ? 2 : 4));
    float *psi2 = floats(C, 0.5f, 1.5f), *nu = floats(C, -1.0f, 1.0f), *r = memory((size_t)(N * G) * 4);
    float *saved = memory(3 * size), *grad_weight = memory(size), *grad_bias = memory(size);
    double *tally = memory((size_t)(C + 2) * 8), *tally_b = memory((size_t)(2 * C + 2) * 8);
    uint8_t *valid = masked ? memory((size_t)N) : NULL;
    int counts = N > 0;
    for (int64_t n = 0; n < N && masked; n++)
        valid[n] = n % 2 == (masked == 2);
    if (masked && N)
        counts = valid[middle];
    for (int with_tally = 0; with_tally < 2; with_tally++) {
        float *own_psi2 = copy(psi2, size), *own_nu = copy(nu, size), iters = 3.0f, expected_iters = 3.0f;
        float *expected_psi2 = copy(psi2, size), *expected_nu = copy(nu, size);
        for (int own = 0; own < 2; own++) { /* the sums first, then the step */
            for (int64_t i = 0; i < 2 && infinite && N; i++)
                set_element(dtype, x, middle * C + i * (C - 1), i ? -INFINITY : INFINITY);
            int status = pn_forward(dtype, N, C, G, 4, x, 1, C, 0, 1, valid, NULL, NULL, own ? own_psi2 : psi2, NULL, EPS, INFINITY,
                                    SKIP_PADDING, NULL, G ? r : NULL, saved, own && !with_tally ? NULL : tally,
                                    own ? own_psi2 : NULL, own ? &iters : NULL, ALPHA, WARMUP, TRUSTED_AFTER, JUMP);
            expect(status == OK, "status of a forward pass with a step", N, C, G);
            status = pn_backward(dtype, N, C, G, 4, x, 1, C, 0, 1, dy, 1, C, 0, 1, G ? r : NULL, valid, NULL, saved, own ? own_nu : nu,
                                 SCALE, 1.0, dx, grad_weight, grad_bias, own && !with_tally ? NULL : tally_b,
                                 own ? own_nu : NULL, SCALE, LOWEST);
            expect(status == (infinite && counts ? NOT_FINITE : OK), "status of a backward pass with a step", N, C, G);
        }
        if (infinite && counts) {
            expected_iters = 4.0f; /* such a batch is counted */
        } else {
            pn_advance_forward(1, C, tally, expected_psi2, &expected_iters, ALPHA, EPS, WARMUP, TRUSTED_AFTER, JUMP);
            pn_advance_backward(1, C, tally_b, expected_nu, SCALE, LOWEST);
        }
        expect(iters == expected_iters, "step count of a pass", N, C, G);
        expect(!memcmp(own_psi2, expected_psi2, size), "psi^2 after a pass", N, C, G);
        expect(!memcmp(own_nu, expected_nu, size), "nu after a pass", N, C, G);
        free(own_psi2), free(own_nu), free(expected_psi2), free(expected_nu);
    }
    void *all[] = {x, dy, dx, psi2, nu, r, saved, grad_weight, grad_bias, tally, tally_b, valid};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}

#include "sanitize_batch.h"

enum { ORDINARY, NO_CALL, NO_ROW, NAN_SUM, INFINITE_SUM, KINDS };

/* One step of several norms, the kinds of their sums in turn from the given one on, before, during and after the warm-up. */
static void check_advance(int64_t norms, int64_t C, int first_kind, float steps_before)
{
    double *tally = memory((size_t)(norms * (C + 2)) * 8), *tally_b = memory((size_t)(norms * (2 * C + 2)) * 8);
    float *psi2 = floats(norms * C, 0.5f, 1.5f), *nu = floats(norms * C, -1.0f, 1.0f), *iters = memory((size_t)norms * 4);
    float *sums = floats(norms * C, 0.0f, 20.0f), *sums_b = floats(norms * 2 * C, 0.0f, 80.0f);
    for (int64_t n = 0; n < norms; n++) {
        const int kind = (int)(first_kind + n) % KINDS;
        const double rows = kind == NO_ROW || kind == NO_CALL ? 0.0 : 7.0, calls = kind == NO_CALL ? 0.0 : 2.0;
        double *row = tally + n * (C + 2), *row_b = tally_b + n * (2 * C + 2);
        for (int64_t c = 0; c < C; c++)
            row[c] = rows > 0.0 ? sums[n * C + c] : 0.0;
        for (int64_t c = 0; c < 2 * C; c++)
            row_b[c] = rows > 0.0 ? sums_b[n * 2 * C + c] : 0.0;
        if (kind == NAN_SUM || kind == INFINITE_SUM)
            row[C - 1] = row_b[C - 1] = kind == NAN_SUM ? NAN : -INFINITY;
        row[C] = row_b[2 * C] = rows;
        row[C + 1] = row_b[2 * C + 1] = calls;
        iters[n] = steps_before;
    }
    float *old_psi2 = copy(psi2, (size_t)(norms * C) * 4), *old_nu = copy(nu, (size_t)(norms * C) * 4);
    pn_advance_forward(norms, C, tally, psi2, iters, ALPHA, EPS, WARMUP, TRUSTED_AFTER, JUMP);
    pn_advance_backward(norms, C, tally_b, nu, SCALE, LOWEST);
    for (int64_t n = 0; n < norms; n++) {
        const int kind = (int)(first_kind + n) % KINDS;
        const double number = (double)steps_before + 1.0;
        expect(iters[n] == (float)(kind == NO_CALL ? steps_before : number), "step count", norms, C, 0);
        for (int64_t c = 0; c < C; c++) {
            const int64_t i = n * C + c;
            double moment = tally[n * (C + 2) + c] / 7.0, kept = 1.0 - SCALE * tally_b[n * (2 * C + 2) + C + c] / 7.0;
            if (kind != ORDINARY) {
                expect(psi2[i] == old_psi2[i] && nu[i] == old_nu[i], "a statistic that must stay", norms, C, 0);
                continue;
            }
            if (number > TRUSTED_AFTER)
                moment = fmin(moment, JUMP * (old_psi2[i] + EPS));
            const double before = number < WARMUP ? old_psi2[i] + (moment - old_psi2[i]) / number : old_psi2[i];
            expect(close_to(psi2[i], ALPHA * before + (1.0 - ALPHA) * moment, 1e-6), "psi^2", norms, C, 0);
            const double grad_z = tally_b[n * (2 * C + 2) + c] / 7.0;
            expect(close_to(nu[i], old_nu[i] * fmax(kept, LOWEST) + grad_z, 1e-6), "nu", norms, C, 0);
        }
    }
    void *all[] = {tally, tally_b, psi2, nu, iters, sums, sums_b, old_psi2, old_nu};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}

/* With a number: the first so many shapes only, in a fraction of the time. */
int main(int count, char **arguments)
{
    static const int64_t shapes[][2] = {{0, 8}, {1, 1}, {3, 1}, {1, 257}, {5, 64}, {70, 257}, {130, 96}, {140, 256}, {67, 1104}};
    static const int64_t channels[] = {1, 5, 257};
    static const int others[] = {ROWS, APART, GRADIENT_CHANNELS_FIRST};
    const size_t all = sizeof(shapes) / sizeof(shapes[0]), taken = count > 1 ? strtoul(arguments[1], NULL, 10) : all;
    const char *before = "";
    if (!taken || taken > all) {
        fprintf(stderr, "error: %s: must be from 1 to %zu\n", arguments[1], all);
        return 2;
    }
    for (size_t c = 0; c < sizeof(channels) / sizeof(channels[0]); c++)
        for (int step = 0; step < 3; step++)
            for (int kind = 0; kind < KINDS; kind++)
                for (int64_t norms = 0; norms <= 9; norms = 3 * norms + (norms == 0)) /* 0, 1, 3, 9 */
                    check_advance(norms, channels[c], kind, (float)(step * 4));
    pn_use_threads(run_team, member_number, member_team_size);
    for (int set = 0; set < 3; set++) {
        const char *name = pn_use_instructions(set);
        if (!strcmp(name, before))
            break;
        before = name;
        for (int large = 0; large < 3; large++) {
            pn_stream_from(large ? 0 : INT64_MAX);
            pn_far_from(large > 1 ? 0 : INT64_MAX);
            for (size_t s = 0; s < taken; s++)
                for (int64_t groups = 0; groups <= 8; groups = groups ? 4 * groups - groups % 2 * 2 : 1) /* 0, 1, 2, 8 */
                    if (!groups || shapes[s][1] % groups == 0)
                        for (int dtype = 0; dtype < 2; dtype++)
                            for (int masked = 0; masked < 3; masked++) {
                                check(dtype, shapes[s][0], shapes[s][1], groups, masked, masked == 1 ? APART : ROWS);
                                check(dtype, shapes[s][0], shapes[s][1], groups, masked,
                                      masked == 2 ? GRADIENT_CHANNELS_FIRST : CHANNELS_FIRST);
                                for (int kind = 0; kind < BATCH_KINDS; kind++) {
                                    check_batch(dtype, shapes[s][0], shapes[s][1], groups, masked, CHANNELS_FIRST, kind);
                                    check_batch(dtype, shapes[s][0], shapes[s][1], groups, masked, others[(masked + kind) % 3], kind);
                                }
                                for (int infinite = 0; infinite < 2; infinite++)
                                    check_own_step(dtype, shapes[s][0], shapes[s][1], groups, masked, infinite);
                            }
        }
        printf("%s: no fault\n", name);
    }
    return 0;
}
