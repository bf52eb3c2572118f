/*
 * The sweeps over rows. Included by powernorm.c once for every element type and instruction set, with
 *   NAME(name)   the name of a function for them
 *   LANES        float lanes of a vector: 16, 8 or 4
 *   BF16         1: elements are bfloat16, 0: float32
 *   STREAM(p, v) store the vector v at the aligned address p past the caches
 * Arithmetic is float32. Vectors are those of GCC and clang, so that the text is the same for every instruction set.
 *
 * Channels are worked on in pairs of vectors. Of 2 LANES bfloat16 elements, the first vector takes the even ones and the
 * second the odd ones, which needs no shuffle; everything that is kept per channel is in that order: see position().
 */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES)));
typedef float NAME(vec_unaligned) __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(bits) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(half) __attribute__((vector_size(2 * LANES)));
#define vec NAME(vec)
#define bits NAME(bits)
#define half NAME(half)
struct NAME(pair) {
    vec v[2];
};
#define pair struct NAME(pair)

INLINE vec NAME(floats)(const void *p)
{
    return *(const NAME(vec_unaligned) *)p;
}

INLINE void NAME(add)(float *p, vec v)
{
    *(NAME(vec_unaligned) *)p += v;
}

INLINE void NAME(put)(void *p, vec v, int stream)
{
    if (stream)
        STREAM(p, v);
    else
        *(NAME(vec_unaligned) *)p = v;
}

#if BF16
#define element uint16_t

/* Round to nearest, ties to even. NaN stays NaN because the low half of its bits is zero here: see channel_value(). */
INLINE bits NAME(round)(vec v)
{
    bits b = (bits)v;
    return b + 0x7fff + ((b >> 16) & 1);
}

INLINE pair NAME(load)(const element *p)
{
    bits b = (bits)NAME(floats)(p);
    return (pair){{(vec)(b << 16), (vec)(b & 0xffff0000)}};
}

INLINE void NAME(store)(element *p, pair q, int stream)
{
    NAME(put)(p, (vec)((NAME(round)(q.v[0]) >> 16) | (NAME(round)(q.v[1]) & 0xffff0000)), stream);
}

