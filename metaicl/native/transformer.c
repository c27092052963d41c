/* What a Transformer does between its matrix products, causal softmax attention and GELU by tanh, and the way back.
 *
 * What torch has for attention is made for long sequences: it copies queries, keys and values apart, and does twice the
 * products that a causal mask leaves. Here one head of one task stays in a core's second cache from scores to answers,
 * and columns behind the mask are left out by blocks.
 *
 * The file includes itself for float and for double.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
#define ROWS 4 /* of a block of products, which keeps in registers */
#define PANEL 32 /* queries whose weights are kept at a time */

/* The same in transformer.py. */
typedef struct {
    int64_t tasks, tokens, heads, size, threads;
} Attention;

typedef struct {
    int64_t count, threads;
} Numbers;

/* Keeps a vector in its register, where the compiler would read it from memory again for every row. */
#ifdef __AVX512F__
#define HELD(vector) __asm__("" : "+v"(vector))
#else
#define HELD(vector) (void)(vector)
#endif

#define PASTE(name, suffix) name##_##suffix
#define EXPAND(name, suffix) PASTE(name, suffix)
#define NAME(name) EXPAND(name, SUFFIX)
#define INLINE static inline __attribute__((always_inline))

static int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/* Where one head of one task begins, if every token has `parts` times (heads, size) numbers. */
static int64_t start_of(const Attention *all, int64_t one, int64_t parts) {
    int64_t dim = all->heads * all->size;
    return one / all->heads * all->tokens * parts * dim + one % all->heads * all->size;
}

/* exp(x) within two units of the last place; 0 for x < -87, exp(88) for x > 88. The library's makes no vectors. */
INLINE float exp_float(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits */
    float held = x < -87.0f ? -87.0f : x;
    held = held > 88.0f ? 88.0f : held;
    union { float number; uint32_t bits; } whole = {.number = held * 1.44269504f + magic}, scale;
    float n = whole.number - magic;
    float r = held - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first of few digits */
    float tail = 1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040));
    float value = 1 + r * (1 + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * tail))));
    scale.bits = (whole.bits + 127) << 23;
    return x < -87.0f ? 0 : value * scale.number;
}

INLINE double exp_double(double x) { return exp(x); }

#define REAL float
#define SUFFIX float
#include __FILE__
#undef REAL
#undef SUFFIX

#define REAL double
#define SUFFIX double
#include __FILE__

#else /* what is compiled once for each type */

#define LANES ((int64_t)(BYTES / sizeof(REAL)))
#define VECTOR NAME(vector)
typedef REAL VECTOR __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

/* to[r][:] (+)= sum over k < n of a[r * a_row + k * a_step] * b[k][:], for ROWS rows and `wide` vectors of columns. */
INLINE void NAME(products)(const int wide, const REAL *a, int64_t a_row, int64_t a_step, const REAL *b, int64_t b_step,
    int64_t n, REAL *to, int64_t to_step, int add) {
    VECTOR sum[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < wide; w++)
            sum[r][w] = add ? *(const VECTOR *)(to + r * to_step + w * LANES) : (VECTOR){0};
    for (int64_t k = 0; k < n; k++) {
        VECTOR first = *(const VECTOR *)(b + k * b_step);
        VECTOR second = wide > 1 ? *(const VECTOR *)(b + k * b_step + LANES) : first;
        HELD(first);
        HELD(second);
        for (int r = 0; r < ROWS; r++) {
            REAL each = a[r * a_row + k * a_step];
            sum[r][0] += each * first;
            if (wide > 1) sum[r][1] += each * second;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < wide; w++) *(VECTOR *)(to + r * to_step + w * LANES) = sum[r][w];
}

/* The same for `columns` columns, whole vectors of them. */
static void NAME(multiply)(const REAL *a, int64_t a_row, int64_t a_step, const REAL *b, int64_t b_step, int64_t n,
    REAL *to, int64_t to_step, int64_t columns, int add) {
    int64_t c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES)
        NAME(products)(2, a, a_row, a_step, b + c, b_step, n, to + c, to_step, add);
    if (c < columns) NAME(products)(1, a, a_row, a_step, b + c, b_step, n, to + c, to_step, add);
}

