/* Gradient descent of multilayer perceptrons on the supports of many tasks, what they answer, and the way back.
 *
 * One task fits into the first caches, so its whole inner loop runs before that of the next task. The way back is the
 * exact recursion lambda_k = lambda_{k+1} - H_k (rate * lambda_{k+1}), with H_k the Hessian of the inner loss at the
 * weights before step k. Its product with a vector is Pearlmutter's R-operator (Neural Computation 6, 1994) for the
 * layers at hand. Of the way forward only weights are kept, not activations.
 *
 * Rows of matrices are padded to whole vectors. Nothing that leaves this file is computed from the padding.
 *
 * The file includes itself for float and for double.
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

#include "products.h"

#define MOST_LAYERS 16

enum { IDENTITY, RELU, TANH, SIGMOID };

/* The same in perceptron.py. Weights come as 2 * layers tensors: matrix (out, in) and bias of each layer. */
typedef struct {
    int64_t layers, activation, tasks, rows, steps;
    int64_t rate_rows;      /* 1: the same rates in every step */
    int64_t rates_of_parts; /* whether rates are those of the 2 * layers parts; otherwise those of all their elements */
    int64_t exact_from;     /* steps before this one are first order */
    int64_t threads, new_rows;
    double order;           /* second derivatives are multiplied by it */
    const int64_t *sizes;   /* layers + 1 */
    const int64_t *strides; /* 2 * layers: from the tensor of one task to that of the next; 0 where tasks share it */
    const void *x;          /* (tasks, rows, inputs) */
    const void *targets;    /* (tasks, rows, outputs): the inner loss is the mean of squares over outputs; or null */
    const int64_t *labels;  /* (tasks, rows): the inner loss is cross-entropy; or null */
    const void *importance; /* (tasks, rows): what the loss of each row counts */
    const void *new_x;      /* (tasks, new_rows, inputs): to be answered after a descent */
} Problem;

#define REAL float
#define SUFFIX float
#define EXP expf
#define TANH_OF tanhf
#include __FILE__
#undef REAL
#undef SUFFIX
#undef EXP
#undef TANH_OF

#define REAL double
#define SUFFIX double
#define EXP exp
#define TANH_OF tanh
#include __FILE__

#else /* what is compiled once for each type */

#define Layout NAME(Layout_of)
#define Work NAME(Work_of)

/* Where parts of a set of weights lie: matrices (out, in), biases, and elsewhere the matrices transposed (in, out). */
typedef struct {
    int64_t layers, size[MOST_LAYERS + 1], width[MOST_LAYERS + 1]; /* width: the size, padded */
    int64_t matrix[MOST_LAYERS], bias[MOST_LAYERS], flipped[MOST_LAYERS];
    int64_t total, total_flipped, count; /* count: without padding */
} Layout;

/* What a thread works with: sets of weights, and of each layer numbers (rows, width). */
typedef struct {
    REAL *weights, *direction, *lambda, *gradient, *product, *sum, *rates, *flipped, *flipped_direction;
    REAL *active[MOST_LAYERS + 1], *slope[MOST_LAYERS + 1], *moved[MOST_LAYERS + 1], *moved_slope[MOST_LAYERS + 1];
    REAL *odds, *through;
    void *memory;
} Work;

static Layout NAME(layout)(const Problem *problem) {
    Layout at;
    memset(&at, 0, sizeof at);
    at.layers = problem->layers;
    for (int64_t l = 0; l <= at.layers; l++) {
        at.size[l] = problem->sizes[l];
        at.width[l] = (at.size[l] + LANES - 1) / LANES * LANES;
    }
    for (int64_t l = 0; l < at.layers; l++) {
        at.matrix[l] = at.total;
        at.bias[l] = at.matrix[l] + at.size[l + 1] * at.width[l];
        at.total = at.bias[l] + at.width[l + 1];
        at.flipped[l] = at.total_flipped;
        at.total_flipped += at.size[l] * at.width[l + 1];
        at.count += at.size[l + 1] * (at.size[l] + 1);
    }
    return at;
}

