/* Rows of a table of bytes as float numbers, in one pass over memory. */
#include <stdint.h>

#define LINE 64  /* bytes that come from memory at once */
#define AHEAD 2  /* rows are asked for so long before they are read: they lie anywhere */

/* to (count, size) = scale * table[rows] */
void gather(const uint8_t *table, const int64_t *rows, int64_t count, int64_t size, float scale, float *to,
    int64_t threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t n = 0; n < count; n++) {
        for (int64_t i = 0; n + AHEAD < count && i < size; i += LINE)
            __builtin_prefetch(table + rows[n + AHEAD] * size + i);
        const uint8_t *restrict from = table + rows[n] * size;
        float *restrict out = to + n * size;
        for (int64_t i = 0; i < size; i++) out[i] = (float)from[i] * scale;
    }
}
