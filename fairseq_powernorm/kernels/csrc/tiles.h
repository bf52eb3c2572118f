/*
 * Rows whose channels are not adjacent, as those of B x C x T: the sweeps work on a copy of a few of them, a tile, which stays
 * in a core's cache. Included by powernorm.c once. A tile has a row after the other, `stride` elements apart.
 *
 * Elements are moved, never computed with: they are numbers of 4 or 2 bytes here. Blocks of SIDE x SIDE are transposed in
 * registers, so that each line of memory is taken whole: at a distance of a power of two, lines displace each other.
 */

/* bytes of a tile, of which a backward pass has two */
enum { TILE_BYTES = 256 << 10 };
/* rows of a tile: a multiple of so many */
enum { TILE_ROWS = 16 };
enum { LINE = 64 };

#define SHUFFLE2(a, b, type, ...) SHUFFLE_TWO(a, b, type, __VA_ARGS__)
#if defined(__clang__)
#define SHUFFLE_TWO(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE_TWO(a, b, type, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

typedef uint32_t word4 __attribute__((vector_size(16)));
typedef uint32_t word4_unaligned __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t half8 __attribute__((vector_size(16)));
typedef uint16_t half8_unaligned __attribute__((vector_size(16), aligned(2), may_alias));

#if X86
#define STREAM_TILE(p, v) _mm_stream_si128((__m128i *)(p), (__m128i)(v))
#else
#define STREAM_TILE(p, v) ((void)0) /* never reached: can_stream is 0 */
#endif

/* to[j * to_stride + i] = from[i * from_stride + j], i, j < 4. */
INLINE void transpose_32(const uint32_t *from, int64_t from_stride, uint32_t *to, int64_t to_stride, int stream)
{
    word4 v[4], w[4];
    for (int i = 0; i < 4; i++)
        v[i] = *(const word4_unaligned *)(from + i * from_stride);
    for (int i = 0; i < 4; i += 2) {
        w[i] = SHUFFLE2(v[i], v[i + 1], word4, 0, 4, 1, 5);
        w[i + 1] = SHUFFLE2(v[i], v[i + 1], word4, 2, 6, 3, 7);
    }
    v[0] = SHUFFLE2(w[0], w[2], word4, 0, 1, 4, 5);
    v[1] = SHUFFLE2(w[0], w[2], word4, 2, 3, 6, 7);
    v[2] = SHUFFLE2(w[1], w[3], word4, 0, 1, 4, 5);
    v[3] = SHUFFLE2(w[1], w[3], word4, 2, 3, 6, 7);
    for (int j = 0; j < 4; j++)
        if (stream)
            STREAM_TILE(to + j * to_stride, v[j]);
        else
            *(word4_unaligned *)(to + j * to_stride) = v[j];
}