static int NAME(reserve)(const Layout *at, int64_t rows, int64_t rate_rows, Work *work) {
    int64_t places = 0, widest = 0;
    for (int64_t l = 0; l <= at->layers; l++) {
        places += at->width[l];
        widest = at->width[l] > widest ? at->width[l] : widest;
    }
    int64_t all = (6 + rate_rows) * at->total + 2 * at->total_flipped + rows * (4 * places + 2 * widest);
    size_t bytes = ((size_t)all * sizeof(REAL) + 63) / 64 * 64;
    REAL *next = work->memory = aligned_alloc(64, bytes);
    if (!next) return 0;
    memset(next, 0, bytes);
    REAL **sets[] = {&work->weights, &work->direction, &work->lambda, &work->gradient, &work->product, &work->sum};
    for (int i = 0; i < 6; i++, next += at->total) *sets[i] = next;
    work->rates = next, next += rate_rows * at->total;
    work->flipped = next, next += at->total_flipped;
    work->flipped_direction = next, next += at->total_flipped;
    for (int64_t l = 0; l <= at->layers; l++) {
        REAL **kinds[] = {&work->active[l], &work->slope[l], &work->moved[l], &work->moved_slope[l]};
        for (int i = 0; i < 4; i++, next += rows * at->width[l]) *kinds[i] = next;
    }
    work->odds = next, next += rows * widest;
    work->through = next;
    return 1;
}

static void NAME(flip)(const Layout *at, const REAL *weights, REAL *flipped) {
    for (int64_t l = 0; l < at->layers; l++) {
        int64_t n_in = at->size[l], n_out = at->size[l + 1], in_row = at->width[l], out_row = at->width[l + 1];
        int64_t whole_in = n_in / LANES * LANES, whole_out = n_out / LANES * LANES;
        const REAL *from = weights + at->matrix[l];
        REAL *to = flipped + at->flipped[l];
        for (int64_t o = 0; o < whole_out; o += LANES)
            for (int64_t i = 0; i < whole_in; i += LANES)
                NAME(flip_block)(from + o * in_row + i, in_row, to + i * out_row + o, out_row);
        for (int64_t i = 0; i < n_in; i++) /* what is left over below and beside the blocks */
            for (int64_t o = i < whole_in ? whole_out : 0; o < n_out; o++) to[i * out_row + o] = from[o * in_row + i];
    }
}

/* Add the tensors of a task to a set of weights; those that are null are left out. */
static void NAME(add_parts)(const Layout *at, const REAL *const *parts, const int64_t *strides, int64_t task,
    REAL *to) {
    for (int64_t l = 0; l < at->layers; l++) {
        const REAL *matrix = parts[2 * l], *bias = parts[2 * l + 1];
        int64_t n_in = at->size[l], n_out = at->size[l + 1];
        for (int64_t o = 0; matrix && o < n_out; o++)
            for (int64_t i = 0; i < n_in; i++)
                to[at->matrix[l] + o * at->width[l] + i] += matrix[task * strides[2 * l] + o * n_in + i];
        for (int64_t o = 0; bias && o < n_out; o++) to[at->bias[l] + o] += bias[task * strides[2 * l + 1] + o];
    }
}

/* Write a set of weights to the tensors of a task; those that are null are left out. */
static void NAME(write_parts)(const Layout *at, const REAL *from, const int64_t *strides, int64_t task, REAL **parts) {
    for (int64_t l = 0; l < at->layers; l++) {
        REAL *matrix = parts[2 * l], *bias = parts[2 * l + 1];
        int64_t n_in = at->size[l], n_out = at->size[l + 1];
        for (int64_t o = 0; matrix && o < n_out; o++)
            for (int64_t i = 0; i < n_in; i++)
                matrix[task * strides[2 * l] + o * n_in + i] = from[at->matrix[l] + o * at->width[l] + i];
        for (int64_t o = 0; bias && o < n_out; o++) bias[task * strides[2 * l + 1] + o] = from[at->bias[l] + o];
    }
}

