/*
 * Power Normalization on a CPU: forward and backward pass as one sweep over the rows each. Plain C ABI, no dependence on
 * torch or Python: kernels/c.py calls it through ctypes. The arithmetic is that of kernels/eager.py.
 *
 * Channels of a row need not be adjacent: see tiles.h. Rows are worked on in blocks of BLOCK: within one, per-channel sums are
 * float32, the blocks' totals are added up in float64. The blocks are shared out to the threads in fixed, contiguous parts, and
 * the parts' totals are added up in order, so that results do not depend on which thread is faster; the last bit of a float64
 * total may depend on their number.
 *
 * One long file, since it is one translation unit: the headers beside it are included here, sweeps.h once for each set of
 * instructions and each type, so that the compiler sees callers and sweeps together and nothing but the entry points is exported.
 *
 * Threads are not made here: pn_use_threads is given the entry point of the OpenMP runtime that the process has.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && !defined(PN_GENERIC) /* PN_GENERIC: as on any other processor */
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define SHUFFLE(v, type, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, type, ...) __builtin_shuffle(v, (type){__VA_ARGS__})
#endif

enum { BLOCK = 64, SPAN = 4096, AHEAD = 4 };
/* elements for which it pays to wake another thread */
enum { GRAIN = 16384 };
static const double LAYER_SCALE_EPS = 1e-5;

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { OK = 0, NO_MEMORY = 1, NOT_FINITE = 2 };
enum { FORWARD_BATCH = 1, BACKWARD_BATCH = 2, SKIP_PADDING = 4 };

/*
 * Row n lies at data + (n / inner) * outer_stride + (n % inner) * inner_stride elements, its channels channel_stride apart: 1,
 * or rows are adjacent instead (inner_stride 1), as in B x C x inner.
 */
struct input {
    const void *data;
    int64_t inner, outer_stride, inner_stride, channel_stride;
};

INLINE int64_t offset(const struct input *in, int64_t row)
{
    if (in->inner <= 1)
        return row * in->outer_stride;
    return (row / in->inner) * in->outer_stride + (row % in->inner) * in->inner_stride;
}

struct forward {
    struct input x;
    int64_t channels, blocks, width; /* blocks: channel groups of the layer scale, 1 if it is off; width: channels of each */
    int scaled, stream, single; /* single: one row at a time, see one_by_one() */
    double scale_eps; /* added to the mean square of the layer scale */
    const float *scale, *shift;
    void *y; /* may be NULL */
    int64_t y_stride; /* elements from one row of y to the next */
    float *r; /* may be NULL */
};

struct backward {
    struct input x, dy;
    int64_t channels, blocks, width;
    int stream, single;
    const float *r, *a, *b; /* r is NULL without layer scale */
    void *dx;               /* may be NULL */
    int64_t dx_stride;
};

/* Of normalization by statistics of the batch: one description for all its sweeps, see batch_sweeps.h. */
struct batch {
    struct input x, dy;
    int64_t channels, blocks, width;
    int scaled, known, stream, single; /* known: r is there already */
    const float *centre;       /* subtracted from u; NULL: nothing, where that is allowed */
    const float *scale, *shift, *b;
    const uint8_t *valid; /* NULL: all rows count in the statistics */
    float *r;  /* may be NULL */
    void *out;
    int64_t out_stride; /* elements from one row of out to the next */
};

/* The sources that this was built from: build.py looks for it in the file. */
#if !defined(PN_SOURCE)
#define PN_SOURCE "unknown"
#endif
EXPORT const char pn_source[] = "powernorm sources " PN_SOURCE;

/* ---------------------------------------------------------------- instruction sets */

#define STREAM(p, v) ((void)(p)) /* never reached: can_stream is 0 */

#if X86
#undef STREAM

#define BF16 0
#define LANES 4
#define NAME(n) n##_f32_base
#define STREAM(p, v) _mm_stream_ps((float *)(p), (__m128)(v))
#include "sweeps.h"
#undef NAME
#undef BF16
#define BF16 1
#define NAME(n) n##_bf16_base
#include "sweeps.h"
#undef NAME
#undef STREAM
#undef BF16
#undef LANES

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define BF16 0
#define LANES 8
#define NAME(n) n##_f32_avx2
#define STREAM(p, v) _mm256_stream_ps((float *)(p), (__m256)(v))
#include "sweeps.h"
#undef NAME
#undef BF16
#define BF16 1
#define NAME(n) n##_bf16_avx2
#include "sweeps.h"
#undef NAME
#undef STREAM
#undef BF16
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define BF16 0
#define LANES 16
#define NAME(n) n##_f32_avx512
#define STREAM(p, v) _mm512_stream_ps((float *)(p), (__m512)(v))
#include "sweeps.h"
#undef NAME
#undef BF16
#define BF16 1
#define NAME(n) n##_bf16_avx512
#include "sweeps.h"
#undef NAME
#undef STREAM
#undef BF16
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else /* any other processor: the compiler's own vectors */