/* What one thread works with: one head of one task, rows and columns padded by zeros. */
typedef struct {
    int64_t wide, high; /* padded head size, padded tokens */
    REAL *query, *key, *value, *slope;      /* (high, wide) */
    REAL *key_across, *value_across;        /* (wide, high) */
    REAL *key_slope, *value_slope;          /* (high, wide) */
    REAL *weight, *pull;                    /* (PANEL, high) */
    REAL *block;                            /* (PANEL, wide) */
} NAME(Work);
#define WORK NAME(Work)

static REAL *NAME(make_work)(const Attention *all, WORK *work) {
    int64_t wide = work->wide = rounded_up(all->size, LANES), high = work->high = rounded_up(all->tokens, PANEL);
    int64_t area = wide * high, panel = PANEL * high;
    REAL *memory = calloc((size_t)(8 * area + 2 * panel + PANEL * wide), sizeof(REAL));
    REAL **rooms[] = {&work->query, &work->key, &work->value, &work->slope, &work->key_across, &work->value_across,
        &work->key_slope, &work->value_slope};
    for (int i = 0; i < 8; i++) *rooms[i] = memory + i * area;
    work->weight = memory + 8 * area;
    work->pull = work->weight + panel;
    work->block = work->pull + panel;
    return memory;
}

/* Rows of one head, `step` numbers apart in memory, side by side and times `scale`. */
static void NAME(gather)(const Attention *all, const REAL *from, int64_t step, REAL scale, REAL *to, int64_t wide) {
    for (int64_t t = 0; t < all->tokens; t++)
        for (int64_t c = 0; c < all->size; c++) to[t * wide + c] = scale * from[t * step + c];
}

/* The way back of that, for `n` rows. */
static void NAME(scatter)(const Attention *all, const REAL *from, int64_t wide, REAL scale, REAL *to, int64_t step,
    int64_t n) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t c = 0; c < all->size; c++) to[t * step + c] = scale * from[t * wide + c];
}

/* Rows become columns. */
static void NAME(turn)(const Attention *all, const REAL *from, int64_t wide, REAL *to, int64_t high) {
    for (int64_t c = 0; c < all->size; c++)
        for (int64_t t = 0; t < all->tokens; t++) to[c * high + t] = from[t * wide + c];
}

static REAL NAME(query_scale)(const Attention *all) { return (REAL)(1 / sqrt((double)all->size)); }

/* Queries times their scale, keys and values of one head. */
static void NAME(open)(const Attention *all, const REAL *tokens, const WORK *work) {
    int64_t dim = all->heads * all->size;
    NAME(gather)(all, tokens, 3 * dim, NAME(query_scale)(all), work->query, work->wide);
    NAME(gather)(all, tokens + dim, 3 * dim, 1, work->key, work->wide);
    NAME(gather)(all, tokens + 2 * dim, 3 * dim, 1, work->value, work->wide);
    NAME(turn)(all, work->key, work->wide, work->key_across, work->high);
}

/* A row of scores without those after its own place, whose weight exp makes zero; the largest, of which NaN is none. */
static REAL NAME(hide)(REAL *restrict row, int64_t own, int64_t end) {
    for (int64_t j = own + 1; j < end; j++) row[j] = -(REAL)INFINITY;
    REAL best[BYTES / sizeof(REAL)]; /* one for each lane: the compiler may not change the order of comparisons */
    for (int64_t i = 0; i < LANES; i++) best[i] = row[i];
    for (int64_t j = LANES; j < end; j += LANES)
        for (int64_t i = 0; i < LANES; i++) best[i] = row[j + i] > best[i] ? row[j + i] : best[i];
    REAL top = row[0];
    for (int64_t i = 0; i < LANES; i++) top = best[i] > top ? best[i] : top;
    return top;
}

static REAL NAME(total)(VECTOR part) {
    REAL sum = 0;
    for (int64_t i = 0; i < LANES; i++) sum += part[i];
    return sum;
}

/* Scores become weights that are to be divided by their sum, which it returns. */
static REAL NAME(weigh)(REAL *restrict row, int64_t end, REAL top) {
    for (int64_t j = 0; j < end; j++) row[j] = NAME(exp)(row[j] - top);
    VECTOR part = {0};
    for (int64_t j = 0; j < end; j += LANES) part += *(const VECTOR *)(row + j);
    return NAME(total)(part);
}