/* The tensors within one long vector (count,). */
static void NAME(cut)(const Layout *at, REAL *vector, REAL **parts) {
    for (int64_t l = 0; l < at->layers; l++) {
        parts[2 * l] = vector;
        parts[2 * l + 1] = vector + at->size[l + 1] * at->size[l];
        vector = parts[2 * l + 1] + at->size[l + 1];
    }
}

/* What all tasks share: the start, the same transposed, the rates of each step. */
static int NAME(prepare)(const Layout *at, const Problem *problem, const REAL *const *start, const REAL *rates,
    Work *common) {
    if (!NAME(reserve)(at, 1, problem->rate_rows, common)) return 0;
    NAME(add_parts)(at, start, problem->strides, 0, common->weights);
    NAME(flip)(at, common->weights, common->flipped);
    for (int64_t l = 0; problem->rates_of_parts && l < at->layers; l++)
        for (int64_t o = 0; o < at->size[l + 1]; o++) {
            for (int64_t i = 0; i < at->size[l]; i++)
                common->rates[at->matrix[l] + o * at->width[l] + i] = rates[2 * l];
            common->rates[at->bias[l] + o] = rates[2 * l + 1];
        }
    for (int64_t row = 0; !problem->rates_of_parts && row < problem->rate_rows; row++) {
        REAL *parts[2 * MOST_LAYERS];
        NAME(cut)(at, (REAL *)rates + row * at->count, parts);
        NAME(add_parts)(at, (const REAL *const *)parts, problem->strides, 0, common->rates + row * at->total);
    }
    return 1;
}

static void NAME(forward)(const Layout *at, const Problem *problem, int64_t task, const REAL *weights,
    const REAL *flipped, Work *work) {
    int64_t rows = problem->rows, n_in = at->size[0];
    const REAL *x = (const REAL *)problem->x + task * rows * n_in;
    for (int64_t n = 0; n < rows; n++)
        memcpy(work->active[0] + n * at->width[0], x + n * n_in, (size_t)n_in * sizeof(REAL));
    for (int64_t l = 0; l < at->layers; l++) {
        int64_t width = at->width[l + 1];
        REAL *out = work->active[l + 1];
        NAME(multiply)(rows, width, at->size[l], work->active[l], at->width[l], 1, flipped + at->flipped[l], width,
            weights + at->bias[l], 0, out, width);
        if (l + 1 == at->layers) return;
        if (problem->activation == RELU)
            for (int64_t i = 0; i < rows * width; i++) out[i] = out[i] <= 0 ? 0 : out[i]; /* lets NaN through */
        if (problem->activation == TANH)
            for (int64_t i = 0; i < rows * width; i++) out[i] = TANH_OF(out[i]);
        if (problem->activation == SIGMOID)
            for (int64_t i = 0; i < rows * width; i++) out[i] = 1 / (1 + EXP(-out[i]));
    }
}

/* values *= derivative of the activation, told from its value. */
static void NAME(bend)(int64_t activation, int64_t count, const REAL *restrict active, REAL *restrict values) {
    if (activation == RELU)
        for (int64_t i = 0; i < count; i++) values[i] = active[i] <= 0 ? 0 : values[i];
    if (activation == TANH)
        for (int64_t i = 0; i < count; i++) values[i] *= 1 - active[i] * active[i];
    if (activation == SIGMOID)
        for (int64_t i = 0; i < count; i++) values[i] *= active[i] * (1 - active[i]);
}

