/* The keys with the largest inner products, for many queries, in one pass over the keys.
 *
 * A block of keys becomes columns in the first cache and meets all queries there. Its scores are compared with the k-th
 * best so far and forgotten: of M keys in random order about k log(M / k) are ever looked at twice.
 *
 * The file includes itself for float and for double.
 */
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "products.h"

#define AT_ONCE 20 /* queries whose scores wait to be compared */

/* The same in search.py. */
typedef struct {
    int64_t queries, keys, size, k, threads;
    const int64_t *first;    /* (queries + 1): where the excluded keys of each query begin in `excluded`; or null */
    const int64_t *excluded; /* in rising order for each query */
} Search;

static int is_excluded(const Search *all, int64_t query, int64_t key) {
    if (!all->first) return 0;
    int64_t low = all->first[query], high = all->first[query + 1];
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (all->excluded[middle] < key) low = middle + 1;
        else high = middle;
    }
    return low < all->first[query + 1] && all->excluded[low] == key;
}

#define REAL float
#define SUFFIX float
#include __FILE__
#undef REAL
#undef SUFFIX

#define REAL double
#define SUFFIX double
#include __FILE__

#else /* what is compiled once for each type */

#define COLUMNS (MOST_VECTORS * LANES) /* keys in a block: a tile is as wide */

/* Keys as columns (size, COLUMNS), with zeros where there are less. */
static void NAME(pack)(const REAL *keys, int64_t count, int64_t size, REAL *to) {
    int64_t whole = count / LANES * LANES, inside = size / LANES * LANES;
    if (count < COLUMNS) memset(to, 0, (size_t)(size * COLUMNS) * sizeof(REAL));
    for (int64_t j = 0; j < whole; j += LANES)
        for (int64_t d = 0; d < inside; d += LANES)
            NAME(flip_block)(keys + j * size + d, size, to + d * COLUMNS + j, COLUMNS);
    for (int64_t j = 0; j < count; j++) /* what is left over below and beside the blocks */
        for (int64_t d = j < whole ? inside : 0; d < size; d++) to[d * COLUMNS + j] = keys[j * size + d];
}

/* Put a key behind all of the same score. */
static void NAME(insert)(int64_t k, REAL value, int64_t key, REAL *score, int64_t *index) {
    int64_t at = k - 1;
    for (; at > 0 && score[at - 1] < value; at--) {
        score[at] = score[at - 1];
        index[at] = index[at - 1];
    }
    score[at] = value;
    index[at] = key;
}

/* Scores of one query and of the keys from `start` on: what beats the k-th best takes its place. */
static void NAME(look)(const Search *all, int64_t query, int64_t start, int64_t count, const REAL *restrict row,
    REAL *score, int64_t *index) {
    REAL least = score[all->k - 1];
    int better = 0;
    for (int64_t j = 0; j < COLUMNS; j++) better |= row[j] > least;
    for (int64_t first = 0; better && first < count; first += LANES) {
        int here = 0;
        for (int64_t j = first; j < first + LANES; j++) here |= row[j] > least;
        for (int64_t j = first; here && j < first + LANES && j < count; j++) {
            if (!(row[j] > least) || is_excluded(all, query, start + j)) continue;
            NAME(insert)(all->k, row[j], start + j, score, index);
            least = score[all->k - 1];
        }
    }
}

/* The best of a thread's share of the keys. */
static void NAME(scan)(const Search *all, const REAL *queries, const REAL *keys, int64_t start, int64_t end,
    REAL *memory, REAL *score, int64_t *index) {
    int64_t size = all->size, k = all->k;
    REAL *columns = memory, *scores = memory + size * COLUMNS;
    for (int64_t i = 0; i < all->queries * k; i++) score[i] = -(REAL)INFINITY, index[i] = 0;
    for (int64_t at = start; at < end; at += COLUMNS) {
        int64_t count = end - at < COLUMNS ? end - at : COLUMNS;
        NAME(pack)(keys + at * size, count, size, columns);
        for (int64_t q = 0; q < all->queries; q += AT_ONCE) {
            int64_t n = all->queries - q < AT_ONCE ? all->queries - q : AT_ONCE;
            NAME(multiply)(n, COLUMNS, size, queries + q * size, size, 1, columns, COLUMNS, NULL, 0, scores, COLUMNS);
            for (int64_t i = 0; i < n; i++)
                NAME(look)(all, q + i, at, count, scores + i * COLUMNS, score + (q + i) * k, index + (q + i) * k);
        }
    }
}

/* The best of what the threads found (threads, queries, k), of equal ones that of the earlier thread. */
static void NAME(join)(const Search *all, int64_t query, const REAL *scores, const int64_t *indexes, REAL *score,
    int64_t *index) {
    int64_t k = all->k, apart = all->queries * k;
    memcpy(score, scores + query * k, (size_t)k * sizeof(REAL));
    memcpy(index, indexes + query * k, (size_t)k * sizeof(int64_t));
    for (int64_t t = 1; t < all->threads; t++)
        for (int64_t i = t * apart + query * k; i < t * apart + (query + 1) * k && scores[i] > score[k - 1]; i++)
            NAME(insert)(k, scores[i], indexes[i], score, index);
}

/* queries (queries, size), keys (keys, size) -> score and index (queries, k), best first; -inf and 0 where none is left,
 * and of equal scores those of the lower keys in turn.
 */
int NAME(search)(const Search *all, const REAL *queries, const REAL *keys, REAL *score, int64_t *index) {
    int64_t found = all->threads * all->queries * all->k, blocks = (all->keys + COLUMNS - 1) / COLUMNS;
    size_t bytes = ((size_t)((all->size + AT_ONCE) * COLUMNS) * sizeof(REAL) + 63) / 64 * 64;
    REAL *scores = malloc((size_t)found * sizeof(REAL));
    int64_t *indexes = malloc((size_t)found * sizeof(int64_t));
    int ready = scores && indexes, failed = !ready;
#pragma omp parallel for num_threads((int)all->threads) schedule(static) reduction(+ : failed)
    for (int64_t t = 0; t < all->threads; t++) {
        REAL *memory = ready ? aligned_alloc(64, bytes) : NULL;
        int64_t start = blocks * t / all->threads * COLUMNS, end = blocks * (t + 1) / all->threads * COLUMNS;
        int64_t own = t * all->queries * all->k;
        end = end < all->keys ? end : all->keys;
        if (memory) NAME(scan)(all, queries, keys, start, end, memory, scores + own, indexes + own);
        failed += !memory;
        free(memory);
    }
    for (int64_t q = 0; !failed && q < all->queries; q++)
        NAME(join)(all, q, scores, indexes, score + q * all->k, index + q * all->k);
    free(scores);
    free(indexes);
    return failed;
}

#undef COLUMNS

#endif
