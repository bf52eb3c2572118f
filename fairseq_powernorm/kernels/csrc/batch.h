/*
 * Normalization by statistics of the batch, with its exact gradient: PN-V and batch normalization. Included by powernorm.c.
 *
 * Each pass is two sweeps over the rows: one for the sums, one for what depends on them. Sums for a variance are taken about a
 * value near the mean, that of some rows, so that none of their digits are lost where the mean is large.
 */

/* Rows whose mean is near enough to that of all: a variance loses log2(1 + rows / SAMPLE^2) bits at most for one outlier. */
enum { SAMPLE = 32 };

struct batch_work {
    const struct batch *job;
    batch_function *valid_rows, *others; /* what is done with rows that count, and with the others; NULL: nothing */
    const uint8_t *valid;                /* NULL: nothing else is done with the others */
    int sums, reversed;                  /* sums: of how many kinds of rows; reversed: begin at the last row */
    int dtype;
    int64_t rows, n_parts;
    struct part *parts[2]; /* by kind of rows */
    int failed;
};

/* Are there rows whose channels are not adjacent? */
static int batch_tiled(const struct batch *job)
{
    return job->x.channel_stride != 1 || (job->dy.data && job->dy.channel_stride != 1);
}

static void batch_rows(
    const struct batch_work *work, const struct batch *job, const struct list *list, float *(*acc)[2], float *scratch)
{
    for (int kind = 0; kind < 2; kind++) {
        batch_function *function = kind ? work->others : work->valid_rows;
        if (list->n[kind] && function)
            function(job, list->rows + kind * list->n[0], list->n[kind], acc[kind], scratch);
    }
}

/* The same for `count` rows from `first` on, from which `list` numbers them, through tiles. */
static void batch_tile(
    const struct batch_work *work, int64_t first, int64_t count, const struct list *list, float *(*acc)[2], float *scratch,
    char *tiles)
{
    struct batch job = *work->job;
    const size_t size = element_size(work->dtype);
    const int64_t C = job.channels, stride = tile_stride(C, size), inner = job.x.inner;
    const int rows_adjacent = job.x.channel_stride == 1; /* only dy is otherwise: out is as x */
    char *last = tiles, *out = job.out;
    take(&job.x, first, count, C, tiles, stride, size);
    job.x = (struct input){tiles, 1, stride, 0, 1};
    if (job.dy.data) {
        last = tiles + (size_t)(tile_rows(C, size) * stride) * size;
        take(&job.dy, first, count, C, last, stride, size);
        job.dy = job.x;
        job.dy.data = last;
    }
    if (out) { /* in place of what is not needed any more */
        job.out = rows_adjacent ? out + (size_t)(first * C) * size : last;
        job.out_stride = rows_adjacent ? C : stride;
    }
    job.r = job.r ? job.r + first * job.blocks : NULL;
    job.valid = job.valid ? job.valid + first : NULL;
    job.stream = 0;
    batch_rows(work, &job, list, acc, scratch);
    if (out && !rows_adjacent)
        bring(last, stride, out, inner, first, count, C, size, work->job->stream);
}