/* The slope of the inner loss at what the net put out. */
static void NAME(slope_of_loss)(const Layout *at, const Problem *problem, int64_t task, Work *work) {
    int64_t rows = problem->rows, size = at->size[at->layers], width = at->width[at->layers];
    for (int64_t n = 0; n < rows; n++) {
        REAL importance = ((const REAL *)problem->importance)[task * rows + n];
        const REAL *out = work->active[at->layers] + n * width;
        REAL *slope = work->slope[at->layers] + n * width, *odds = work->odds + n * width;
        if (problem->targets) {
            const REAL *target = (const REAL *)problem->targets + (task * rows + n) * size;
            for (int64_t o = 0; o < size; o++) slope[o] = 2 * importance / (REAL)size * (out[o] - target[o]);
            continue;
        }
        REAL top = out[0], total = 0;
        for (int64_t o = 1; o < size; o++) top = out[o] > top ? out[o] : top;
        for (int64_t o = 0; o < size; o++) total += odds[o] = EXP(out[o] - top);
        for (int64_t o = 0; o < size; o++) odds[o] /= total;
        for (int64_t o = 0; o < size; o++) slope[o] = importance * (odds[o] - (o == problem->labels[task * rows + n]));
    }
}

/* Slopes at the inputs of each layer's activation, from those at the outputs of the net. */
static void NAME(backward)(const Layout *at, const Problem *problem, const REAL *weights, Work *work) {
    for (int64_t l = at->layers - 1; l > 0; l--) {
        int64_t rows = problem->rows, width = at->width[l];
        NAME(multiply)(rows, width, at->size[l + 1], work->slope[l + 1], at->width[l + 1], 1, weights + at->matrix[l],
            width, NULL, 0, work->slope[l], width);
        NAME(bend)(problem->activation, rows * width, work->active[l], work->slope[l]);
    }
}

/* to = slope^T active, and the sums of slopes over rows. */
static void NAME(collect)(const Layout *at, int64_t rows, REAL *const *slope, REAL *const *active, REAL *to) {
    for (int64_t l = 0; l < at->layers; l++) {
        int64_t width = at->width[l + 1];
        NAME(multiply)(at->size[l + 1], at->width[l], rows, slope[l + 1], 1, width, active[l], at->width[l], NULL, 0,
            to + at->matrix[l], at->width[l]);
        REAL *restrict bias = to + at->bias[l];
        memset(bias, 0, (size_t)width * sizeof(REAL));
        for (int64_t n = 0; n < rows; n++)
            for (int64_t o = 0; o < width; o++) bias[o] += slope[l + 1][n * width + o];
    }
}

