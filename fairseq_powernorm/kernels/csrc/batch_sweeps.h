/*
 * The sweeps of normalization by statistics of the batch (PN-V, batch normalization), two for each pass. Included by sweeps.h,
 * whose types and functions they use: once for every element type and instruction set.
 */

/* r of R rows: computed, or what an earlier sweep stored; 1 without layer scale. scratch: 4 for each group. */
INLINE void NAME(row_scales)(const int R, const struct batch *job, const element *const *x, const int64_t *rows, float *scratch)
{
    for (int k = 0; k < R; k++)
        for (int64_t group = 0; group < job->blocks; group++) {
            float *r = job->r ? job->r + rows[k] * job->blocks + group : NULL;
            float value = 1.0f;
            if (job->scaled && job->known)
                value = *r;
            else if (job->scaled)
                value = (float)(1.0 / sqrt(NAME(squares)(x[k] + group * job->width, job->width) / (double)job->width
                                           + LAYER_SCALE_EPS));
            scratch[4 * group + k] = value;
            if (job->scaled && r && !job->known)
                *r = value;
        }
}

/* R rows: acc[0] += v (if centred), acc[1] += v^2, v = u - centre (if centred; else u). R and centred are constants. */
INLINE void NAME(moments_rows)(
    const int R, const int centred, const struct batch *job, const int64_t *rows, int64_t ahead, float *const *acc, float *scratch)
{
    const element *x[4], *next[4];
    for (int k = 0; k < R; k++) {
        x[k] = (const element *)job->x.data + offset(&job->x, rows[k]);
        next[k] = (const element *)job->x.data + offset(&job->x, rows[k + ahead]);
    }
    NAME(row_scales)(R, job, x, rows, scratch);
    for (int64_t group = 0; group < job->blocks; group++) {
        const float *r = scratch + 4 * group;
        const int64_t last = (group + 1) * job->width;
        int64_t c = group * job->width;
        for (; c + 2 * LANES <= last; c += 2 * LANES) {
            vec centre0 = {0}, centre1 = {0}, sum0 = {0}, sum1 = {0}, square0 = {0}, square1 = {0};
            if (centred) {
                centre0 = NAME(floats)(job->centre + c);
                centre1 = NAME(floats)(job->centre + c + LANES);
            }
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                pair u = NAME(load)(x[k] + c);
                if (R > 1)
                    NAME(prefetch)(next[k] + c);
                u.v[0] *= r[k];
                u.v[1] *= r[k];
                if (centred) {
                    u.v[0] -= centre0;
                    u.v[1] -= centre1;
                    sum0 += u.v[0];
                    sum1 += u.v[1];
                }
                square0 += u.v[0] * u.v[0];
                square1 += u.v[1] * u.v[1];
            }
            if (centred) {
                NAME(add)(acc[0] + c, sum0);
                NAME(add)(acc[0] + c + LANES, sum1);
            }
            NAME(add)(acc[1] + c, square0);
            NAME(add)(acc[1] + c + LANES, square1);
        }
        for (; c < last; c += LANES) {
            const int64_t some = NAME(next)(last - c);
            vec sum = {0}, square = {0};
            for (int k = 0; k < R; k++) {
                vec u = NAME(load_part)(x[k] + c, some) * r[k];
                if (centred)
                    u -= NAME(floats_part)(job->centre + c, some);
                sum += u;
                square += u * u;
            }
            if (centred)
                NAME(add_part)(acc[0] + c, sum, some);
            NAME(add_part)(acc[1] + c, square, some);
        }
    }
}