/* The first n <= LANES elements; zeros behind them. */
INLINE vec NAME(load_part)(const element *p, int64_t n)
{
    half h = {0};
    memcpy(&h, p, (size_t)n * sizeof(element));
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

INLINE void NAME(store_part)(element *p, vec v, int64_t n)
{
    half h = __builtin_convertvector(NAME(round)(v) >> 16, half);
    memcpy(p, &h, (size_t)n * sizeof(element));
}
#else
#define element float

INLINE pair NAME(load)(const element *p)
{
    return (pair){{NAME(floats)(p), NAME(floats)(p + LANES)}};
}

INLINE void NAME(store)(element *p, pair q, int stream)
{
    NAME(put)(p, q.v[0], stream);
    NAME(put)(p + LANES, q.v[1], stream);
}

INLINE vec NAME(load_part)(const element *p, int64_t n)
{
    vec v = {0};
    memcpy(&v, p, (size_t)n * sizeof(element));
    return v;
}

INLINE void NAME(store_part)(element *p, vec v, int64_t n)
{
    memcpy(p, &v, (size_t)n * sizeof(element));
}
#endif

INLINE vec NAME(floats_part)(const float *p, int64_t n)
{
    vec v = {0};
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
}

INLINE void NAME(add_part)(float *p, vec v, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        p[i] += v[i];
}

INLINE float NAME(lanes_sum)(vec v)
{
#if LANES == 16
    v += SHUFFLE(v, NAME(ints), 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SHUFFLE(v, NAME(ints), 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += SHUFFLE(v, NAME(ints), 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif LANES == 8
    v += SHUFFLE(v, NAME(ints), 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLE(v, NAME(ints), 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += SHUFFLE(v, NAME(ints), 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

/* Ask for the elements of a pair before they are needed. */
INLINE void NAME(prefetch)(const element *p)
{
    __builtin_prefetch(p, 0, 3);
    if (2 * LANES * sizeof(element) > 64)
        __builtin_prefetch((const char *)p + 64, 0, 3);
}

/* Number of channels, of the `left` that remain, that the next vector takes where they are no pair of vectors. */
INLINE int64_t NAME(next)(int64_t left)
{
    return left < LANES ? left : LANES;
}

/* Sum of x^2 over n channels: in float32 over SPAN of them at most, in float64 beyond. */
INLINE double NAME(squares)(const element *x, int64_t n)
{
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += SPAN) {
        int64_t end = begin + SPAN < n ? begin + SPAN : n, c = begin;
        vec s0 = {0}, s1 = {0};
        for (; c + 2 * LANES <= end; c += 2 * LANES) {
            pair p = NAME(load)(x + c);
            s0 += p.v[0] * p.v[0];
            s1 += p.v[1] * p.v[1];
        }
        for (; c < end; c += LANES) {
            vec v = NAME(load_part)(x + c, NAME(next)(end - c));
            s0 += v * v;
        }
        total += NAME(lanes_sum)(s0 + s1);
    }
    return total;
}

/*
 * Sum over n channels of u * (dy * a - u * b) with u = x * r: dL/du * u before the layer scale's own gradient. Meanwhile the
 * memory at `next` is asked for.
 */
INLINE double NAME(products)(
    const element *x, const element *dy, const element *next, float r, const float *a, const float *b, int64_t n)
{
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += SPAN) {
        int64_t end = begin + SPAN < n ? begin + SPAN : n, c = begin;
        vec s0 = {0}, s1 = {0};
        for (; c + 2 * LANES <= end; c += 2 * LANES) {
            pair p = NAME(load)(x + c), q = NAME(load)(dy + c);
            NAME(prefetch)(next + c);
            vec u0 = p.v[0] * r, u1 = p.v[1] * r;
            s0 += u0 * (q.v[0] * NAME(floats)(a + c) - u0 * NAME(floats)(b + c));
            s1 += u1 * (q.v[1] * NAME(floats)(a + c + LANES) - u1 * NAME(floats)(b + c + LANES));
        }
        for (; c < end; c += LANES) {
            int64_t some = NAME(next)(end - c);
            vec u = NAME(load_part)(x + c, some) * r;
            s0 += u * (NAME(load_part)(dy + c, some) * NAME(floats_part)(a + c, some) - u * NAME(floats_part)(b + c, some));
        }
        total += NAME(lanes_sum)(s0 + s1);
    }
    return total;
}

/*
 * R rows forward: r (if the layer scale is on), y = u * scale + shift (if write), acc += u^2 (if acc). Meanwhile the memory of
 * the rows that stand `ahead` in the list is asked for. R, write and stream are constants after inlining.
 */
INLINE void NAME(forward_rows)(
    const int R, const int write, const int stream, const struct forward *job, const int64_t *rows, int64_t ahead, float *acc,
    float *scratch)
{
    const int64_t width = job->width;
    const element *x[4], *next[4];
    element *y[4];
    for (int k = 0; k < R; k++) {
        x[k] = (const element *)job->x.data + offset(&job->x, rows[k]);
        next[k] = (const element *)job->x.data + offset(&job->x, rows[k + ahead]);
        y[k] = write ? (element *)job->y + rows[k] * job->y_stride : 0;
    }
    if (job->scaled)
        for (int k = 0; k < R; k++)
            for (int64_t group = 0; group < job->blocks; group++)
                scratch[4 * group + k] = (float)(
                    1.0 / sqrt(NAME(squares)(x[k] + group * width, width) / (double)width + job->scale_eps));
    for (int64_t group = 0; group < job->blocks; group++) {
        const int64_t last = (group + 1) * width;
        int64_t c = group * width;
        float r[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if (job->scaled)
            for (int k = 0; k < R; k++) {
                r[k] = scratch[4 * group + k];
                if (job->r)
                    job->r[rows[k] * job->blocks + group] = r[k];
            }
        for (; c + 2 * LANES <= last; c += 2 * LANES) {
            const vec scale0 = NAME(floats)(job->scale + c), scale1 = NAME(floats)(job->scale + c + LANES);
            const vec shift0 = NAME(floats)(job->shift + c), shift1 = NAME(floats)(job->shift + c + LANES);
            vec sum0 = {0}, sum1 = {0};
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                pair u = NAME(load)(x[k] + c);
                if (R > 1)
                    NAME(prefetch)(next[k] + c);
                u.v[0] *= r[k];
                u.v[1] *= r[k];
                sum0 += u.v[0] * u.v[0];
                sum1 += u.v[1] * u.v[1];
                u.v[0] = u.v[0] * scale0 + shift0;
                u.v[1] = u.v[1] * scale1 + shift1;
                if (write)
                    NAME(store)(y[k] + c, u, stream);
            }
            if (acc) {
                NAME(add)(acc + c, sum0);
                NAME(add)(acc + c + LANES, sum1);
            }
        }
        for (; c < last; c += LANES) {
            const int64_t some = NAME(next)(last - c);
            const vec scale = NAME(floats_part)(job->scale + c, some), shift = NAME(floats_part)(job->shift + c, some);
            vec sum = {0};
            for (int k = 0; k < R; k++) {
                vec u = NAME(load_part)(x[k] + c, some) * r[k];
                sum += u * u;
                if (write)
                    NAME(store_part)(y[k] + c, u * scale + shift, some);
            }
            if (acc)
                NAME(add_part)(acc + c, sum, some);
        }
    }
}

/*
 * R rows backward: du = dy * a - u * b, dx = r * (du - u * mean(du * u)) (if write), acc_g += dy, acc_gu += dy * u.
 */
INLINE void NAME(backward_rows)(
    const int R, const int write, const int stream, const struct backward *job, const int64_t *rows, int64_t ahead,
    float *acc_g, float *acc_gu, float *scratch)
{
    const int64_t width = job->width;
    const element *x[4], *dy[4], *next_x[4], *next_dy[4];
    element *dx[4];
    for (int k = 0; k < R; k++) {
        x[k] = (const element *)job->x.data + offset(&job->x, rows[k]);
        dy[k] = (const element *)job->dy.data + offset(&job->dy, rows[k]);
        next_x[k] = (const element *)job->x.data + offset(&job->x, rows[k + ahead]);
        next_dy[k] = (const element *)job->dy.data + offset(&job->dy, rows[k + ahead]);
        dx[k] = write ? (element *)job->dx + rows[k] * job->dx_stride : 0;
    }
    const int products = job->r && write;
    if (products)
        for (int k = 0; k < R; k++)
            for (int64_t group = 0; group < job->blocks; group++) {
                const int64_t first = group * width;
                scratch[4 * group + k] = (float)(
                    NAME(products)(x[k] + first, dy[k] + first, next_x[k] + first, job->r[rows[k] * job->blocks + group],
                                   job->a + first, job->b + first, width) / (double)width);
            }
    for (int64_t group = 0; group < job->blocks; group++) {
        const int64_t last = (group + 1) * width;
        int64_t c = group * width;
        float r[4] = {1.0f, 1.0f, 1.0f, 1.0f}, mean[4] = {0};
        if (job->r)
            for (int k = 0; k < R; k++) {
                r[k] = job->r[rows[k] * job->blocks + group];
                mean[k] = write ? scratch[4 * group + k] : 0.0f;
            }
        for (; c + 2 * LANES <= last; c += 2 * LANES) {
            const vec a0 = NAME(floats)(job->a + c), a1 = NAME(floats)(job->a + c + LANES);
            const vec b0 = NAME(floats)(job->b + c), b1 = NAME(floats)(job->b + c + LANES);
            vec g0 = {0}, g1 = {0}, gu0 = {0}, gu1 = {0};
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                pair u = NAME(load)(x[k] + c), g = NAME(load)(dy[k] + c);
                if (R > 1) {
                    if (!products)
                        NAME(prefetch)(next_x[k] + c);
                    NAME(prefetch)(next_dy[k] + c);
                }
                u.v[0] *= r[k];
                u.v[1] *= r[k];
                g0 += g.v[0];
                g1 += g.v[1];
                gu0 += g.v[0] * u.v[0];
                gu1 += g.v[1] * u.v[1];
                g.v[0] = (g.v[0] * a0 - u.v[0] * (b0 + mean[k])) * r[k];
                g.v[1] = (g.v[1] * a1 - u.v[1] * (b1 + mean[k])) * r[k];
                if (write)
                    NAME(store)(dx[k] + c, g, stream);
            }
            NAME(add)(acc_g + c, g0);
            NAME(add)(acc_g + c + LANES, g1);
            NAME(add)(acc_gu + c, gu0);
            NAME(add)(acc_gu + c + LANES, gu1);
        }
        for (; c < last; c += LANES) {
            const int64_t some = NAME(next)(last - c);
            const vec a = NAME(floats_part)(job->a + c, some), b = NAME(floats_part)(job->b + c, some);
            vec sum_g = {0}, sum_gu = {0};
            for (int k = 0; k < R; k++) {
                vec u = NAME(load_part)(x[k] + c, some) * r[k], g = NAME(load_part)(dy[k] + c, some);
                sum_g += g;
                sum_gu += g * u;
                if (write)
                    NAME(store_part)(dx[k] + c, (g * a - u * (b + mean[k])) * r[k], some);
            }
            NAME(add_part)(acc_g + c, sum_g, some);
            NAME(add_part)(acc_gu + c, sum_gu, some);
        }
    }
}

/* n rows of one kind, four at a time or one by one; AHEAD more stand behind them. */
static void NAME(forward_list)(const struct forward *job, const int64_t *rows, int64_t n, float *acc, float *scratch)
{
    int64_t i = 0;
    for (; !job->single && i + 4 <= n; i += 4) {
        if (!job->y)
            NAME(forward_rows)(4, 0, 0, job, rows + i, AHEAD, acc, scratch);
        else if (job->stream)
            NAME(forward_rows)(4, 1, 1, job, rows + i, AHEAD, acc, scratch);
        else
            NAME(forward_rows)(4, 1, 0, job, rows + i, AHEAD, acc, scratch);
    }
    for (; i < n; i++) {
        if (!job->y)
            NAME(forward_rows)(1, 0, 0, job, rows + i, 0, acc, scratch);
        else if (job->stream)
            NAME(forward_rows)(1, 1, 1, job, rows + i, 0, acc, scratch);
        else
            NAME(forward_rows)(1, 1, 0, job, rows + i, 0, acc, scratch);
    }
}

static void NAME(backward_list)(
    const struct backward *job, const int64_t *rows, int64_t n, float *acc_g, float *acc_gu, float *scratch)
{
    int64_t i = 0;
    for (; !job->single && i + 4 <= n; i += 4) {
        if (!job->dx)
            NAME(backward_rows)(4, 0, 0, job, rows + i, AHEAD, acc_g, acc_gu, scratch);
        else if (job->stream)
            NAME(backward_rows)(4, 1, 1, job, rows + i, AHEAD, acc_g, acc_gu, scratch);
        else
            NAME(backward_rows)(4, 1, 0, job, rows + i, AHEAD, acc_g, acc_gu, scratch);
    }
    for (; i < n; i++) {
        if (!job->dx)
            NAME(backward_rows)(1, 0, 0, job, rows + i, 0, acc_g, acc_gu, scratch);
        else if (job->stream)
            NAME(backward_rows)(1, 1, 1, job, rows + i, 0, acc_g, acc_gu, scratch);
        else
            NAME(backward_rows)(1, 1, 0, job, rows + i, 0, acc_g, acc_gu, scratch);
    }
}

#include "batch_sweeps.h"

#undef vec
#undef bits
#undef half
#undef pair
#undef element