/* work->product = Hessian of the inner loss times work->direction, after a way forward and back. */
static void NAME(hessian)(const Layout *at, const Problem *problem, int64_t task, const REAL *weights,
    const REAL *flipped, Work *work) {
    int64_t rows = problem->rows, last = at->layers;
    NAME(flip)(at, work->direction, work->flipped_direction);
    for (int64_t l = 0; l < last; l++) { /* how outputs of layers move */
        int64_t width = at->width[l + 1];
        REAL *restrict moved = work->moved[l + 1], *restrict turn = work->moved_slope[l + 1];
        const REAL *restrict active = work->active[l + 1], *restrict slope = work->slope[l + 1];
        NAME(multiply)(rows, width, at->size[l], work->active[l], at->width[l], 1,
            work->flipped_direction + at->flipped[l], width, work->direction + at->bias[l], 0, moved, width);
        if (l > 0)
            NAME(multiply)(rows, width, at->size[l], work->moved[l], at->width[l], 1, flipped + at->flipped[l], width,
                moved, width, moved, width);
        if (l + 1 == last) break;
        for (int64_t i = 0; i < rows * width; i++) turn[i] = 0; /* slope * second / first derivative * moved */
        if (problem->activation == TANH)
            for (int64_t i = 0; i < rows * width; i++) turn[i] = -2 * active[i] * slope[i] * moved[i];
        if (problem->activation == SIGMOID)
            for (int64_t i = 0; i < rows * width; i++) turn[i] = (1 - 2 * active[i]) * slope[i] * moved[i];
        NAME(bend)(problem->activation, rows * width, active, moved);
    }
    for (int64_t n = 0; n < rows; n++) { /* how the slope of the loss moves */
        REAL importance = ((const REAL *)problem->importance)[task * rows + n], mean = 0;
        int64_t size = at->size[last], first = n * at->width[last];
        const REAL *moved = work->moved[last] + first, *odds = work->odds + first;
        REAL *slope = work->moved_slope[last] + first;
        for (int64_t o = 0; problem->labels && o < size; o++) mean += odds[o] * moved[o];
        for (int64_t o = 0; o < size; o++)
            slope[o] = importance * (problem->labels ? odds[o] * (moved[o] - mean) : 2 * moved[o] / (REAL)size);
    }
    for (int64_t l = last - 1; l > 0; l--) { /* how slopes of layers move */
        int64_t width = at->width[l];
        NAME(multiply)(rows, width, at->size[l + 1], work->moved_slope[l + 1], at->width[l + 1], 1,
            weights + at->matrix[l], width, NULL, 0, work->through, width);
        NAME(multiply)(rows, width, at->size[l + 1], work->slope[l + 1], at->width[l + 1], 1,
            work->direction + at->matrix[l], width, work->through, width, work->through, width);
        NAME(bend)(problem->activation, rows * width, work->active[l], work->through);
        for (int64_t i = 0; i < rows * width; i++) work->moved_slope[l][i] += work->through[i];
    }
    NAME(collect)(at, rows, work->moved_slope, work->active, work->product);
    for (int64_t l = 1; l < last; l++) /* inputs of the net do not move */
        NAME(multiply)(at->size[l + 1], at->width[l], rows, work->slope[l + 1], 1, at->width[l + 1], work->moved[l],
            at->width[l], work->product + at->matrix[l], at->width[l], work->product + at->matrix[l], at->width[l]);
}

/* The inner loop of one task, from common->weights to work->weights.
 *
 * path: room for the first `kept` sets of weights that it makes
 * fast: as in `descend`, or null
 */
static void NAME(descend_task)(const Layout *at, const Problem *problem, int64_t task, const Work *common, Work *work,
    REAL *path, int64_t kept, REAL **fast) {
    for (int64_t step = 0; step < problem->steps; step++) {
        const REAL *now = step ? work->weights : common->weights, *flipped = step ? work->flipped : common->flipped;
        const REAL *rate = common->rates + (problem->rate_rows == 1 ? 0 : step) * at->total;
        if (step) NAME(flip)(at, now, work->flipped);
        NAME(forward)(at, problem, task, now, flipped, work);
        NAME(slope_of_loss)(at, problem, task, work);
        NAME(backward)(at, problem, now, work);
        NAME(collect)(at, problem->rows, work->slope, work->active, work->gradient);
        for (int64_t i = 0; i < at->total; i++) { /* what has no rate stays, were its gradient infinite */
            REAL stays = now[i], moves = stays - rate[i] * work->gradient[i]; /* both, or no vectors are made of it */
            work->weights[i] = rate[i] == 0 ? stays : moves;
        }
        if (fast) NAME(write_parts)(at, work->weights, problem->strides, task, fast + step * 2 * at->layers);
        if (step < kept) memcpy(path + step * at->total, work->weights, (size_t)at->total * sizeof(REAL));
    }
}

/* The way back of one task: work->lambda goes from a gradient at the last weights to that at the start.
 *
 * path:        the weights after each step but the last
 * fast_slopes: what comes to it on the way, as in `descend_backward`, or null
 * learned:     whether gradients at the rates are added to work->rates
 */