/* R rows: y = (u - centre) * scale + shift. R and stream are constants. */
INLINE void NAME(output_rows)(
    const int R, const int stream, const struct batch *job, const int64_t *rows, int64_t ahead, float *scratch)
{
    const element *x[4], *next[4];
    element *y[4];
    for (int k = 0; k < R; k++) {
        x[k] = (const element *)job->x.data + offset(&job->x, rows[k]);
        next[k] = (const element *)job->x.data + offset(&job->x, rows[k + ahead]);
        y[k] = (element *)job->out + rows[k] * job->out_stride;
    }
    NAME(row_scales)(R, job, x, rows, scratch);
    for (int64_t group = 0; group < job->blocks; group++) {
        const float *r = scratch + 4 * group;
        const int64_t last = (group + 1) * job->width;
        int64_t c = group * job->width;
        for (; c + 2 * LANES <= last; c += 2 * LANES) {
            const vec scale0 = NAME(floats)(job->scale + c), scale1 = NAME(floats)(job->scale + c + LANES);
            const vec shift0 = NAME(floats)(job->shift + c), shift1 = NAME(floats)(job->shift + c + LANES);
            const vec centre0 = NAME(floats)(job->centre + c), centre1 = NAME(floats)(job->centre + c + LANES);
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                pair u = NAME(load)(x[k] + c);
                if (R > 1)
                    NAME(prefetch)(next[k] + c);
                u.v[0] = (u.v[0] * r[k] - centre0) * scale0 + shift0;
                u.v[1] = (u.v[1] * r[k] - centre1) * scale1 + shift1;
                NAME(store)(y[k] + c, u, stream);
            }
        }
        for (; c < last; c += LANES) {
            const int64_t some = NAME(next)(last - c);
            const vec scale = NAME(floats_part)(job->scale + c, some), shift = NAME(floats_part)(job->shift + c, some);
            const vec centre = NAME(floats_part)(job->centre + c, some);
            for (int k = 0; k < R; k++)
                NAME(store_part)(y[k] + c, (NAME(load_part)(x[k] + c, some) * r[k] - centre) * scale + shift, some);
        }
    }
}

/* R rows: acc[0] += dy, acc[1] += dy * (u - centre). R is a constant. */
INLINE void NAME(gradient_sums_rows)(
    const int R, const struct batch *job, const int64_t *rows, int64_t ahead, float *const *acc, float *scratch)
{
    const element *x[4], *dy[4], *next_x[4], *next_dy[4];
    for (int k = 0; k < R; k++) {
        x[k] = (const element *)job->x.data + offset(&job->x, rows[k]);
        dy[k] = (const element *)job->dy.data + offset(&job->dy, rows[k]);
        next_x[k] = (const element *)job->x.data + offset(&job->x, rows[k + ahead]);
        next_dy[k] = (const element *)job->dy.data + offset(&job->dy, rows[k + ahead]);
    }
    NAME(row_scales)(R, job, x, rows, scratch);
    for (int64_t group = 0; group < job->blocks; group++) {
        const float *r = scratch + 4 * group;
        const int64_t last = (group + 1) * job->width;
        int64_t c = group * job->width;
        for (; c + 2 * LANES <= last; c += 2 * LANES) {
            const vec centre0 = NAME(floats)(job->centre + c), centre1 = NAME(floats)(job->centre + c + LANES);
            vec g0 = {0}, g1 = {0}, gu0 = {0}, gu1 = {0};
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                const pair u = NAME(load)(x[k] + c), g = NAME(load)(dy[k] + c);
                if (R > 1) {
                    NAME(prefetch)(next_x[k] + c);
                    NAME(prefetch)(next_dy[k] + c);
                }
                g0 += g.v[0];
                g1 += g.v[1];
                gu0 += g.v[0] * (u.v[0] * r[k] - centre0);
                gu1 += g.v[1] * (u.v[1] * r[k] - centre1);
            }
            NAME(add)(acc[0] + c, g0);
            NAME(add)(acc[0] + c + LANES, g1);
            NAME(add)(acc[1] + c, gu0);
            NAME(add)(acc[1] + c + LANES, gu1);
        }
        for (; c < last; c += LANES) {
            const int64_t some = NAME(next)(last - c);
            const vec centre = NAME(floats_part)(job->centre + c, some);
            vec sum_g = {0}, sum_gu = {0};
            for (int k = 0; k < R; k++) {
                const vec g = NAME(load_part)(dy[k] + c, some);
                sum_g += g;
                sum_gu += g * (NAME(load_part)(x[k] + c, some) * r[k] - centre);
            }
            NAME(add_part)(acc[0] + c, sum_g, some);
            NAME(add_part)(acc[1] + c, sum_gu, some);
        }
    }
}

/*
 * R rows: du = dy * scale - through * ((u - centre) * b + shift), dx = r * (du - u * mean(du * u)). through: 1 for rows that count in
 * the statistics, else 0, multiplied first, as b times a large number in padding may be infinite. R and stream are constants.
 */