/* The same for 8 x 8 numbers of 2 bytes. */
INLINE void transpose_16(const uint16_t *from, int64_t from_stride, uint16_t *to, int64_t to_stride, int stream)
{
    half8 v[8], w[8];
    for (int i = 0; i < 8; i++)
        v[i] = *(const half8_unaligned *)(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) { /* pairs of two rows: w[i] of columns 0 to 3, w[i + 1] of columns 4 to 7 */
        w[i] = SHUFFLE2(v[i], v[i + 1], half8, 0, 8, 1, 9, 2, 10, 3, 11);
        w[i + 1] = SHUFFLE2(v[i], v[i + 1], half8, 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) /* fours: v[i + q] of columns 2 q and 2 q + 1 */
        for (int half = 0; half < 2; half++) {
            const word4 low = (word4)w[i + half], high = (word4)w[i + half + 2];
            v[i + 2 * half] = (half8)SHUFFLE2(low, high, word4, 0, 4, 1, 5);
            v[i + 2 * half + 1] = (half8)SHUFFLE2(low, high, word4, 2, 6, 3, 7);
        }
    for (int q = 0; q < 4; q++) {
        const word4 low = (word4)v[q], high = (word4)v[q + 4];
        w[2 * q] = (half8)SHUFFLE2(low, high, word4, 0, 1, 4, 5);
        w[2 * q + 1] = (half8)SHUFFLE2(low, high, word4, 2, 3, 6, 7);
    }
    for (int j = 0; j < 8; j++)
        if (stream)
            STREAM_TILE(to + j * to_stride, w[j]);
        else
            *(half8_unaligned *)(to + j * to_stride) = w[j];
}

/*
 * n positions, adjacent in memory, of C channels, to the rows of a tile or back. Channels go outside: a block takes as many
 * positions of each as it needs for whole lines of memory, and asks for those of the channels after the next.
 */
#define MOVES(type, name, SIDE) \
    static void take_##name(const type *from, int64_t channel_stride, int64_t n, int64_t C, type *tile, int64_t stride) \
    { \
        int64_t c = 0; \
        for (; c + SIDE <= C; c += SIDE) { \
            int64_t i = 0; \
            for (; i + SIDE <= n; i += SIDE) { \
                if (i % (LINE / (int64_t)sizeof(type)) == 0 && c + 3 * SIDE <= C) \
                    for (int k = 0; k < SIDE; k++) \
                        __builtin_prefetch(from + (c + 2 * SIDE + k) * channel_stride + i, 0, 3); \
                transpose_##name(from + c * channel_stride + i, channel_stride, tile + i * stride + c, stride, 0); \
            } \
            for (; i < n; i++) \
                for (int k = 0; k < SIDE; k++) \
                    tile[i * stride + c + k] = from[(c + k) * channel_stride + i]; \
        } \
        for (; c < C; c++) \
            for (int64_t i = 0; i < n; i++) \
                tile[i * stride + c] = from[c * channel_stride + i]; \
    } \
    INLINE void bring_part_##name( \
        const type *tile, int64_t stride, int64_t n, int64_t C, type *to, int64_t channel_stride, const int stream) \
    { \
        int64_t c = 0; \
        for (; c + SIDE <= C; c += SIDE) { \
            int64_t i = 0; \
            for (; i + SIDE <= n; i += SIDE) \
                transpose_##name(tile + i * stride + c, stride, to + c * channel_stride + i, channel_stride, stream); \
            for (; i < n; i++) \
                for (int k = 0; k < SIDE; k++) \
                    to[(c + k) * channel_stride + i] = tile[i * stride + c + k]; \
        } \
        for (; c < C; c++) \
            for (int64_t i = 0; i < n; i++) \
                to[c * channel_stride + i] = tile[i * stride + c]; \
    } \
    static void bring_##name( \
        const type *tile, int64_t stride, int64_t n, int64_t C, type *to, int64_t channel_stride, int stream) \
    { \
        if (stream && (uintptr_t)to % LINE == 0 && channel_stride * (int64_t)sizeof(type) % LINE == 0) \
            bring_part_##name(tile, stride, n, C, to, channel_stride, 1); \
        else \
            bring_part_##name(tile, stride, n, C, to, channel_stride, 0); \
    }

MOVES(uint32_t, 32, 4)
MOVES(uint16_t, 16, 8)

/* Rows of a tile, and elements from one to the next: not a power of two. */
static int64_t tile_stride(int64_t channels, size_t size)
{
    const int64_t line = LINE / (int64_t)size;
    return (channels + line - 1) / line * line + line;
}

static int64_t tile_rows(int64_t channels, size_t size)
{
    int64_t rows = TILE_BYTES / (tile_stride(channels, size) * (int64_t)size) / TILE_ROWS * TILE_ROWS;
    return rows < TILE_ROWS ? TILE_ROWS : rows > BLOCK ? BLOCK : rows;
}

/* Rows first to first + n - 1 of `in` into a tile. */
static void take(const struct input *in, int64_t first, int64_t n, int64_t C, void *tile, int64_t stride, size_t size)
{
    const int64_t inner = in->inner < 1 ? 1 : in->inner;
    for (int64_t row = first, some; row < first + n; row += some) {
        const char *from = (const char *)in->data + offset(in, row) * (int64_t)size;
        char *to = (char *)tile + (row - first) * stride * (int64_t)size;
        some = in->channel_stride == 1 ? 1 : inner - row % inner;
        some = some < first + n - row ? some : first + n - row;
        if (in->channel_stride == 1)
            memcpy(to, from, (size_t)C * size);
        else if (size == 4)
            take_32((const uint32_t *)from, in->channel_stride, some, C, (uint32_t *)to, stride);
        else
            take_16((const uint16_t *)from, in->channel_stride, some, C, (uint16_t *)to, stride);
    }
}

/* A tile's rows back to where rows first to first + n - 1 of B x C x inner lie. */
static void bring(
    const void *tile, int64_t stride, void *out, int64_t inner, int64_t first, int64_t n, int64_t C, size_t size, int stream)
{
    for (int64_t row = first, some; row < first + n; row += some) {
        const char *from = (const char *)tile + (row - first) * stride * (int64_t)size;
        char *to = (char *)out + (row / inner * C * inner + row % inner) * (int64_t)size;
        some = inner - row % inner;
        some = some < first + n - row ? some : first + n - row;
        if (size == 4)
            bring_32((const uint32_t *)from, stride, some, C, (uint32_t *)to, inner, stream);
        else
            bring_16((const uint16_t *)from, stride, some, C, (uint16_t *)to, inner, stream);
    }
}