static void NAME(pull_task)(const Layout *at, const Problem *problem, int64_t task, const Work *common, Work *work,
    const REAL *path, const REAL *const *fast_slopes, int learned) {
    for (int64_t step = problem->steps - 1; step >= 0; step--) {
        if (fast_slopes)
            NAME(add_parts)(at, fast_slopes + step * 2 * at->layers, problem->strides, task, work->lambda);
        int exact = step >= problem->exact_from && problem->order != 0;
        if (!exact && !learned) continue;
        const REAL *now = step ? path + (step - 1) * at->total : common->weights;
        const REAL *flipped = step ? work->flipped : common->flipped;
        int64_t row = problem->rate_rows == 1 ? 0 : step;
        if (step) NAME(flip)(at, now, work->flipped);
        NAME(forward)(at, problem, task, now, flipped, work);
        NAME(slope_of_loss)(at, problem, task, work);
        NAME(backward)(at, problem, now, work);
        if (learned) {
            NAME(collect)(at, problem->rows, work->slope, work->active, work->gradient);
            REAL *sum = work->rates + row * at->total;
            for (int64_t i = 0; i < at->total; i++) sum[i] -= work->lambda[i] * work->gradient[i];
        }
        if (!exact) continue;
        const REAL *rate = common->rates + row * at->total;
        for (int64_t i = 0; i < at->total; i++) {
            REAL moves = rate[i] * work->lambda[i];
            work->direction[i] = rate[i] == 0 ? 0 : moves;
        }
        NAME(hessian)(at, problem, task, now, flipped, work);
        for (int64_t i = 0; i < at->total; i++) work->lambda[i] -= (REAL)problem->order * work->product[i];
    }
}

/* What the net answers to the rows of `problem` under weights (as in `flip`). */
static void NAME(answer_task)(const Layout *at, const Problem *problem, int64_t task, const REAL *weights, Work *work,
    REAL *out) {
    int64_t rows = problem->rows, size = at->size[at->layers];
    NAME(flip)(at, weights, work->flipped);
    NAME(forward)(at, problem, task, weights, work->flipped, work);
    for (int64_t n = 0; n < rows; n++)
        memcpy(out + (task * rows + n) * size, work->active[at->layers] + n * at->width[at->layers],
            (size_t)size * sizeof(REAL));
}

/* The gradient at the weights, from that at the answers. */
static void NAME(pull_answer)(const Layout *at, const Problem *problem, int64_t task, const REAL *weights, Work *work,
    const REAL *out_slopes, REAL *gradient) {
    int64_t rows = problem->rows, size = at->size[at->layers];
    NAME(flip)(at, weights, work->flipped);
    NAME(forward)(at, problem, task, weights, work->flipped, work);
    for (int64_t n = 0; n < rows; n++)
        memcpy(work->slope[at->layers] + n * at->width[at->layers], out_slopes + (task * rows + n) * size,
            (size_t)size * sizeof(REAL));
    NAME(backward)(at, problem, weights, work);
    NAME(collect)(at, rows, work->slope, work->active, gradient);
}

/* Sums over tasks, which are in those of the threads, in the order of threads. */
static void NAME(write_sums)(const Layout *at, const Problem *problem, Work *works, Work *common, REAL **start_slopes,
    REAL *rate_slopes) {
    int64_t rate_rows = problem->rate_rows;
    memset(common->rates, 0, (size_t)(rate_rows * at->total) * sizeof(REAL));
    for (int64_t t = 0; t < problem->threads; t++) {
        for (int64_t i = 0; works[t].memory && i < at->total; i++) common->sum[i] += works[t].sum[i];
        for (int64_t i = 0; works[t].memory && i < rate_rows * at->total; i++) common->rates[i] += works[t].rates[i];
        free(works[t].memory);
    }
    NAME(write_parts)(at, common->sum, problem->strides, 0, start_slopes);
    for (int64_t row = 0; rate_slopes && row < rate_rows; row++) {
        REAL *parts[2 * MOST_LAYERS];
        NAME(cut)(at, rate_slopes + row * at->count, parts);
        NAME(write_parts)(at, common->rates + row * at->total, problem->strides, 0, parts);
    }
}