static void batch_work_on(struct batch_work *work, int64_t number)
{
    const int64_t C = work->job->channels, groups = work->job->blocks, blocks = (work->rows + BLOCK - 1) / BLOCK;
    const int64_t first = blocks * number / work->n_parts, end = blocks * (number + 1) / work->n_parts;
    const int kinds = work->sums, tiled = batch_tiled(work->job);
    const size_t size = element_size(work->dtype);
    const int64_t step = tiled ? tile_rows(C, size) : BLOCK;
    const size_t tile = tiled ? (size_t)(step * tile_stride(C, size)) * size : 0;
    double *memory = calloc((size_t)(C * 2 * kinds + 2 * groups + 1), sizeof(double) + sizeof(float));
    char *tiles = NULL;
    work->parts[0][number].memory = memory;
    if (!memory || (tiled && !(tiles = malloc(tile * (work->job->dy.data ? 2 : 1) + LINE)))) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    char *const aligned = tiles + (LINE - (uintptr_t)tiles % LINE) % LINE;
    float *scratch = (float *)(memory + C * 2 * kinds), *acc[2][2] = {{NULL, NULL}, {NULL, NULL}};
    for (int kind = 0; kind < kinds; kind++)
        for (int i = 0; i < 2; i++) {
            work->parts[kind][number].sums[i] = memory + (2 * kind + i) * C;
            acc[kind][i] = scratch + 4 * groups + (2 * kind + i) * C;
        }
    for (int64_t n_block = first; n_block < end; n_block++) {
        const int64_t begin = (work->reversed ? end - 1 - (n_block - first) : n_block) * BLOCK;
        const int64_t last = begin + BLOCK < work->rows ? begin + BLOCK : work->rows;
        int64_t of_kind[2] = {0, 0};
        for (int64_t from = begin; from < last; from += step) {
            const int64_t to = from + step < last ? from + step : last;
            const struct list list = list_of(work->valid, from, to, tiled ? from : 0, tiled ? to : work->rows);
            if (tiled)
                batch_tile(work, from, to - from, &list, acc, scratch, aligned);
            else
                batch_rows(work, work->job, &list, acc, scratch);
            for (int kind = 0; kind < 2; kind++)
                of_kind[kind] += list.n[kind];
        }
        for (int kind = 0; kind < 2; kind++) {
            work->parts[kind][number].counted += of_kind[kind];
            for (int i = 0; i < 2; i++)
                if (kind < kinds && of_kind[kind])
                    flush(work->parts[kind][number].sums[i], acc[kind][i], C);
        }
    }
    free(tiles);
#if X86
    _mm_sfence();
#endif
}

static void batch_task(void *argument)
{
    struct batch_work *work = argument;
    const int team = team_size();
    for (int64_t number = thread_number(); number < work->n_parts; number += team)
        batch_work_on(work, number);
}

/*
 * Do the work in parts. sums: 2 x C for each kind of rows that has any, in the channels' own order; spare: C, for that. counted: rows
 * by kind.
 */
static int batch_run(
    struct batch_work *work, int threads, const struct order *order, double *sums, double *spare, int64_t counted[2])
{
    const int64_t C = work->job->channels;
    const int64_t n_parts = work->n_parts = parts_of(work->rows, C, threads);
    struct part one[2] = {{{NULL, NULL}, NULL, 0}, {{NULL, NULL}, NULL, 0}};
    struct part *parts = n_parts == 1 ? one : calloc(2 * (size_t)n_parts, sizeof(struct part));
    if (!parts)
        return NO_MEMORY;
    work->parts[0] = parts;
    work->parts[1] = parts + n_parts;
    if (n_parts == 1)
        batch_work_on(work, 0);
    else
        parallel(batch_task, work, (unsigned)n_parts, 0);
    for (int kind = 0; kind < 2; kind++) {
        counted[kind] = 0;
        for (int64_t number = 0; number < n_parts; number++) {
            const struct part *part = &work->parts[kind][number];
            counted[kind] += part->counted;
            for (int i = 0; i < 2; i++)
                if (kind < work->sums && part->sums[i])
                    for (int64_t c = 0; c < C; c++)
                        sums[(2 * kind + i) * C + c] += part->sums[i][c];
        }
        for (int i = 0; i < 2 && kind < work->sums; i++)
            from_sweeps(order, sums + (2 * kind + i) * C, spare);
    }
    for (int64_t number = 0; number < n_parts; number++)
        free(work->parts[0][number].memory);
    if (n_parts > 1)
        free(parts);
    return work->failed ? NO_MEMORY : OK;
}

/*
 * The mean of u over some of the valid rows, from the first to the last, into centre; 0 where it is not finite. tile: of SAMPLE
 * rows, where those whose channels are not adjacent are copied to; NULL where none are.
 */
static void sample_mean(
    const struct instructions *set, int dtype, const struct batch *job, const uint8_t *valid, int64_t rows, float *centre,
    float *const acc[2], float *scratch, char *tile)
{
    const size_t size = element_size(dtype);
    const int64_t stride = tile_stride(job->channels, size);
    struct batch tiled = *job;
    int64_t chosen[SAMPLE + AHEAD] = {0}, n = 0, row = 0;
    for (int64_t i = 0; i < SAMPLE; i++) {
        const int64_t from = rows * i / SAMPLE;
        if (row < from)
            row = from;
        while (row < rows && valid && !valid[row])
            row++;
        if (row < rows)
            chosen[n++] = row++;
    }
    for (int64_t i = 0; i < n && tile; i++) {
        take(&job->x, chosen[i], 1, job->channels, tile + (size_t)(i * stride) * size, stride, size);
        chosen[i] = i;
    }
    if (tile)
        tiled.x = (struct input){tile, 1, stride, 0, 1};
    const float share = n ? 1.0f / (float)n : 0.0f;
    set->moments[dtype](&tiled, chosen, n, acc, scratch); /* about zero */
    for (int64_t c = 0; c < job->channels; c++) {
        centre[c] = acc[0][c] * share;
        if (!is_finite(centre[c]))
            centre[c] = 0.0f;
    }
}

