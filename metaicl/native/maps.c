/* Group normalization, 2 x 2 max-pooling and ReLU of feature maps in one pass, and the way back.
 *
 * Maps are (rows, height, width, channels) in memory. The maps of one row fit into a core's second cache, so they come
 * from memory once. What normalization, pooling and ReLU would hand to each other is never written.
 *
 * The file includes itself for float, for double and for bfloat16, whose numbers become float where they are read.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#define BLOCK 32 /* places whose sum is taken in single precision */
#define NOWHERE 4 /* instead of which of four places was the largest: ReLU let none through */

/* The same in maps.py. */
typedef struct {
    int64_t rows, height, width, channels, groups, threads;
    double eps;
} Maps;

#define PASTE(name, suffix) name##_##suffix
#define EXPAND(name, suffix) PASTE(name, suffix)
#define NAME(name) EXPAND(name, SUFFIX)

static inline float widened(uint16_t value) {
    union { uint32_t bits; float number; } made = {.bits = (uint32_t)value << 16};
    return made.number;
}

/* To the nearest, of two as near to the even one; NaN stays NaN. */
static inline uint16_t narrowed(float value) {
    union { float number; uint32_t bits; } given = {.number = value};
    uint32_t rounded = (given.bits + 0x7fff + (given.bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

#define PIXEL float
#define REAL float
#define WORD int32_t
#define SUFFIX float
#define READ(value) (value)
#define WRITE(value) (value)
#include __FILE__
#undef PIXEL
#undef REAL
#undef WORD
#undef SUFFIX

#define PIXEL double
#define REAL double
#define WORD int64_t
#define SUFFIX double
#include __FILE__
#undef PIXEL
#undef REAL
#undef WORD
#undef SUFFIX
#undef READ
#undef WRITE

#define PIXEL uint16_t
#define REAL float
#define WORD int32_t
#define SUFFIX bfloat16
#define READ(value) widened(value)
#define WRITE(value) narrowed(value)
#include __FILE__

#else /* what is compiled once for each type: maps of PIXEL, all else of REAL */

/* total[c] = sums over places of x, or of squares of its distance from center[c]. */
static void NAME(sum)(const Maps *maps, const PIXEL *x, const REAL *center, REAL *restrict part, double *total) {
    int64_t channels = maps->channels, places = maps->height * maps->width;
    memset(total, 0, (size_t)channels * sizeof *total);
    for (int64_t start = 0; start < places; start += BLOCK) {
        int64_t end = start + BLOCK < places ? start + BLOCK : places;
        memset(part, 0, (size_t)channels * sizeof *part);
        for (int64_t p = start; p < end; p++) {
            const PIXEL *restrict at = x + p * channels;
            if (!center)
                for (int64_t c = 0; c < channels; c++) part[c] += READ(at[c]);
            else
                for (int64_t c = 0; c < channels; c++)
                    part[c] += (READ(at[c]) - center[c]) * (READ(at[c]) - center[c]);
        }
        for (int64_t c = 0; c < channels; c++) total[c] += (double)part[c];
    }
}

/* The four places under one pooled one; those beyond the border are the first again, which is never larger. */
static void NAME(find_window)(const Maps *maps, const PIXEL *x, int64_t i, int64_t j, const PIXEL *place[4]) {
    for (int64_t k = 0; k < 4; k++) {
        int64_t down = 2 * i + k / 2, right = 2 * j + k % 2;
        if (down >= maps->height) down--;
        if (right >= maps->width) right--;
        place[k] = x + (down * maps->width + right) * maps->channels;
    }
}

/* One pooled place: the largest of four, which of them it was, and ReLU. NaN counts as the largest, as in torch. */
static void NAME(pool)(int64_t channels, const PIXEL *restrict a, const PIXEL *restrict b, const PIXEL *restrict c,
    const PIXEL *restrict d, const REAL *restrict center, const REAL *restrict scale, const REAL *restrict shift,
    PIXEL *restrict out, uint8_t *restrict which) {
    for (int64_t i = 0; i < channels; i++) {
        REAL best = (READ(a[i]) - center[i]) * scale[i], second = (READ(b[i]) - center[i]) * scale[i];
        REAL third = (READ(c[i]) - center[i]) * scale[i], fourth = (READ(d[i]) - center[i]) * scale[i];
        WORD top = 0;
        top = second > best || second != second ? 1 : top;
        best = second > best || second != second ? second : best;
        top = third > best || third != third ? 2 : top;
        best = third > best || third != third ? third : best;
        top = fourth > best || fourth != fourth ? 3 : top;
        best = fourth > best || fourth != fourth ? fourth : best;
        best += shift[i];
        which[i] = (uint8_t)(best <= 0 ? NOWHERE : top);
        out[i] = WRITE(best <= 0 ? 0 : best);
    }
}

/* Sums of slopes, and of slopes times the distance from the mean of where they go. */
static void NAME(add_slopes)(int64_t channels, const PIXEL *restrict a, const PIXEL *restrict b,
    const PIXEL *restrict c, const PIXEL *restrict d, const REAL *restrict center, const PIXEL *restrict slope,
    const uint8_t *restrict which, REAL *restrict sum, REAL *restrict product) {
    for (int64_t i = 0; i < channels; i++) {
        WORD top = which[i]; /* four products of which three are zero: a choice of loads would make no vectors */
        REAL come = READ(slope[i]), mean = center[i];
        REAL first = top == 0 ? come : 0, second = top == 1 ? come : 0;
        REAL third = top == 2 ? come : 0, fourth = top == 3 ? come : 0;
        sum[i] += first + second + (third + fourth);
        product[i] += first * (READ(a[i]) - mean) + second * (READ(b[i]) - mean);
        product[i] += third * (READ(c[i]) - mean) + fourth * (READ(d[i]) - mean);
    }
}

/* Slopes at one place, `place` of its window. */
static void NAME(pull_place)(int64_t channels, WORD place, const PIXEL *restrict x, const REAL *restrict center,
    const REAL *restrict scale, const REAL *restrict level, const REAL *restrict tilt, const PIXEL *restrict slope,
    const uint8_t *restrict which, PIXEL *restrict to) {
    for (int64_t i = 0; i < channels; i++) {
        WORD top = which[i];
        REAL come = scale[i] * READ(slope[i]), rest = level[i] + tilt[i] * (READ(x[i]) - center[i]);
        to[i] = WRITE((top == place ? come : 0) - rest);
    }
}

/* out (rows, height / 2, width / 2, channels), rounded up.
 *
 * statistics: (rows, groups, 2), mean and 1 / standard deviation
 * which:      as out, the place that was the largest
 */
int NAME(norm_pool_relu)(const Maps *maps, const PIXEL *all, const REAL *weight, const REAL *bias, PIXEL *out,
    double *statistics, uint8_t *which) {
    int64_t channels = maps->channels, size = channels / maps->groups, n_places = maps->height * maps->width;
    int64_t high = (maps->height + 1) / 2, wide = (maps->width + 1) / 2;
    int failed = 0;
#pragma omp parallel num_threads((int)maps->threads) reduction(+ : failed)
    {
        double *total = malloc((size_t)channels * (sizeof(double) + 3 * sizeof(REAL)));
        failed += !total;
        REAL *scale = (REAL *)(total + channels), *center = scale + channels, *part = center + channels;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < maps->rows; row++) {
            if (!total) continue;
            const PIXEL *x = all + row * n_places * channels;
            for (int pass = 0; pass < 2; pass++) {
                NAME(sum)(maps, x, pass ? center : NULL, part, total);
                for (int64_t g = 0; g < maps->groups; g++) {
                    double mean = 0, *kept = statistics + (row * maps->groups + g) * 2;
                    for (int64_t c = g * size; c < (g + 1) * size; c++) mean += total[c];
                    mean /= (double)(size * n_places);
                    kept[pass] = pass ? 1 / sqrt(mean + maps->eps) : mean;
                    for (int64_t c = g * size; c < (g + 1) * size; c++) {
                        center[c] = (REAL)kept[0];
                        if (pass) scale[c] = (REAL)((double)weight[c] * kept[1]);
                    }
                }
            }
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = 0; j < wide; j++) {
                    int64_t spot = ((row * high + i) * wide + j) * channels;
                    const PIXEL *at[4];
                    NAME(find_window)(maps, x, i, j, at);
                    NAME(pool)(channels, at[0], at[1], at[2], at[3], center, scale, bias, out + spot, which + spot);
                }
        }
        free(total);
    }
    return failed;
}

/* From slopes (as out) to those at x, and summed over rows, in the order of threads, at weight and bias. */
int NAME(norm_pool_relu_backward)(const Maps *maps, const PIXEL *all, const REAL *weight, const double *statistics,
    const uint8_t *which, const PIXEL *slopes, PIXEL *x_slopes, REAL *weight_slopes, REAL *bias_slopes) {
    int64_t channels = maps->channels, size = channels / maps->groups, n_places = maps->height * maps->width;
    int64_t high = (maps->height + 1) / 2, wide = (maps->width + 1) / 2;
    double *sums = calloc((size_t)(2 * maps->threads * channels), sizeof *sums);
    if (!sums) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)maps->threads) reduction(+ : failed)
    {
        double *own = sums + 2 * omp_get_thread_num() * channels;
        REAL *work = malloc((size_t)channels * 6 * sizeof(REAL));
        failed += !work;
        REAL *sum = work, *product = sum + channels, *center = product + channels, *scale = center + channels;
        REAL *level = scale + channels, *tilt = level + channels;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < maps->rows; row++) {
            if (!work) continue;
            const PIXEL *x = all + row * n_places * channels;
            PIXEL *to = x_slopes + row * n_places * channels;
            const double *kept = statistics + row * maps->groups * 2;
            for (int64_t c = 0; c < channels; c++) {
                center[c] = (REAL)kept[c / size * 2];
                scale[c] = (REAL)((double)weight[c] * kept[c / size * 2 + 1]);
                sum[c] = product[c] = 0;
            }
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = 0; j < wide; j++) {
                    int64_t spot = ((row * high + i) * wide + j) * channels;
                    const PIXEL *at[4];
                    NAME(find_window)(maps, x, i, j, at);
                    NAME(add_slopes)(channels, at[0], at[1], at[2], at[3], center, slopes + spot, which + spot, sum,
                        product);
                }
            for (int64_t g = 0; g < maps->groups; g++) {
                double mean = 0, along = 0, rate = kept[2 * g + 1], count = (double)(size * n_places);
                for (int64_t c = g * size; c < (g + 1) * size; c++) {
                    mean += (double)weight[c] * (double)sum[c];
                    along += (double)weight[c] * (double)product[c] * rate;
                    own[c] += (double)product[c] * rate;
                    own[channels + c] += (double)sum[c];
                }
                for (int64_t c = g * size; c < (g + 1) * size; c++) {
                    level[c] = (REAL)(rate * mean / count);
                    tilt[c] = (REAL)(rate * rate * along / count);
                }
            }
            for (int64_t p = 0; p < n_places; p++) {
                int64_t i = p / maps->width, j = p % maps->width, at = p * channels;
                int64_t spot = ((row * high + i / 2) * wide + j / 2) * channels;
                NAME(pull_place)(channels, (WORD)(i % 2 * 2 + j % 2), x + at, center, scale, level, tilt, slopes + spot,
                    which + spot, to + at);
            }
        }
        free(work);
    }
    for (int64_t c = 0; c < channels; c++) {
        double of_weight = 0, of_bias = 0;
        for (int64_t t = 0; t < maps->threads; t++) {
            of_weight += sums[2 * t * channels + c];
            of_bias += sums[(2 * t + 1) * channels + c];
        }
        weight_slopes[c] = (REAL)of_weight;
        bias_slopes[c] = (REAL)of_bias;
    }
    free(sums);
    return failed;
}

#endif