/* Weights after gradient descent; each function returns how many threads lacked memory.
 *
 * start: 2 * layers tensors that tasks share
 * rates: (1, 2 * layers), or (rate_rows, count), tensor after tensor
 * path:  (tasks, steps - 1, padded weights), for the way back; or null
 * fast:  steps * 2 * layers tensors with a leading axis of tasks, null where they are not wanted
 */
int NAME(descend)(const Problem *problem, const REAL *const *start, const REAL *rates, REAL *path, REAL **fast) {
    Layout at = NAME(layout)(problem);
    Work common;
    if (!NAME(prepare)(&at, problem, start, rates, &common)) return 1;
    int64_t kept = path ? problem->steps - 1 : 0;
    int failed = 0;
#pragma omp parallel num_threads((int)problem->threads) reduction(+ : failed)
    {
        Work work;
        int ready = NAME(reserve)(&at, problem->rows, 0, &work);
        failed += !ready;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < problem->tasks; task++)
            if (ready)
                NAME(descend_task)(&at, problem, task, &common, &work, path + task * kept * at.total, kept, fast);
        free(work.memory);
    }
    free(common.memory);
    return failed;
}

/* From gradients at `fast` to those at `start`, summed over tasks in the order of threads, and at `rates`.
 *
 * fast_slopes: as fast, null where they are zero
 * rate_slopes: (rate_rows, count) as rates, or null
 */
int NAME(descend_backward)(const Problem *problem, const REAL *const *start, const REAL *rates, const REAL *path,
    const REAL *const *fast_slopes, REAL **start_slopes, REAL *rate_slopes) {
    Layout at = NAME(layout)(problem);
    Work common, *works = calloc((size_t)problem->threads, sizeof *works);
    if (!works || !NAME(prepare)(&at, problem, start, rates, &common)) return free(works), 1;
    int failed = 0;
#pragma omp parallel num_threads((int)problem->threads) reduction(+ : failed)
    {
        Work *work = &works[omp_get_thread_num()];
        int ready = NAME(reserve)(&at, problem->rows, problem->rate_rows, work);
        failed += !ready;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < problem->tasks; task++) {
            if (!ready) continue;
            memset(work->lambda, 0, (size_t)at.total * sizeof(REAL));
            NAME(pull_task)(&at, problem, task, &common, work, path + task * (problem->steps - 1) * at.total,
                fast_slopes, rate_slopes != NULL);
            for (int64_t i = 0; i < at.total; i++) work->sum[i] += work->lambda[i];
        }
    }
    NAME(write_sums)(&at, problem, works, &common, start_slopes, rate_slopes);
    free(works);
    free(common.memory);
    return failed;
}

/* What nets answer (tasks, new_rows, outputs) to new_x after gradient descent, whose weights never leave the caches.
 *
 * path: (tasks, steps, padded weights), for the way back; or null
 */
int NAME(adapt_and_answer)(const Problem *problem, const REAL *const *start, const REAL *rates, REAL *path,
    REAL *out) {
    Layout at = NAME(layout)(problem);
    Problem query = *problem;
    query.x = problem->new_x, query.rows = problem->new_rows;
    int64_t most = query.rows > problem->rows ? query.rows : problem->rows, kept = path ? problem->steps : 0;
    Work common;
    if (!NAME(prepare)(&at, problem, start, rates, &common)) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)problem->threads) reduction(+ : failed)
    {
        Work work;
        int ready = NAME(reserve)(&at, most, 0, &work);
        failed += !ready;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < problem->tasks; task++) {
            if (!ready) continue;
            NAME(descend_task)(&at, problem, task, &common, &work, path + task * kept * at.total, kept, NULL);
            NAME(answer_task)(&at, &query, task, work.weights, &work, out);
        }
        free(work.memory);
    }
    free(common.memory);
    return failed;
}