/* Slopes at scores from weights and slopes at weights, in place: weight * (slope - sum of weight * slope). */
static void NAME(pull_scores)(const REAL *restrict weight, REAL *restrict slope, int64_t end) {
    VECTOR part = {0};
    for (int64_t j = 0; j < end; j += LANES) part += *(const VECTOR *)(weight + j) * *(const VECTOR *)(slope + j);
    REAL mean = NAME(total)(part);
    for (int64_t j = 0; j < end; j++) slope[j] = weight[j] * (slope[j] - mean);
}

/* What a call reads and writes. */
typedef struct {
    const REAL *tokens; /* (tasks, tokens, 3, heads, size), queries, keys and values */
    const REAL *slopes; /* (tasks, tokens, heads, size), at the answers; on the way back only */
    REAL *sums;         /* (tasks, heads, tokens), the logarithm of what each row of weights was divided by */
    REAL *to;           /* the answers, as slopes, or slopes at the tokens, as those */
} NAME(Tensors);
#define TENSORS NAME(Tensors)

typedef void NAME(Visit)(const Attention *all, const TENSORS *of, const WORK *work, int64_t one);

static int NAME(each_head)(const Attention *all, const TENSORS *of, NAME(Visit) *visit) {
    int failed = 0;
#pragma omp parallel num_threads((int)all->threads) reduction(+ : failed)
    {
        WORK work;
        REAL *memory = NAME(make_work)(all, &work);
        failed += !memory;
#pragma omp for schedule(static)
        for (int64_t one = 0; one < all->tasks * all->heads; one++)
            if (memory) visit(all, of, &work, one);
        free(memory);
    }
    return failed;
}

/* The answers of one head. */
static void NAME(attend_head)(const Attention *all, const TENSORS *of, const WORK *work, int64_t one) {
    int64_t dim = all->heads * all->size, count = all->tokens, wide = work->wide, high = work->high;
    REAL *answers = of->to + start_of(all, one, 1), *sums = of->sums + one * count;
    NAME(open)(all, of->tokens + start_of(all, one, 3), work);
    for (int64_t i = 0; i < count; i += ROWS) {
        int64_t n = count - i < ROWS ? count - i : ROWS, end = rounded_up(i + ROWS, LANES);
        REAL scale[ROWS];
        NAME(multiply)(work->query + i * wide, wide, 1, work->key_across, high, all->size, work->weight, high, end, 0);
        for (int64_t r = 0; r < n; r++) {
            REAL *row = work->weight + r * high, top = NAME(hide)(row, i + r, end);
            REAL sum = NAME(weigh)(row, end, top);
            sums[i + r] = top + (REAL)log((double)sum);
            scale[r] = 1 / sum;
        }
        NAME(multiply)(work->weight, high, 1, work->value, wide, i + n, work->block, wide, wide, 0);
        for (int64_t r = 0; r < n; r++)
            NAME(scatter)(all, work->block + r * wide, wide, scale[r], answers + (i + r) * dim, dim, 1);
    }
}

/* Weights and slopes at scores of the queries from `start` on, and slopes at these queries but for their scale. */
static void NAME(pull_queries)(const Attention *all, const WORK *work, const REAL *sums, int64_t start, int64_t rows) {
    int64_t wide = work->wide, high = work->high, end = rounded_up(start + rows, LANES);
    for (int64_t i = 0; i < rows; i += ROWS) {
        REAL *weight = work->weight + i * high, *pull = work->pull + i * high;
        const REAL *query = work->query + (start + i) * wide, *slope = work->slope + (start + i) * wide;
        NAME(multiply)(query, wide, 1, work->key_across, high, all->size, weight, high, end, 0);
        NAME(multiply)(slope, wide, 1, work->value_across, high, all->size, pull, high, end, 0);
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t own = start + i + r;
            if (own < all->tokens) {
                NAME(hide)(weight + r * high, own, end);
                NAME(weigh)(weight + r * high, end, sums[own]);
                NAME(pull_scores)(weight + r * high, pull + r * high, end);
            } else { /* padding */
                memset(weight + r * high, 0, (size_t)end * sizeof(REAL));
                memset(pull + r * high, 0, (size_t)end * sizeof(REAL));
            }
        }
        NAME(multiply)(pull, high, 1, work->key, wide, start + i + ROWS, work->block + i * wide, wide, wide, 0);
    }
}