/* One step of the running mean, variance and step count with the sums of u and u^2, see MaskedBatchNorm.advance. */
static void advance_moments(
    int64_t channels, const double *sums, double rows, double number, float *mean, float *var, float *iters, double alpha)
{
    *iters = (float)((double)*iters + 1.0);
    if (!(rows > 0.0))
        return;
    int bad_mean = 0, bad_var = 0;
    for (int write = 0; write < 2; write++)
        for (int64_t c = 0; c < channels; c++) {
            const double own = sums[c] / rows, square = (sums[channels + c] - sums[c] * own) / number;
            const double biased = square < 0.0 ? 0.0 : square; /* NaN stays */
            const double unbiased = number > 1.0 ? biased * number / (number - 1.0) : biased;
            const float next_mean = (float)(alpha * mean[c] + (1.0 - alpha) * own);
            const float next_var = (float)(alpha * var[c] + (1.0 - alpha) * unbiased);
            if (write && !bad_mean)
                mean[c] = next_mean;
            if (write && !bad_var)
                var[c] = next_var;
            bad_mean |= !write && !is_finite(next_mean);
            bad_var |= !write && !is_finite(next_var);
        }
}

/*
 * Forward pass of training.
 *
 * valid: rows bytes, 0 at rows that do not count, or NULL. mean, moment: C, stand in where no row counts; mean NULL: nothing is
 * subtracted. fill: rows that do not count become the bias, and count in the number that a variance is divided by. y: as in
 * pn_evaluate. r: rows x groups, or NULL without layer scale. saved: 2 x C, for the backward pass: mean (0 without),
 * 1 / sqrt(moment + eps).
 *
 * tally: sums of u (with mean) and of u^2 over rows that count, (with fill) C times the number of all rows, the number of those that
 * count, 1; or NULL. step_mean (with mean), step_moment (C), step_iters (1): statistics that take their step here; or NULL.
 */
