/*
 * Runs every entry point of the C kernel over odd shapes, with threads of its own: for sanitizers, see
 * scripts/check_sanitizers.sh. Every buffer is exactly as large as it must be. Also checks that sums and outputs are
 * those of plain loops in float64, roughly, and that the number of threads changes nothing that can be seen.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *pn_use_instructions(int number);
void pn_use_threads(void (*run)(void (*)(void *), void *, unsigned, unsigned), int (*number)(void), int (*size)(void));
void pn_stream_from(int64_t bytes);
int pn_evaluate(int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, const float *, const float *,
                const float *, double, void *);
int pn_forward(int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, const uint8_t *, const float *,
               const float *, const float *, const float *, double, double, int, void *, float *, float *, double *, float *,
               float *, double, double, double);
int pn_backward(int, int64_t, int64_t, int64_t, int, const void *, int64_t, int64_t, int64_t, const void *, int64_t, int64_t,
                int64_t, const float *, const uint8_t *, const float *, const float *, const float *, double, double, void *,
                float *, float *, double *, float *, double, double);

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

static void parallel(void (*task)(void *), void *argument, unsigned threads, unsigned flags)
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

static int number(void)
{
    return self.number;
}

static int size(void)
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

/* One shape: all passes with one and with four threads. Rows of x lie apart by two rows if strided. */
static void check(int dtype, int64_t N, int64_t C, int64_t G, int masked, int strided)
{
    const size_t bytes = dtype ? 2 : 4;
    const int64_t stride = strided ? 2 * C : C, last = N ? (N - 1) * stride + C : 0;
    void *x = elements(dtype, last), *dy = elements(dtype, N * C);
    float *weight = floats(C, 0.5f, 1.5f), *bias = floats(C, -1.0f, 1.0f), *psi2 = floats(C, 0.5f, 1.5f);
    float *nu = floats(C, -1.0f, 1.0f), *r = memory((size_t)(N * G) * 4), *saved = memory((size_t)C * 12);
    float *grad_weight = memory((size_t)C * 4), *grad_bias = memory((size_t)C * 4), *phi = floats(C, 0.5f, 1.5f), iters = 0.0f;
    double *tally = memory((size_t)(C + 2) * 8), *tally_b = memory((size_t)(2 * C + 2) * 8);
    void *y[2] = {memory((size_t)(N * C) * bytes), memory((size_t)(N * C) * bytes)};
    void *dx[2] = {memory((size_t)(N * C) * bytes), memory((size_t)(N * C) * bytes)};
    uint8_t *valid = masked ? memory((size_t)N) : NULL;
    for (int64_t n = 0; n < N && masked; n++)
        valid[n] = masked == 1 && rand() % 3 > 0;
    for (int flags = 0; flags < 8; flags++) {
        for (int many = 0; many < 2; many++) {
            const int threads = many ? 4 : 1;
            int status = pn_forward(dtype, N, C, G, threads, x, 1, stride, 0, valid, weight, bias, psi2, flags & 2 ? psi2 : NULL,
                                    1e-5, flags & 4 ? 1.1 : INFINITY, flags, y[many], G ? r : NULL, saved, tally, NULL, NULL, 0,
                                    0, 0);
            status |= pn_backward(dtype, N, C, G, threads, x, 1, stride, 0, dy, 1, C, 0, G ? r : NULL, flags & 4 ? valid : NULL,
                                  weight, saved, nu, 0.1, 2.0, dx[many], grad_weight, grad_bias, tally_b, NULL, 0, 0);
            expect(status == 0, "status", N, C, G);
        }
        expect(!memcmp(y[0], y[1], (size_t)(N * C) * bytes), "y with threads", N, C, G);
        for (int64_t i = 0; i < N * C; i++)
            expect(close_to(element(dtype, dx[0], i), element(dtype, dx[1], i), dtype ? 1e-2 : 1e-5), "dx with threads", N, C, G);
    }
    for (int64_t i = 0; i < N * G; i++) {
        double squares = 0.0;
        for (int64_t c = 0; c < C / G; c++)
            squares += pow(element(dtype, x, i / G * stride + i % G * (C / G) + c), 2.0);
        expect(close_to(r[i], 1.0 / sqrt(squares / (double)(C / G) + 1e-5), 1e-5), "reciprocal root", N, C, G);
    }
    for (int64_t c = 0; c < C; c++) {
        double total = 0.0, sum = 0.0;
        for (int64_t n = 0; n < N; n++) {
            double u = element(dtype, x, n * stride + c);
            if (G)
                u *= r[n * G + c / (C / G)];
            if (!valid || valid[n]) {
                total += u * u;
                sum += element(dtype, dy, n * C + c); /* the last flags: padding is skipped */
            }
        }
        expect(close_to(tally[c], total, 1e-5), "sum of squares", N, C, G);
        expect(close_to(grad_bias[c], sum, 1e-5), "gradient of bias", N, C, G);
    }
    /* what may be missing is missing; the running statistics take their step */
    int status = pn_evaluate(dtype, N, C, G, 4, x, 1, stride, 0, NULL, NULL, NULL, 0.0, y[0]);
    status |= pn_evaluate(dtype, N, C, G, 4, x, 1, stride, 0, weight, bias, psi2, 1e-5, y[0]);
    status |= pn_forward(dtype, N, C, G, 4, x, 1, stride, 0, valid, NULL, NULL, phi, NULL, 1e-5, INFINITY, 2, NULL, NULL, saved,
                         NULL, phi, &iters, 0.9, INFINITY, 0.5);
    status |= pn_backward(dtype, N, C, G, 4, x, 1, stride, 0, dy, 1, C, 0, G ? r : NULL, valid, NULL, saved, nu, 0.1, 1.0, NULL,
                          grad_weight, grad_bias, NULL, nu, 0.1, -1.0);
    expect(status == 0 && iters == 1.0f, "the rest", N, C, G);
    void *all[] = {x, dy, weight, bias, psi2, nu, r, saved, grad_weight, grad_bias, phi, tally, tally_b, y[0], y[1], dx[0], dx[1],
                   valid};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i]);
}

int main(void)
{
    static const int64_t shapes[][2] = {{0, 8}, {1, 1}, {3, 1}, {1, 257}, {5, 64}, {70, 257}, {130, 96}, {140, 256}, {67, 1000}};
    const char *before = "";
    pn_use_threads(parallel, number, size);
    for (int set = 0; set < 3; set++) {
        const char *name = pn_use_instructions(set);
        if (!strcmp(name, before))
            break;
        before = name;
        for (int64_t bytes = 0; bytes < 2; bytes++) {
            pn_stream_from(bytes ? INT64_MAX : 0);
            for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
                for (int64_t groups = 0; groups <= 8; groups = groups ? 4 * groups - groups % 2 * 2 : 1) /* 0, 1, 2, 8 */
                    if (!groups || shapes[s][1] % groups == 0)
                        for (int dtype = 0; dtype < 2; dtype++)
                            for (int masked = 0; masked < 3; masked++)
                                check(dtype, shapes[s][0], shapes[s][1], groups, masked, masked == 1);
        }
        printf("%s: no fault\n", name);
    }
    return 0;
}