/* From gradients at these answers to those at `start` and at `rates`, as in `descend_backward`. */
int NAME(adapt_and_answer_backward)(const Problem *problem, const REAL *const *start, const REAL *rates,
    const REAL *path, const REAL *out_slopes, REAL **start_slopes, REAL *rate_slopes) {
    Layout at = NAME(layout)(problem);
    Problem query = *problem;
    query.x = problem->new_x, query.rows = problem->new_rows;
    int64_t most = query.rows > problem->rows ? query.rows : problem->rows;
    Work common, *works = calloc((size_t)problem->threads, sizeof *works);
    if (!works || !NAME(prepare)(&at, problem, start, rates, &common)) return free(works), 1;
    int failed = 0;
#pragma omp parallel num_threads((int)problem->threads) reduction(+ : failed)
    {
        Work *work = &works[omp_get_thread_num()];
        int ready = NAME(reserve)(&at, most, problem->rate_rows, work);
        failed += !ready;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < problem->tasks; task++) {
            if (!ready) continue;
            const REAL *own = path + task * problem->steps * at.total;
            NAME(pull_answer)(&at, &query, task, own + (problem->steps - 1) * at.total, work, out_slopes, work->lambda);
            NAME(pull_task)(&at, problem, task, &common, work, own, NULL, rate_slopes != NULL);
            for (int64_t i = 0; i < at.total; i++) work->sum[i] += work->lambda[i];
        }
    }
    NAME(write_sums)(&at, problem, works, &common, start_slopes, rate_slopes);
    free(works);
    free(common.memory);
    return failed;
}

/* What nets answer (tasks, rows, outputs) under the weights `parts`. */
int NAME(answer)(const Problem *problem, const REAL *const *parts, REAL *out) {
    Layout at = NAME(layout)(problem);
    int failed = 0;
#pragma omp parallel num_threads((int)problem->threads) reduction(+ : failed)
    {
        Work work;
        int ready = NAME(reserve)(&at, problem->rows, 0, &work);
        failed += !ready;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < problem->tasks; task++) {
            if (!ready) continue;
            memset(work.weights, 0, (size_t)at.total * sizeof(REAL));
            NAME(add_parts)(&at, parts, problem->strides, task, work.weights);
            NAME(answer_task)(&at, problem, task, work.weights, &work, out);
        }
        free(work.memory);
    }
    return failed;
}

/* From gradients at answers to those at `parts`: of each task, or summed over the tasks that share a tensor. */
int NAME(answer_backward)(const Problem *problem, const REAL *const *parts, const REAL *out_slopes,
    REAL **part_slopes) {
    Layout at = NAME(layout)(problem);
    REAL *own[2 * MOST_LAYERS], *shared[2 * MOST_LAYERS];
    for (int64_t p = 0; p < 2 * at.layers; p++) {
        own[p] = problem->strides[p] ? part_slopes[p] : NULL;
        shared[p] = problem->strides[p] ? NULL : part_slopes[p];
    }
    Work *works = calloc((size_t)problem->threads, sizeof *works);
    if (!works) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)problem->threads) reduction(+ : failed)
    {
        Work *work = &works[omp_get_thread_num()];
        int ready = NAME(reserve)(&at, problem->rows, 0, work);
        failed += !ready;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < problem->tasks; task++) {
            if (!ready) continue;
            memset(work->weights, 0, (size_t)at.total * sizeof(REAL));
            NAME(add_parts)(&at, parts, problem->strides, task, work->weights);
            NAME(pull_answer)(&at, problem, task, work->weights, work, out_slopes, work->gradient);
            NAME(write_parts)(&at, work->gradient, problem->strides, task, own);
            for (int64_t i = 0; i < at.total; i++) work->sum[i] += work->gradient[i];
        }
    }
    for (int64_t t = 1; t < problem->threads; t++)
        for (int64_t i = 0; !failed && works[t].memory && i < at.total; i++) works[0].sum[i] += works[t].sum[i];
    if (!failed) NAME(write_parts)(&at, works[0].sum, problem->strides, 0, shared);
    for (int64_t t = 0; t < problem->threads; t++) free(works[t].memory);
    free(works);
    return failed;
}

#undef Layout
#undef Work

#endif