EXPORT int pn_batch_forward(
    int dtype, int64_t rows, int64_t channels, int64_t groups, int threads, const void *x, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t channel_stride, const uint8_t *valid, const float *weight, const float *bias, const float *mean,
    const float *moment, double eps, int fill, void *y, float *r, float *saved, double *tally, float *step_mean,
    float *step_moment, float *step_iters, double alpha)
{
    const int64_t C = channels, blocks = groups > 0 ? groups : 1, width = C / blocks;
    const struct instructions *set = instructions();
    const struct order order = order_of(dtype, C, width);
    const struct input in = {x, inner, outer_stride, inner_stride, channel_stride};
    float *own_mean = saved, *inv = saved + C;
    const size_t size = element_size(dtype);
    const int copied = mean && channel_stride != 1;
    char *tile = copied ? malloc((size_t)(SAMPLE * tile_stride(C, size)) * size) : NULL;
    double *sums = calloc((size_t)C * 6 + 2 * (size_t)blocks + 2, sizeof(double));
    if (!sums || (copied && !tile)) {
        free(sums);
        free(tile);
        return NO_MEMORY;
    }
    float *centre = (float *)(sums + 3 * C), *scale = centre + C, *shift = scale + C, *spare = shift + C, *scratch = spare + 2 * C;
    float *const acc[2] = {spare, spare + C};
    int64_t counted[2];
    struct batch job = {
        .x = in, .channels = C, .blocks = blocks, .width = width, .scaled = groups > 0, .single = one_by_one(dtype, rows, C),
        .centre = mean ? centre : NULL,
    };
    if (mean)
        sample_mean(set, dtype, &job, valid, rows, centre, acc, scratch, tile);
    free(tile);
    job.r = r;
    struct batch_work first = {
        .job = &job, .valid_rows = set->moments[dtype], .others = groups > 0 ? set->scales[dtype] : NULL, .valid = valid,
        .sums = 1, .dtype = dtype, .rows = rows,
    };
    int status = batch_run(&first, threads, &order, sums, sums + 2 * C, counted);
    if (status != OK) {
        free(sums);
        return status;
    }
    if (mean)
        from_sweeps_floats(&order, centre, spare);
    const double count = (double)counted[0], number = fill ? (double)rows : count;
    for (int64_t c = 0; c < C; c++) {
        double square = sums[C + c]; /* about the mean */
        own_mean[c] = 0.0f;
        if (mean) {
            const double apart = count > 0.0 ? sums[c] / count : 0.0, whole = centre[c] + apart;
            own_mean[c] = count > 0.0 ? (float)whole : mean[c];
            square -= sums[c] * apart;
            if (square < 0.0)
                square = 0.0;
            sums[c] = whole * count;
            sums[C + c] = square + whole * whole * count;
        }
        inv[c] = inverse_root(count > 0.0 ? (float)(square / number) : moment[c], (float)eps);
        centre[c] = channel_value(own_mean[c]);
    }
    set_scale(&order, inv, weight, scale, spare);
    set_shift(&order, bias, shift, spare);
    to_sweeps(&order, centre, spare);
    job.centre = centre;
    job.scale = scale;
    job.shift = shift;
    job.known = 1;
    job.out = y;
    job.out_stride = C;
    job.stream = streams(dtype, rows, C, channel_stride == 1 ? width : 0, y);
    struct batch_work second = {
        .job = &job, .valid_rows = set->outputs[dtype], .others = set->fills[dtype], .valid = fill ? valid : NULL, .reversed = 1,
        .dtype = dtype, .rows = rows,
    };
    int64_t ignored[2];
    status = batch_run(&second, threads, &order, NULL, NULL, ignored);
    const double *known = mean ? sums : sums + C;
    const int64_t kept = mean ? 2 * C : C, all = fill ? kept + C : kept;
    if (tally) {
        memcpy(tally, known, (size_t)kept * sizeof(double));
        for (int64_t c = kept; c < all; c++)
            tally[c] = (double)rows;
        tally[all] = count;
        tally[all + 1] = 1.0;
    }
    if (step_moment && status == OK) {
        if (mean)
            advance_moments(C, sums, count, number, step_mean, step_moment, step_iters, alpha);
        else
            advance_psi2(C, known, count, step_moment, step_iters, alpha, eps, 0.0, 0.0, INFINITY);
    }
    free(sums);
    return status;
}

/*
 * Backward pass: the exact gradient. x, valid, weight, r, saved, fill as in the forward pass; centred: a mean was subtracted. A
 * gradient that arrives at a row that does not count passes through that row and through the statistics.
 *
 * dx: as y, or NULL. grad_weight, grad_bias: C. tally: sums of weight * dy (if centred) and weight * dy * z, number of rows that
 * count, 1; or NULL.
 *
 * Returns NOT_FINITE, with nothing but those sums written, where one of them is not finite and there are rows that do not count.
 */