#define BF16 0
#define LANES 4
#define NAME(n) n##_f32_base
#include "sweeps.h"
#undef NAME
#undef BF16
#define BF16 1
#define NAME(n) n##_bf16_base
#include "sweeps.h"
#undef NAME
#undef BF16
#undef LANES
#endif

typedef void forward_function(const struct forward *, const int64_t *, int64_t, float *, float *);
typedef void backward_function(const struct backward *, const int64_t *, int64_t, float *, float *, float *);

typedef void batch_function(const struct batch *, const int64_t *, int64_t, float *const *, float *);

struct instructions {
    const char *name;
    int lanes, can_stream;
    forward_function *forward[2]; /* by element type */
    backward_function *backward[2];
    batch_function *scales[2], *moments[2], *outputs[2], *fills[2], *gradient_sums[2], *gradients[2], *zeros[2];
};

#define BOTH(function, name) {function##_f32_##name, function##_bf16_##name}
#define SET(name, label, lanes, can_stream) \
    {label, lanes, can_stream, BOTH(forward_list, name), BOTH(backward_list, name), BOTH(scales, name), BOTH(moments, name), \
     BOTH(outputs, name), BOTH(fills, name), BOTH(gradient_sums, name), BOTH(gradients, name), BOTH(zeros, name)}

static const struct instructions sets[] = {
#if X86
    SET(base, "sse2", 4, 1),
    SET(avx2, "avx2", 8, 1),
    SET(avx512, "avx512", 16, 1),
#else
    SET(base, "generic", 4, 0),
#endif
};
static int chosen = -1;