/* Adds to the slopes at keys and values what comes from the queries from `start` on. */
static void NAME(pull_keys_and_values)(const WORK *work, int64_t start, int64_t rows) {
    int64_t wide = work->wide, high = work->high;
    for (int64_t j = 0; j < start + rows; j += ROWS) {
        int64_t first = j > start ? j - start : 0, n = rows - first, from = first * high + j;
        const REAL *query = work->query + (start + first) * wide, *slope = work->slope + (start + first) * wide;
        NAME(multiply)(work->pull + from, 1, high, query, wide, n, work->key_slope + j * wide, wide, wide, 1);
        NAME(multiply)(work->weight + from, 1, high, slope, wide, n, work->value_slope + j * wide, wide, wide, 1);
    }
}

/* Slopes at the tokens of one head. */
static void NAME(pull_head)(const Attention *all, const TENSORS *of, const WORK *work, int64_t one) {
    int64_t dim = all->heads * all->size, count = all->tokens, wide = work->wide;
    size_t bytes = (size_t)(wide * work->high) * sizeof(REAL);
    REAL *to = of->to + start_of(all, one, 3);
    NAME(open)(all, of->tokens + start_of(all, one, 3), work);
    NAME(gather)(all, of->slopes + start_of(all, one, 1), dim, 1, work->slope, wide);
    NAME(turn)(all, work->value, wide, work->value_across, work->high);
    memset(work->key_slope, 0, bytes);
    memset(work->value_slope, 0, bytes);
    for (int64_t start = 0; start < count; start += PANEL) {
        int64_t real = count - start < PANEL ? count - start : PANEL, rows = rounded_up(real, ROWS);
        NAME(pull_queries)(all, work, of->sums + one * count, start, rows);
        NAME(scatter)(all, work->block, wide, NAME(query_scale)(all), to + start * 3 * dim, 3 * dim, real);
        NAME(pull_keys_and_values)(work, start, rows);
    }
    NAME(scatter)(all, work->key_slope, wide, 1, to + dim, 3 * dim, count);
    NAME(scatter)(all, work->value_slope, wide, 1, to + 2 * dim, 3 * dim, count);
}

/* See TENSORS. */
int NAME(attend)(const Attention *all, const REAL *tokens, REAL *out, REAL *sums) {
    TENSORS of = {.tokens = tokens, .sums = sums, .to = out};
    return NAME(each_head)(all, &of, NAME(attend_head));
}

int NAME(attend_backward)(const Attention *all, const REAL *tokens, REAL *sums, const REAL *slopes, REAL *to) {
    TENSORS of = {.tokens = tokens, .slopes = slopes, .sums = sums, .to = to};
    return NAME(each_head)(all, &of, NAME(pull_head));
}

/* x / (1 + exp(-2 u)), which is x / 2 (1 + tanh(u)), with u = sqrt(2 / pi) (x + .044715 x^3). */
int NAME(gelu)(const Numbers *all, const REAL *restrict x, REAL *restrict out) {
    const REAL rate = (REAL)(2 * 0.79788456080286535588), cubic = (REAL)0.044715;
#pragma omp parallel for num_threads((int)all->threads) schedule(static)
    for (int64_t i = 0; i < all->count; i++) {
        REAL z = rate * x[i] * (1 + cubic * x[i] * x[i]);
        out[i] = x[i] / (1 + NAME(exp)(-z));
    }
    return 0;
}

int NAME(gelu_backward)(const Numbers *all, const REAL *restrict x, const REAL *restrict slopes, REAL *restrict to) {
    const REAL rate = (REAL)(2 * 0.79788456080286535588), cubic = (REAL)0.044715;
#pragma omp parallel for num_threads((int)all->threads) schedule(static)
    for (int64_t i = 0; i < all->count; i++) {
        REAL square = cubic * x[i] * x[i], gate = 1 / (1 + NAME(exp)(-rate * x[i] * (1 + square)));
        to[i] = slopes[i] * gate * (1 + x[i] * (1 - gate) * rate * (1 + 3 * square));
    }
    return 0;
}

#undef LANES
#undef VECTOR
#undef WORK
#undef TENSORS

#endif