EXPORT int pn_batch_backward(
    int dtype, int64_t rows, int64_t channels, int64_t groups, int threads, const void *x, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t channel_stride, const void *dy, int64_t dy_inner, int64_t dy_outer_stride,
    int64_t dy_inner_stride, int64_t dy_channel_stride, float *r, const uint8_t *valid, const float *weight, const float *saved,
    int centred, int fill, void *dx, float *grad_weight, float *grad_bias, double *tally)
{
    const int64_t C = channels, blocks = groups > 0 ? groups : 1, width = C / blocks;
    const struct instructions *set = instructions();
    const struct order order = order_of(dtype, C, width);
    const float *inv = saved + C;
    double *sums = calloc((size_t)C * 8 + 1, sizeof(double));
    if (!sums)
        return NO_MEMORY;
    float *centre = (float *)(sums + 5 * C), *scale = centre + C, *shift = scale + C, *b = shift + C, *spare = b + C;
    int64_t counted[2];
    for (int64_t c = 0; c < C; c++)
        centre[c] = channel_value(saved[c]);
    to_sweeps(&order, centre, spare);
    set_scale(&order, inv, weight, scale, spare);
    struct batch job = {
        .x = {x, inner, outer_stride, inner_stride, channel_stride},
        .dy = {dy, dy_inner, dy_outer_stride, dy_inner_stride, dy_channel_stride},
        .channels = C, .blocks = blocks, .width = width, .scaled = groups > 0, .known = 1, .single = one_by_one(dtype, rows, C),
        .centre = centre, .scale = scale, .shift = shift, .b = b, .r = groups > 0 ? r : NULL,
    };
    struct batch_work first = {
        .job = &job, .valid_rows = set->gradient_sums[dtype], .others = set->gradient_sums[dtype], .valid = fill ? valid : NULL,
        .sums = fill && valid ? 2 : 1, .dtype = dtype, .rows = rows,
    };
    int status = batch_run(&first, threads, &order, sums, sums + 4 * C, counted);
    int64_t counting = rows;
    for (int64_t row = 0; valid && row < rows; row++)
        counting -= !valid[row];
    const double count = counting ? (double)counting : 1.0, number = fill ? (double)rows : count;
    double zero = 0.0;
    for (int64_t c = 0; c < C && status == OK; c++) {
        const double all = sums[c] + sums[2 * C + c]; /* of dy over all rows: with fill, the others' sums stand apart */
        const double grad_sum = sums[c], grad_u_sum = sums[C + c];
        const double through = (double)inv[c] * (weight ? weight[c] : 1.0f);
        grad_bias[c] = (float)all;
        grad_weight[c] = (float)(grad_u_sum * inv[c]);
        zero += (all + grad_u_sum) * 0.0; /* NaN as soon as one value is not finite */
        b[c] = channel_value((float)(through * grad_u_sum * inv[c] * inv[c] / number));
        shift[c] = centred ? channel_value((float)(through * grad_sum / count)) : 0.0f;
        if (tally && centred)
            tally[c] = grad_sum * (weight ? weight[c] : 1.0f);
        if (tally)
            tally[c + (centred ? C : 0)] = through * grad_u_sum;
    }
    if (tally) {
        tally[centred ? 2 * C : C] = (double)counting;
        tally[(centred ? 2 * C : C) + 1] = 1.0;
    }
    if (status == OK && zero != 0.0 && counting < rows)
        status = NOT_FINITE;
    if (status == OK && dx) {
        to_sweeps(&order, b, spare);
        to_sweeps(&order, shift, spare);
        job.valid = fill ? NULL : valid;
        job.out = dx;
        job.out_stride = C;
        job.stream = streams(dtype, rows, C, channel_stride == 1 ? width : 0, dx);
        struct batch_work second = {
            .job = &job, .valid_rows = set->gradients[dtype], .others = set->zeros[dtype], .valid = fill ? valid : NULL,
            .reversed = 1, .dtype = dtype, .rows = rows,
        };
        status = batch_run(&second, threads, &order, NULL, NULL, counted);
    }
    free(sums);
    return status;
}

/* Evaluation: y = (u - mean) * scale + bias, scale = weight / sqrt(moment + eps). weight, bias: C or NULL. y: as in pn_evaluate. */
EXPORT int pn_batch_evaluate(
    int dtype, int64_t rows, int64_t channels, int64_t groups, int threads, const void *x, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t channel_stride, const float *weight, const float *bias, const float *mean, const float *moment,
    double eps, void *y)
{
    const int64_t C = channels, blocks = groups > 0 ? groups : 1, width = C / blocks;
    const struct order order = order_of(dtype, C, width);
    float *inv = malloc(((size_t)C * 5 + 1) * sizeof(float));
    if (!inv)
        return NO_MEMORY;
    float *centre = inv + C, *scale = centre + C, *shift = scale + C, *spare = shift + C;
    for (int64_t c = 0; c < C; c++) {
        inv[c] = inverse_root(moment[c], (float)eps);
        centre[c] = channel_value(mean[c]);
    }
    to_sweeps(&order, centre, spare);
    set_scale(&order, inv, weight, scale, spare);
    set_shift(&order, bias, shift, spare);
    const struct batch job = {
        .x = {x, inner, outer_stride, inner_stride, channel_stride}, .channels = C, .blocks = blocks, .width = width,
        .scaled = groups > 0, .centre = centre, .scale = scale, .shift = shift, .out = y, .out_stride = C,
        .stream = streams(dtype, rows, C, channel_stride == 1 ? width : 0, y), .single = one_by_one(dtype, rows, C),
    };
    struct batch_work work = {.job = &job, .valid_rows = instructions()->outputs[dtype], .dtype = dtype, .rows = rows};
    int64_t counted[2];
    int status = batch_run(&work, threads, &order, NULL, NULL, counted);
    free(inv);
    return status;
}
