/* Products of matrices that fit into the first caches, for the files that include this one.
 *
 * `multiply`, `flip_block` and the type `Vector_of` are made for float and for double, with the suffix of the type,
 * which NAME puts there. Rows are padded to whole vectors of VECTOR_BYTES, which comes from library.py.
 */
#ifndef REAL

#include <stdint.h>
#include <string.h>

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif

#ifdef __AVX512VL__
#define MOST_SUMS 25 /* in vector registers at a time, of which there are 32 */
#define MOST_VECTORS 5
#else
#define MOST_SUMS 12
#define MOST_VECTORS 2
#endif
#define MOST_ROWS 8 /* of one vector each: as many sums as keep the processor busy */

#if defined(__GNUC__) && !defined(__clang__)
#define ONCE __attribute__((noinline, noclone)) /* copies of it for each caller take seconds to compile */
#else
#define ONCE __attribute__((noinline))
#endif

#define PASTE(name, suffix) name##_##suffix
#define EXPAND(name, suffix) PASTE(name, suffix)
#define NAME(name) EXPAND(name, SUFFIX)
#define Vector NAME(Vector_of)
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))

#define REAL float
#define SUFFIX float
#define INTERLEAVE(a, b, at) \
    __builtin_shufflevector(a, b, at, at + 8, at + 1, at + 9, at + 2, at + 10, at + 3, at + 11)
#include "products.h"
#undef REAL
#undef SUFFIX
#undef INTERLEAVE

#define REAL double
#define SUFFIX double
#define INTERLEAVE(a, b, at) __builtin_shufflevector(a, b, at, at + 4, at + 1, at + 5)
#include "products.h"
#undef REAL
#undef SUFFIX
#undef INTERLEAVE

#else /* what is compiled once for each type */

typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES)));

/* C (rows, vectors) = A B + `first`, or A B without it; A is read by two strides. Its sums stay in registers. */
static inline __attribute__((always_inline)) void NAME(tile)(const int rows, const int vectors, int64_t inner,
    const REAL *a, int64_t a_row, int64_t a_inner, const REAL *b, int64_t b_row, const REAL *first, int64_t first_row,
    REAL *c, int64_t c_row) {
    Vector sum[MOST_SUMS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            sum[i * vectors + j] = first ? *(const Vector *)(first + i * first_row + j * LANES) : (Vector){0};
    for (int64_t k = 0; k < inner; k++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++)
                sum[i * vectors + j] += a[i * a_row + k * a_inner] * *(const Vector *)(b + k * b_row + j * LANES);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) *(Vector *)(c + i * c_row + j * LANES) = sum[i * vectors + j];
}

/* The same for any m and for any n that is a whole number of vectors. Its tiles are as large as registers allow, and of
 * about the same height: a low one has too few sums to keep the processor busy. */
static ONCE void NAME(multiply)(int64_t m, int64_t n, int64_t inner, const REAL *a, int64_t a_row, int64_t a_inner,
    const REAL *b, int64_t b_row, const REAL *first, int64_t first_row, REAL *c, int64_t c_row) {
#define CASE(rows, vectors) \
    case vectors * (MOST_ROWS + 1) + rows: \
        if (rows * vectors <= MOST_SUMS) \
            NAME(tile)(rows, vectors, inner, a + i * a_row, a_row, a_inner, b + j, b_row, \
                first ? first + i * first_row + j : first, first_row, c + i * c_row + j, c_row); \
        break;
#define CASES(vectors) \
    CASE(1, vectors) CASE(2, vectors) CASE(3, vectors) CASE(4, vectors) \
    CASE(5, vectors) CASE(6, vectors) CASE(7, vectors) CASE(8, vectors)
#define MOST_OF(sums) ((sums) < MOST_ROWS ? (sums) : MOST_ROWS)
    static const uint32_t most[] = {
        0, MOST_ROWS, MOST_OF(MOST_SUMS / 2), MOST_OF(MOST_SUMS / 3), MOST_SUMS / 4, MOST_SUMS / 5};
    uint32_t left = (uint32_t)(n / LANES), height = (uint32_t)m, vectors;
    for (int64_t j = 0; left; j += vectors * LANES, left -= vectors) {
        uint32_t across = (left + MOST_VECTORS - 1) / MOST_VECTORS;
        vectors = (left + across - 1) / across;
        uint32_t down = (height + most[vectors] - 1) / most[vectors], rows;
        for (int64_t i = 0; i < m; i += rows) {
            rows = (height - (uint32_t)i + down - 1) / down, down--;
            switch (vectors * (MOST_ROWS + 1) + rows) {
                CASES(1)
                CASES(2)
#if MOST_VECTORS > 2
                CASES(3)
                CASES(4)
                CASES(5)
#endif
            }
        }
    }
#undef CASE
#undef CASES
#undef MOST_OF
}

/* Rows of a square block become columns: halves of rows are interleaved until each number has met all others. */
static inline __attribute__((always_inline)) void NAME(flip_block)(const REAL *from, int64_t from_row, REAL *to,
    int64_t to_row) {
#if __has_builtin(__builtin_shufflevector) && VECTOR_BYTES == 32
    Vector row[LANES], mixed[LANES];
    for (int64_t i = 0; i < LANES; i++) memcpy(row + i, from + i * from_row, sizeof *row); /* wherever it lies */
    for (int64_t met = 1; met < LANES; met *= 2) {
        for (int64_t i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = INTERLEAVE(row[i], row[i + LANES / 2], 0);
            mixed[2 * i + 1] = INTERLEAVE(row[i], row[i + LANES / 2], LANES / 2);
        }
        memcpy(row, mixed, sizeof row);
    }
    for (int64_t i = 0; i < LANES; i++) *(Vector *)(to + i * to_row) = row[i];
#else
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t j = 0; j < LANES; j++) to[j * to_row + i] = from[i * from_row + j];
#endif
}

#endif