INLINE void NAME(gradient_rows)(
    const int R, const int stream, const struct batch *job, const int64_t *rows, int64_t ahead, float *scratch)
{
    const element *x[4], *dy[4], *next_x[4], *next_dy[4];
    element *dx[4];
    float through[4];
    for (int k = 0; k < R; k++) {
        x[k] = (const element *)job->x.data + offset(&job->x, rows[k]);
        dy[k] = (const element *)job->dy.data + offset(&job->dy, rows[k]);
        next_x[k] = (const element *)job->x.data + offset(&job->x, rows[k + ahead]);
        next_dy[k] = (const element *)job->dy.data + offset(&job->dy, rows[k + ahead]);
        dx[k] = (element *)job->out + rows[k] * job->out_stride;
        through[k] = job->valid && !job->valid[rows[k]] ? 0.0f : 1.0f;
    }
    NAME(row_scales)(R, job, x, rows, scratch);
    for (int64_t group = 0; group < job->blocks; group++) {
        const float *r = scratch + 4 * group;
        const int64_t first = group * job->width, last = first + job->width;
        float mean[4] = {0};
        if (job->scaled)
            for (int k = 0; k < R; k++) {
                double total = 0.0;
                for (int64_t begin = first; begin < last; begin += SPAN) {
                    const int64_t end = begin + SPAN < last ? begin + SPAN : last;
                    int64_t c = begin;
                    vec s0 = {0}, s1 = {0};
                    for (; c + 2 * LANES <= end; c += 2 * LANES) {
                        pair u = NAME(load)(x[k] + c), g = NAME(load)(dy[k] + c);
                        NAME(prefetch)(next_x[k] + c);
                        NAME(prefetch)(next_dy[k] + c);
                        u.v[0] *= r[k];
                        u.v[1] *= r[k];
                        g.v[0] *= NAME(floats)(job->scale + c);
                        g.v[1] *= NAME(floats)(job->scale + c + LANES);
                        g.v[0] -= (u.v[0] - NAME(floats)(job->centre + c)) * through[k] * NAME(floats)(job->b + c)
                            + NAME(floats)(job->shift + c) * through[k];
                        g.v[1] -= (u.v[1] - NAME(floats)(job->centre + c + LANES)) * through[k] * NAME(floats)(job->b + c + LANES)
                            + NAME(floats)(job->shift + c + LANES) * through[k];
                        s0 += u.v[0] * g.v[0];
                        s1 += u.v[1] * g.v[1];
                    }
                    for (; c < end; c += LANES) {
                        const int64_t some = NAME(next)(end - c);
                        const vec u = NAME(load_part)(x[k] + c, some) * r[k];
                        vec g = NAME(load_part)(dy[k] + c, some) * NAME(floats_part)(job->scale + c, some);
                        g -= (u - NAME(floats_part)(job->centre + c, some)) * through[k] * NAME(floats_part)(job->b + c, some)
                            + NAME(floats_part)(job->shift + c, some) * through[k];
                        s0 += u * g;
                    }
                    total += NAME(lanes_sum)(s0 + s1);
                }
                mean[k] = (float)(total / (double)job->width);
            }
        int64_t c = first;
        for (; c + 2 * LANES <= last; c += 2 * LANES) {
            const vec scale0 = NAME(floats)(job->scale + c), scale1 = NAME(floats)(job->scale + c + LANES);
            const vec shift0 = NAME(floats)(job->shift + c), shift1 = NAME(floats)(job->shift + c + LANES);
            const vec b0 = NAME(floats)(job->b + c), b1 = NAME(floats)(job->b + c + LANES);
            const vec centre0 = NAME(floats)(job->centre + c), centre1 = NAME(floats)(job->centre + c + LANES);
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                pair u = NAME(load)(x[k] + c), g = NAME(load)(dy[k] + c);
                if (R > 1 && !job->scaled) {
                    NAME(prefetch)(next_x[k] + c);
                    NAME(prefetch)(next_dy[k] + c);
                }
                u.v[0] *= r[k];
                u.v[1] *= r[k];
                g.v[0] = g.v[0] * scale0 - ((u.v[0] - centre0) * through[k] * b0 + shift0 * through[k]);
                g.v[1] = g.v[1] * scale1 - ((u.v[1] - centre1) * through[k] * b1 + shift1 * through[k]);
                g.v[0] = (g.v[0] - u.v[0] * mean[k]) * r[k];
                g.v[1] = (g.v[1] - u.v[1] * mean[k]) * r[k];
                NAME(store)(dx[k] + c, g, stream);
            }
        }
        for (; c < last; c += LANES) {
            const int64_t some = NAME(next)(last - c);
            for (int k = 0; k < R; k++) {
                const vec u = NAME(load_part)(x[k] + c, some) * r[k];
                vec g = NAME(load_part)(dy[k] + c, some) * NAME(floats_part)(job->scale + c, some);
                g -= (u - NAME(floats_part)(job->centre + c, some)) * through[k] * NAME(floats_part)(job->b + c, some)
                    + NAME(floats_part)(job->shift + c, some) * through[k];
                NAME(store_part)(dx[k] + c, (g - u * mean[k]) * r[k], some);
            }
        }
    }
}