static int best_set(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

/* Choose an instruction set: 0 (lowest) up to the best that this processor has, which is the default. Returns its name. */
EXPORT const char *pn_use_instructions(int number)
{
    int best = best_set();
    chosen = number < 0 || number > best ? best : number;
    return sets[chosen].name;
}

static const struct instructions *instructions(void)
{
    if (chosen < 0)
        pn_use_instructions(-1);
    return &sets[chosen];
}

/* ---------------------------------------------------------------- tiles */

#include "tiles.h"

/* ---------------------------------------------------------------- threads */

typedef void task_function(void *);
typedef void parallel_function(task_function *, void *, unsigned threads, unsigned flags); /* GOMP_parallel */
typedef int number_function(void);

static parallel_function *parallel;
static number_function *thread_number, *team_size;

/* The process's OpenMP runtime: GOMP_parallel, omp_get_thread_num, omp_get_num_threads. NULL: one thread. */
EXPORT void pn_use_threads(parallel_function *run, number_function *number, number_function *size)
{
    parallel = number && size ? run : NULL;
    thread_number = number;
    team_size = size;
}

/* Sums of one part of the rows, by kind: forward: u^2 at valid rows, at the others. backward: dy, dy * u. */
struct part {
    double *sums[2], *memory;
    int64_t counted;
};

struct work {
    const struct forward *forward; /* this one or the other */
    const struct backward *backward;
    forward_function *forward_list;
    backward_function *backward_list;
    const uint8_t *valid; /* of the rows; NULL: all are */
    int sum_others;       /* forward: are sums over the rows that are not valid wanted? */
    int sums;             /* forward: are any? */
    int tiled;            /* are there rows whose channels are not adjacent? */
    int64_t rows, channels, groups, n_parts; /* groups: of the layer scale, 1 if it is off */
    size_t element_size;
    struct part *parts;
    int failed;
};

static void flush(double *total, float *acc, int64_t n)
{
    for (int64_t c = 0; c < n; c++) {
        total[c] += acc[c];
        acc[c] = 0.0f;
    }
}

/*
 * Rows from begin to last by their numbers from `base` on, those that count first. Behind them stand rows that come later, before
 * `all`, whose memory may be asked for. n: how many of each kind.
 */
struct list {
    int64_t rows[BLOCK + AHEAD], n[2];
};

static struct list list_of(const uint8_t *valid, int64_t begin, int64_t last, int64_t base, int64_t all)
{
    struct list list = {{0}, {0, 0}};
    for (int64_t row = begin; row < last; row++)
        if (!valid || valid[row])
            list.rows[list.n[0]++] = row - base;
    for (int64_t row = begin; valid && row < last; row++)
        if (!valid[row])
            list.rows[list.n[0] + list.n[1]++] = row - base;
    for (int64_t i = 0; i < AHEAD; i++)
        list.rows[last - begin + i] = (last + i < all ? last + i : all - 1) - base;
    return list;
}

static void work_on_rows(
    const struct work *work, const struct forward *forward, const struct backward *backward, const struct list *list,
    float *const acc[2], float *scratch)
{
    const int64_t *others = list->rows + list->n[0];
    if (forward) {
        work->forward_list(forward, list->rows, list->n[0], acc[0], scratch);
        if (list->n[1])
            work->forward_list(forward, others, list->n[1], acc[1], scratch);
        return;
    }
    work->backward_list(backward, list->rows, list->n[0], acc[0], acc[1], scratch);
    if (backward->dx)
        for (int64_t i = 0; i < list->n[1]; i++)
            memset((char *)backward->dx + (size_t)(others[i] * backward->dx_stride) * work->element_size, 0,
                   (size_t)work->channels * work->element_size);
}

/* The same for `count` rows from `first` on, from which `list` numbers them, through tiles: their channels are not adjacent. */
static void work_on_tile(
    const struct work *work, int64_t first, int64_t count, const struct list *list, float *const acc[2], float *scratch,
    char *tiles)
{
    const int64_t C = work->channels, stride = tile_stride(C, work->element_size);
    const struct input tile = {tiles, 1, stride, 0, 1};
    char *second = tiles + (size_t)(tile_rows(C, work->element_size) * stride) * work->element_size;
    if (work->forward) {
        struct forward job = *work->forward;
        take(&job.x, first, count, C, tiles, stride, work->element_size);
        void *out = job.y;
        job.y = out ? tiles : NULL; /* in place */
        job.r = job.r ? job.r + first * job.blocks : NULL;
        job.y_stride = stride;
        job.stream = 0;
        const int64_t inner = job.x.inner;
        job.x = tile;
        work_on_rows(work, &job, NULL, list, acc, scratch);
        if (out)
            bring(tiles, stride, out, inner, first, count, C, work->element_size, work->forward->stream);
        return;
    }
    struct backward job = *work->backward;
    take(&job.x, first, count, C, tiles, stride, work->element_size);
    take(&job.dy, first, count, C, second, stride, work->element_size);
    char *out = job.dx;
    const int rows_adjacent = job.x.channel_stride == 1; /* only dy is otherwise: dx is as x */
    if (out)
        job.dx = rows_adjacent ? out + (size_t)(first * C) * work->element_size : second;
    job.dx_stride = rows_adjacent ? C : stride;
    job.r = job.r ? job.r + first * job.blocks : NULL;
    job.stream = 0;
    const int64_t inner = job.x.inner;
    job.x = job.dy = tile;
    job.dy.data = second;
    work_on_rows(work, NULL, &job, list, acc, scratch);
    if (out && !rows_adjacent)
        bring(second, stride, out, inner, first, count, C, work->element_size, work->backward->stream);
}

static void work_on(struct work *work, int64_t number)
{
    const int64_t C = work->channels, blocks = (work->rows + BLOCK - 1) / BLOCK;
    const int64_t first = blocks * number / work->n_parts * BLOCK;
    int64_t last = blocks * (number + 1) / work->n_parts * BLOCK;
    const int wanted = work->backward ? 2 : work->sums ? 1 + work->sum_others : 0;
    const int64_t step = work->tiled ? tile_rows(C, work->element_size) : BLOCK;
    const size_t tile = work->tiled ? (size_t)(step * tile_stride(C, work->element_size)) * work->element_size : 0;
    char *tiles = NULL;
    struct part *part = &work->parts[number];
    float *acc[2] = {NULL, NULL};
    if (last > work->rows)
        last = work->rows;
    double *memory = calloc((size_t)(C * wanted + 2 * work->groups), sizeof(double) + sizeof(float));
    part->memory = memory;
    if (!memory || (tile && !(tiles = malloc(tile * (work->backward ? 2 : 1) + LINE)))) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    char *const aligned = tiles + (LINE - (uintptr_t)tiles % LINE) % LINE;
    float *scratch = (float *)(memory + C * wanted);
    for (int i = 0; i < wanted; i++) {
        part->sums[i] = memory + i * C;
        acc[i] = scratch + 4 * work->groups + i * C;
    }
    for (int64_t begin = first; begin < last; begin += BLOCK) {
        const int64_t end = begin + BLOCK < last ? begin + BLOCK : last;
        for (int64_t from = begin; from < end; from += step) {
            const int64_t to = from + step < end ? from + step : end;
            const struct list list =
                list_of(work->valid, from, to, work->tiled ? from : 0, work->tiled ? to : work->rows);
            part->counted += list.n[0];
            if (work->tiled)
                work_on_tile(work, from, to - from, &list, acc, scratch, aligned);
            else
                work_on_rows(work, work->forward, work->backward, &list, acc, scratch);
        }
        for (int i = 0; i < wanted; i++)
            flush(part->sums[i], acc[i], C);
    }
    free(tiles);
#if X86
    _mm_sfence();
#endif
}

static void task(void *argument)
{
    struct work *work = argument;
    const int team = team_size();
    for (int64_t number = thread_number(); number < work->n_parts; number += team)
        work_on(work, number);
}

/* Into how many parts work on so many rows is divided. */
static int64_t parts_of(int64_t rows, int64_t channels, int threads)
{
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    int64_t n_parts = 1 + rows * channels / GRAIN;
    if (n_parts > blocks)
        n_parts = blocks;
    if (n_parts > threads || !parallel)
        n_parts = parallel ? threads : 1;
    return n_parts < 1 ? 1 : n_parts;
}

/* Do the work in parts; add up the parts' sums into totals (each C, may be NULL). */
static int run(struct work *work, int threads, double *const totals[2], int64_t *counted)
{
    const int64_t C = work->channels, n_parts = parts_of(work->rows, C, threads);
    struct part one = {{NULL, NULL}, NULL, 0};
    work->n_parts = n_parts;
    work->parts = n_parts == 1 ? &one : calloc((size_t)n_parts, sizeof(struct part));
    if (!work->parts)
        return NO_MEMORY;
    if (n_parts == 1)
        work_on(work, 0);
    else
        parallel(task, work, (unsigned)n_parts, 0);
    for (int i = 0; i < 2; i++)
        if (totals[i])
            memset(totals[i], 0, (size_t)C * sizeof(double));
    *counted = 0;
    for (int64_t number = 0; number < n_parts; number++) {
        struct part *part = &work->parts[number];
        for (int i = 0; i < 2; i++)
            if (totals[i] && part->sums[i])
                for (int64_t c = 0; c < C; c++)
                    totals[i][c] += part->sums[i][c];
        *counted += part->counted;
        free(part->memory);
    }
    if (n_parts > 1)
        free(work->parts);
    return work->failed ? NO_MEMORY : OK;
}

/* ---------------------------------------------------------------- one sweep */

/* Outputs of at least so many bytes are written past the caches: larger than what a core has to itself. */
static int64_t stream_bytes = 2 << 20;

/* Change that; returns what it was. */
EXPORT int64_t pn_stream_from(int64_t bytes)
{
    const int64_t before = stream_bytes;
    stream_bytes = bytes;
    return before;
}

/* Rows of so many bytes together come from where no cache holds them. */
static int64_t far_bytes = 16 << 20;

/* Change that; returns what it was. */
EXPORT int64_t pn_far_from(int64_t bytes)
{
    const int64_t before = far_bytes;
    far_bytes = bytes;
    return before;
}

/* Outputs of so many bytes get large pages, as NumPy's arrays do. */
static const int64_t large_page_bytes = 4 << 20;

static size_t element_size(int dtype)
{
    return dtype == BFLOAT16 ? 2 : 4;
}

/*
 * Has the system yet to give most pages of this memory? The first store to such a page fills it with zeros, and leaves it in
 * the caches: writing past them then costs more than it saves. Where the system does not say so, none has.
 */
static int is_fresh(const void *memory, int64_t bytes)
{
#if defined(__linux__)
    enum { SAMPLES = 4 };
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    int resident = 0;
    for (int64_t i = 0; i < SAMPLES; i++) {
        unsigned char here = 0;
        const uintptr_t address = (uintptr_t)memory + (uintptr_t)(bytes * (2 * i + 1) / (2 * SAMPLES));
        resident += mincore((void *)(address & ~(page - 1)), 1, &here) != 0 || here & 1;
    }
    return 2 * resident < SAMPLES;
#else
    (void)memory, (void)bytes;
    return 0;
#endif
}

/*
 * Are rows taken one by one instead of four at a time? Four save work on what is kept per channel, but one row after the other is
 * what memory is fastest at.
 */
static int one_by_one(int dtype, int64_t rows, int64_t channels)
{
    return rows * channels * (int64_t)element_size(dtype) >= far_bytes;
}

/*
 * Ask the system to give these pages in large ones, which takes far fewer faults: the allocator hands most large blocks back as
 * soon as they are free, so every call would pay for them again. A block is written from end to end, so this takes no more
 * memory. Where large pages are switched off, nothing happens.
 */
static void ask_for_large_pages(const void *memory, int64_t bytes)
{
#if defined(__linux__)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)memory & ~(page - 1);
    madvise((void *)begin, (uintptr_t)memory + (uintptr_t)bytes - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* Is the output written past the caches? */
static int streams(int dtype, int64_t rows, int64_t channels, int64_t width, const void *out)
{
    const struct instructions *set = instructions();
    const int64_t vector = set->lanes * (int64_t)sizeof(float);
    const int64_t bytes = rows * channels * (int64_t)element_size(dtype);
    if (!out || bytes < stream_bytes)
        return 0;
    if (is_fresh(out, bytes)) {
        if (bytes >= large_page_bytes)
            ask_for_large_pages(out, bytes);
        return 0;
    }
    return set->can_stream && width % (2 * set->lanes) == 0 && (uintptr_t)out % (uintptr_t)vector == 0;
}

/*
 * The sweeps keep per-channel values of bfloat16 rows in an order of their own: in each whole pair of vectors of a group, the
 * even channels come first, then the odd ones.
 */
struct order {
    int64_t channels, width, lanes; /* lanes: 0 if it is the channels' own order */
};

static struct order order_of(int dtype, int64_t channels, int64_t width)
{
    return (struct order){channels, width, dtype == BFLOAT16 ? instructions()->lanes : 0};
}

/* Put n values in the order of the sweeps, through spare. */
static void to_sweeps(const struct order *order, float *values, float *spare)
{
    const int64_t lanes = order->lanes;
    if (!lanes)
        return;
    memcpy(spare, values, (size_t)order->channels * sizeof(float));
    for (int64_t group = 0; group < order->channels; group += order->width)
        for (int64_t c = group; c + 2 * lanes <= group + order->width; c += 2 * lanes)
            for (int64_t i = 0; i < lanes; i++) {
                values[c + i] = spare[c + 2 * i];
                values[c + i + lanes] = spare[c + 2 * i + 1];
            }
}

/* n values in the channels' own order again. */
static void from_sweeps_floats(const struct order *order, float *values, float *spare)
{
    const int64_t lanes = order->lanes;
    if (!lanes)
        return;
    memcpy(spare, values, (size_t)order->channels * sizeof(float));
    for (int64_t group = 0; group < order->channels; group += order->width)
        for (int64_t c = group; c + 2 * lanes <= group + order->width; c += 2 * lanes)
            for (int64_t i = 0; i < lanes; i++) {
                values[c + 2 * i] = spare[c + i];
                values[c + 2 * i + 1] = spare[c + i + lanes];
            }
}

/* Sums in the channels' own order again. */
static void from_sweeps(const struct order *order, double *values, double *spare)
{
    const int64_t lanes = order->lanes;
    if (!lanes)
        return;
    memcpy(spare, values, (size_t)order->channels * sizeof(double));
    for (int64_t group = 0; group < order->channels; group += order->width)
        for (int64_t c = group; c + 2 * lanes <= group + order->width; c += 2 * lanes)
            for (int64_t i = 0; i < lanes; i++) {
                values[c + 2 * i] = spare[c + i];
                values[c + 2 * i + 1] = spare[c + i + lanes];
            }
}

/* NaN in its standard form, whose low half is zero: the rounding to bfloat16 relies on it. */
INLINE float channel_value(float value)
{
    return value == value ? value : NAN;
}

INLINE float inverse_root(float second_moment, float eps)
{
    return 1.0f / sqrtf(second_moment + eps);
}

/* scale = inv * weight (weight may be NULL), as the sweeps expect it. */
static void set_scale(const struct order *order, const float *inv, const float *weight, float *scale, float *spare)
{
    for (int64_t c = 0; c < order->channels; c++)
        scale[c] = channel_value(weight ? inv[c] * weight[c] : inv[c]);
    to_sweeps(order, scale, spare);
}

static void set_shift(const struct order *order, const float *bias, float *shift, float *spare)
{
    for (int64_t c = 0; c < order->channels; c++)
        shift[c] = bias ? channel_value(bias[c]) : 0.0f;
    to_sweeps(order, shift, spare);
}

static int sweep(
    int dtype, int64_t rows, int64_t channels, int64_t groups, double scale_eps, int threads, const struct input *x,
    const uint8_t *valid, const float *scale, const float *shift, void *y, float *r, double *const totals[2], int64_t *counted)
{
    const int64_t blocks = groups > 0 ? groups : 1, width = channels / blocks;
    const struct forward job = {
        .x = *x, .channels = channels, .blocks = blocks, .width = width, .scaled = groups > 0,
        .scale_eps = scale_eps, .stream = streams(dtype, rows, channels, x->channel_stride == 1 ? width : 0, y),
        .single = one_by_one(dtype, rows, channels), .scale = scale, .shift = shift, .y = y, .y_stride = channels, .r = r,
    };
    struct work work = {
        .forward = &job, .forward_list = instructions()->forward[dtype], .valid = valid, .sums = totals[0] != NULL,
        .sum_others = totals[1] != NULL, .tiled = x->channel_stride != 1, .rows = rows, .channels = channels, .groups = blocks,
        .element_size = element_size(dtype),
    };
    return run(&work, threads, totals, counted);
}

/* ---------------------------------------------------------------- entry points */

/*
 * Evaluation: y = u * scale + bias, scale = weight / sqrt(psi2 + eps). weight, bias, psi2: C or NULL. Without psi2 the scale
 * is the weight, and eps is that of the layer scale. y: rows x C, contiguous; or B x C x inner as x, where the channels of x are
 * not adjacent.
 */
EXPORT int pn_evaluate(
    int dtype, int64_t rows, int64_t channels, int64_t groups, int threads, const void *x, int64_t inner,
    int64_t outer_stride, int64_t inner_stride, int64_t channel_stride, const float *weight, const float *bias,
    const float *psi2, double eps, void *y)
{
    const int64_t C = channels;
    const struct input in = {x, inner, outer_stride, inner_stride, channel_stride};
    double *const totals[2] = {NULL, NULL};
    int64_t counted;
    const struct order order = order_of(dtype, C, groups > 0 ? C / groups : C);
    float *inv = malloc(((size_t)C * 4 + 1) * sizeof(float));
    if (!inv)
        return NO_MEMORY;
    float *scale = inv + C, *shift = inv + 2 * C, *spare = inv + 3 * C;
    for (int64_t c = 0; c < C; c++)
        inv[c] = psi2 ? inverse_root(psi2[c], (float)eps) : 1.0f;
    set_scale(&order, inv, weight, scale, spare);
    set_shift(&order, bias, shift, spare);
    int status = sweep(
        dtype, rows, C, groups, psi2 ? LAYER_SCALE_EPS : eps, threads, &in, NULL, scale, shift, y, NULL, totals, &counted);
    free(inv);
    return status;
}

/*
 * 1 / sqrt(psi^2 + eps) of the output and of the gradient, given the batch's second moment; see PowerNormSpec for jump.
 * Returns whether that of the output is another than 1 / sqrt(psi2 + eps).
 */
static int set_roots(
    int64_t channels, const float *batch, const float *psi2, float eps, float jump, int flags, float *inv_forward,
    float *inv_backward)
{
    int other = flags & FORWARD_BATCH;
    for (int64_t c = 0; c < channels; c++) {
        const float inv_batch = inverse_root(batch[c], eps), inv_running = inverse_root(psi2[c], eps);
        const int jumps = batch[c] > jump * (psi2[c] + eps);
        inv_forward[c] = flags & FORWARD_BATCH || jumps ? inv_batch : inv_running;
        inv_backward[c] = flags & BACKWARD_BATCH || jumps ? inv_batch : inv_running;
        other |= jumps;
    }
    return other;
}

INLINE int is_finite(float value)
{
    return value - value == 0.0f;
}

INLINE float next_psi2(float old, double moment, double alpha, double share, double limit, double eps)
{
    const double most = limit * (old + eps), taken = moment > most ? most : moment;
    return (float)(alpha * (old * (1.0 - share) + taken * share) + (1.0 - alpha) * taken);
}

INLINE float next_nu(float old, double grad_z, double z_square, double scale, double lowest)
{
    const double kept = 1.0 - scale * z_square;
    return (float)(old * (kept < lowest ? lowest : kept) + grad_z);
}

/* One step of psi^2 and of the step count with the sums of u^2 over rows; psi^2 stays without a row or where it is not finite. */
static void advance_psi2(
    int64_t channels, const double *sums, double rows, float *psi2, float *iters, double alpha, double eps, double warmup,
    double trusted_after, double jump)
{
    const double number = (double)*iters + 1.0;
    *iters = (float)number;
    if (!(rows > 0.0))
        return;
    const double mean = 1.0 / rows, share = number < warmup ? 1.0 / number : 0.0;
    const double limit = number > trusted_after && alpha > 0.0 ? jump : INFINITY;
    int bad = 0;
    for (int64_t c = 0; c < channels; c++)
        bad |= !is_finite(next_psi2(psi2[c], sums[c] * mean, alpha, share, limit, eps));
    for (int64_t c = 0; c < channels && !bad; c++)
        psi2[c] = next_psi2(psi2[c], sums[c] * mean, alpha, share, limit, eps);
}

/* One step of nu with the sums of weight * dy * z and of z^2 over rows; it stays without a row or where it is not finite. */
static void advance_nu(
    int64_t channels, const double *grad_z, const double *z_square, double rows, float *nu, double scale, double lowest)
{
    if (!(rows > 0.0))
        return;
    const double mean = 1.0 / rows;
    int bad = 0;
    for (int64_t c = 0; c < channels; c++)
        bad |= !is_finite(next_nu(nu[c], grad_z[c] * mean, z_square[c] * mean, scale, lowest));
    for (int64_t c = 0; c < channels && !bad; c++)
        nu[c] = next_nu(nu[c], grad_z[c] * mean, z_square[c] * mean, scale, lowest);
}

/*
 * Forward pass of training.
 *
 * valid: rows bytes, 0 at padding, or NULL. psi2: C. batch: C, the batch's second moment if it is known already, or NULL: that
 * of these rows. jump: see PowerNormSpec. y: as in pn_evaluate, or NULL (sums only). r: rows x groups, or NULL. saved: 3 x C,
 * for the backward pass: 1 / sqrt(psi^2 + eps) of the output, that of the gradient, sum of z^2. tally: C + 2: sums of u^2 over
 * valid rows, their number, 1; or NULL. step_psi2 (C), step_iters (1): statistics that take their step here, see
 * pn_advance_forward; or NULL.
 *
 * One sweep, and another one for y only where y needs the sums: FORWARD_BATCH without batch, or a channel that jumps.
 */
EXPORT int pn_forward(
    int dtype, int64_t rows, int64_t channels, int64_t groups, int threads, const void *x, int64_t inner,
    int64_t outer_stride, int64_t inner_stride, int64_t channel_stride, const uint8_t *valid, const float *weight,
    const float *bias, const float *psi2, const float *batch, double eps, double jump, int flags, void *y, float *r,
    float *saved, double *tally, float *step_psi2, float *step_iters, double alpha, double warmup, double trusted_after,
    double step_jump)
{
    const int64_t C = channels;
    const struct input in = {x, inner, outer_stride, inner_stride, channel_stride};
    float *inv_forward = saved, *inv_backward = saved + C, *z_square = saved + 2 * C;
    const struct order order = order_of(dtype, C, groups > 0 ? C / groups : C);
    double *sums = calloc((size_t)C * 5 + 1, sizeof(double));
    if (!sums)
        return NO_MEMORY;
    double *others = sums + C, *spare = sums + 2 * C;
    float *scale = (float *)(sums + 3 * C), *shift = scale + C, *own_batch = scale + 2 * C;
    double *const totals[2] = {sums, valid && !(flags & SKIP_PADDING) ? others : NULL}, *const none[2] = {NULL, NULL};
    int64_t counted, ignored;
    set_shift(&order, bias, shift, (float *)spare);
    if (batch)
        set_roots(C, batch, psi2, (float)eps, (float)jump, flags, inv_forward, inv_backward);
    else
        for (int64_t c = 0; c < C; c++)
            inv_forward[c] = inverse_root(psi2[c], (float)eps);
    set_scale(&order, inv_forward, weight, scale, (float *)spare);
    const int later = !batch && flags & FORWARD_BATCH;
    int status = sweep(
        dtype, rows, C, groups, LAYER_SCALE_EPS, threads, &in, valid, scale, shift, later ? NULL : y, r, totals, &counted);
    from_sweeps(&order, sums, spare);
    if (totals[1])
        from_sweeps(&order, others, spare);
    if (tally) {
        memcpy(tally, sums, (size_t)C * sizeof(double));
        tally[C] = (double)counted;
        tally[C + 1] = 1.0;
    }
    if (!batch && !(flags & (FORWARD_BATCH | BACKWARD_BATCH)) && isinf(jump)) {
        memcpy(inv_backward, inv_forward, (size_t)C * sizeof(float));
    } else if (!batch) {
        const double one_row = counted ? 1.0 / (double)counted : 0.0;
        for (int64_t c = 0; c < C; c++)
            own_batch[c] = counted ? (float)(sums[c] * one_row) : psi2[c];
        if (set_roots(C, own_batch, psi2, (float)eps, (float)jump, flags, inv_forward, inv_backward) && y && status == OK) {
            set_scale(&order, inv_forward, weight, scale, (float *)spare);
            status = sweep(dtype, rows, C, groups, LAYER_SCALE_EPS, threads, &in, NULL, scale, shift, y, NULL, none, &ignored);
        }
    }
    for (int64_t c = 0; c < C; c++)
        z_square[c] = (float)((sums[c] + others[c]) * inv_forward[c] * inv_forward[c]);
    if (step_psi2 && status == OK)
        advance_psi2(C, sums, (double)counted, step_psi2, step_iters, alpha, eps, warmup, trusted_after, step_jump);
    free(sums);
    return status;
}

/*
 * Backward pass. x, r, weight, saved as in the forward pass.
 *
 * valid: rows bytes, 0 at rows that do not count and receive no gradient, or NULL. nu: C, nu_factor: its factor in the
 * gradient. dx: as y, or NULL. grad_weight, grad_bias: C. tally: 2 C + 2: sums of weight * dy * z / gradient_scale and of
 * z^2, number of rows, 1; or NULL.
 *
 * step_nu (C): the statistic that takes its step here, see pn_advance_backward, or NULL.
 *
 * Returns NOT_FINITE where a gradient of weight is not, and takes no step then: the caller may leave out the padding that made
 * it so.
 */
EXPORT int pn_backward(
    int dtype, int64_t rows, int64_t channels, int64_t groups, int threads, const void *x, int64_t inner,
    int64_t outer_stride, int64_t inner_stride, int64_t channel_stride, const void *dy, int64_t dy_inner,
    int64_t dy_outer_stride, int64_t dy_inner_stride, int64_t dy_channel_stride, const float *r, const uint8_t *valid,
    const float *weight, const float *saved, const float *nu, double nu_factor, double gradient_scale, void *dx,
    float *grad_weight, float *grad_bias, double *tally, float *step_nu, double step_scale, double lowest)
{
    const int64_t C = channels, blocks = groups > 0 ? groups : 1, width = C / blocks;
    const float *inv_forward = saved, *inv_backward = saved + C, *z_square = saved + 2 * C;
    const struct order order = order_of(dtype, C, width);
    double *sums = calloc((size_t)C * 4 + 1, sizeof(double));
    if (!sums)
        return NO_MEMORY;
    double *spare = sums + 2 * C;
    float *a = (float *)(sums + 3 * C), *b = a + C;
    double *const totals[2] = {sums, sums + C};
    int64_t counted;
    set_scale(&order, inv_backward, weight, a, (float *)spare);
    for (int64_t c = 0; c < C; c++)
        b[c] = channel_value((float)(nu[c] * nu_factor) * inv_forward[c] * inv_backward[c]);
    to_sweeps(&order, b, (float *)spare);
    const struct backward job = {
        .x = {x, inner, outer_stride, inner_stride, channel_stride},
        .dy = {dy, dy_inner, dy_outer_stride, dy_inner_stride, dy_channel_stride},
        .channels = C, .blocks = blocks, .width = width,
        .stream = streams(dtype, rows, C, channel_stride == 1 ? width : 0, dx), .single = one_by_one(dtype, rows, C),
        .r = groups > 0 ? r : NULL, .a = a, .b = b, .dx = dx, .dx_stride = C,
    };
    struct work work = {
        .backward = &job, .backward_list = instructions()->backward[dtype], .valid = valid,
        .tiled = channel_stride != 1 || dy_channel_stride != 1, .rows = rows, .channels = C, .groups = blocks,
        .element_size = element_size(dtype),
    };
    int status = run(&work, threads, totals, &counted);
    from_sweeps(&order, sums, spare);
    from_sweeps(&order, sums + C, spare);
    const double unscale = 1.0 / gradient_scale;
    double zero = 0.0;
    for (int64_t c = 0; c < C; c++) {
        const double grad_z = sums[C + c] * inv_forward[c];
        grad_bias[c] = (float)sums[c];
        grad_weight[c] = (float)grad_z;
        zero += grad_z * 0.0; /* NaN as soon as one value is not finite */
        sums[c] = grad_z * (weight ? weight[c] : 1.0f) * unscale;
        sums[C + c] = z_square[c];
    }
    if (tally) {
        memcpy(tally, sums, 2 * (size_t)C * sizeof(double));
        tally[2 * C] = (double)counted;
        tally[2 * C + 1] = 1.0;
    }
    if (status == OK && zero != 0.0)
        status = NOT_FINITE;
    if (step_nu && status == OK)
        advance_nu(C, sums, sums + C, (double)counted, step_nu, step_scale, lowest);
    free(sums);
    return status;
}

/*
 * One step of psi^2 and the step count of n norms (PowerNorm.advance). tally: n x (C + 2): sums of u^2, rows, calls. psi2: n x C,
 * iters: n, both float32, changed in place. A norm without a call takes no step; without a row, or where a result is not
 * finite, its psi^2 stays. alpha, eps, warmup, trusted_after, jump: see StepSpec.
 */
EXPORT void pn_advance_forward(
    int64_t norms, int64_t channels, const double *tally, float *psi2, float *iters, double alpha, double eps, double warmup,
    double trusted_after, double jump)
{
    const int64_t C = channels;
    for (int64_t n = 0; n < norms; n++, tally += C + 2)
        if (tally[C + 1] > 0.0)
            advance_psi2(C, tally, tally[C], psi2 + n * C, iters + n, alpha, eps, warmup, trusted_after, jump);
}

/*
 * One step of nu of n norms. tally: n x (2 C + 2): sums of weight * dy * z and of z^2, rows, calls. nu: n x C, float32, changed in
 * place: nu becomes nu * (1 - scale * mean of z^2), the factor kept at or above lowest, plus the mean of weight * dy * z.
 */
EXPORT void pn_advance_backward(
    int64_t norms, int64_t channels, const double *tally, float *nu, double scale, double lowest)
{
    const int64_t C = channels;
    for (int64_t n = 0; n < norms; n++, tally += 2 * C + 2)
        if (tally[2 * C + 1] > 0.0)
            advance_nu(C, tally, tally + C, tally[2 * C], nu + n * C, scale, lowest);
}

#include "batch.h"