/* n rows of one kind; AHEAD more stand behind them. */
static void NAME(scales)(const struct batch *job, const int64_t *rows, int64_t n, float *const *acc, float *scratch)
{
    (void)acc;
    for (int64_t i = 0; i < n && job->scaled; i++) {
        const element *x = (const element *)job->x.data + offset(&job->x, rows[i]);
        NAME(row_scales)(1, job, &x, rows + i, scratch);
    }
}

/* Every row becomes the shift. */
static void NAME(fills)(const struct batch *job, const int64_t *rows, int64_t n, float *const *acc, float *scratch)
{
    (void)acc, (void)scratch;
    for (int64_t i = 0; i < n; i++) {
        element *y = (element *)job->out + rows[i] * job->out_stride;
        for (int64_t first = 0; first < job->channels; first += job->width) {
            int64_t c = first;
            for (; c + 2 * LANES <= first + job->width; c += 2 * LANES)
                NAME(store)(y + c, (pair){{NAME(floats)(job->shift + c), NAME(floats)(job->shift + c + LANES)}}, 0);
            for (; c < first + job->width; c += LANES) {
                const int64_t some = NAME(next)(first + job->width - c);
                NAME(store_part)(y + c, NAME(floats_part)(job->shift + c, some), some);
            }
        }
    }
}

static void NAME(zeros)(const struct batch *job, const int64_t *rows, int64_t n, float *const *acc, float *scratch)
{
    (void)acc, (void)scratch;
    for (int64_t i = 0; i < n; i++)
        memset((element *)job->out + rows[i] * job->out_stride, 0, (size_t)job->channels * sizeof(element));
}

static void NAME(moments)(const struct batch *job, const int64_t *rows, int64_t n, float *const *acc, float *scratch)
{
    int64_t i = 0;
    for (; !job->single && i + 4 <= n; i += 4)
        if (job->centre)
            NAME(moments_rows)(4, 1, job, rows + i, AHEAD, acc, scratch);
        else
            NAME(moments_rows)(4, 0, job, rows + i, AHEAD, acc, scratch);
    for (; i < n; i++)
        if (job->centre)
            NAME(moments_rows)(1, 1, job, rows + i, 0, acc, scratch);
        else
            NAME(moments_rows)(1, 0, job, rows + i, 0, acc, scratch);
}

static void NAME(outputs)(const struct batch *job, const int64_t *rows, int64_t n, float *const *acc, float *scratch)
{
    (void)acc;
    int64_t i = 0;
    for (; !job->single && i + 4 <= n; i += 4)
        if (job->stream)
            NAME(output_rows)(4, 1, job, rows + i, AHEAD, scratch);
        else
            NAME(output_rows)(4, 0, job, rows + i, AHEAD, scratch);
    for (; i < n; i++)
        if (job->stream)
            NAME(output_rows)(1, 1, job, rows + i, 0, scratch);
        else
            NAME(output_rows)(1, 0, job, rows + i, 0, scratch);
}

static void NAME(gradient_sums)(const struct batch *job, const int64_t *rows, int64_t n, float *const *acc, float *scratch)
{
    int64_t i = 0;
    for (; !job->single && i + 4 <= n; i += 4)
        NAME(gradient_sums_rows)(4, job, rows + i, AHEAD, acc, scratch);
    for (; i < n; i++)
        NAME(gradient_sums_rows)(1, job, rows + i, 0, acc, scratch);
}

static void NAME(gradients)(const struct batch *job, const int64_t *rows, int64_t n, float *const *acc, float *scratch)
{
    (void)acc;
    int64_t i = 0;
    for (; !job->single && i + 4 <= n; i += 4)
        if (job->stream)
            NAME(gradient_rows)(4, 1, job, rows + i, AHEAD, scratch);
        else
            NAME(gradient_rows)(4, 0, job, rows + i, AHEAD, scratch);
    for (; i < n; i++)
        if (job->stream)
            NAME(gradient_rows)(1, 1, job, rows + i, 0, scratch);
        else
            NAME(gradient_rows)(1, 0, job, rows + i, 0, scratch);
}
