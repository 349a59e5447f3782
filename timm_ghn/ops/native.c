/* The graph layer on one CPU core; `native.py` compiles this and calls `forward` and `backward`, once for each sweep.

D, HIDDEN and LANES come from the command line: the width of a state, that of a message mlp's hidden layer, and how many
floats a vector holds, a divisor of both. With constant widths a node's sums stay in registers.

Positions, lists and the message table are those of `topology.py`. Every sum has a fixed order, so the same input gives
the same bits. */

#include <stdint.h>
#include <string.h>

enum { TILE = 8 }; /* vectors whose sums are kept in registers at a time */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* A sweep's lists, and what it reads and leaves behind: [N, D] by position, `sent` [N, 2, D]. */
struct sweep {
    const int64_t *ptr, *index, *distance;
    float *before, *message, *sent, *after;
};

/* In the order of portable.Weights. */
struct weights {
    float *mlp0_w, *mlp0_b, *mlp2_w, *mlp2_b, *ve0_w, *ve0_b, *ve2_w, *ve2_b, *gru_w_ih, *gru_w_hh, *gru_b_ih, *gru_b_hh;
};

/* What weight gradients are made of, for each node. */
struct slopes {
    float by_gates[3 * D];     /* by the GRU's product with the message: r, z, n */
    float by_candidate[D];     /* by the part of its product with the state that r scales */
    float hidden[2 * HIDDEN];  /* the message mlps' hidden layers */
    float by_hidden[2 * HIDDEN];
    float by_sent[2 * D];
};

/* out[tile vectors] += x[rows] · w[rows, tile vectors]; elements of x and rows of w lie so many floats apart. */
static inline __attribute__((always_inline)) void multiply_tile(
    float *restrict out, const float *restrict x, int64_t x_stride, int64_t rows,
    const float *restrict w, int64_t w_stride, const int tile)
{
    vec sum[TILE];
#pragma GCC unroll 8
    for (int t = 0; t < tile; t++) sum[t] = *(const vec *)(out + t * LANES);
    for (int64_t k = 0; k < rows; k++) {
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) sum[t] += x[k * x_stride] * *(const vec *)(w + k * w_stride + t * LANES);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tile; t++) *(vec *)(out + t * LANES) = sum[t];
}

/* The same for any number of columns. */
static inline __attribute__((always_inline)) void multiply(
    float *restrict out, const float *restrict x, int64_t x_stride, int64_t rows,
    const float *restrict w, int64_t w_stride, const int columns)
{
    const int whole = columns / (TILE * LANES) * TILE * LANES;
    for (int start = 0; start < whole; start += TILE * LANES)
        multiply_tile(out + start, x, x_stride, rows, w + start, w_stride, TILE);
    if (whole < columns) multiply_tile(out + whole, x, x_stride, rows, w + whole, w_stride, (columns - whole) / LANES);
}

/* As many vectors of the sum of the table's rows that a list names (their numbers shifted right), each divided by its
distance. */
static inline __attribute__((always_inline)) void gather_tile(
    float *restrict out, const struct sweep *sweep, int64_t first, int64_t last, int shift, const float *restrict table,
    const int tile)
{
    vec sum[TILE] = {0};
    for (int64_t entry = first; entry < last; entry++) {
        const float factor = 1.0f / (float)sweep->distance[entry];
        const float *row = table + (sweep->index[entry] >> shift) * D;
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) sum[t] += factor * *(const vec *)(row + t * LANES);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tile; t++) *(vec *)(out + t * LANES) = sum[t];
}

static inline __attribute__((always_inline)) void gather(
    float *restrict out, const struct sweep *sweep, int64_t first, int64_t last, int shift, const float *restrict table)
{
    const int whole = D / (TILE * LANES) * TILE * LANES;
    for (int start = 0; start < whole; start += TILE * LANES)
        gather_tile(out + start, sweep, first, last, shift, table + start, TILE);
    if (whole < D) gather_tile(out + whole, sweep, first, last, shift, table + whole, (D - whole) / LANES);
}

/* exp as 2^k · e^r, |r| ≤ ln 2 / 2; one that loops over it can vectorise, and that passes NaN on. */
static inline float exponential(float x)
{
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float rounder = 12582912.0f; /* 1.5 · 2^23: what is added to it is rounded to an integer */
    float k = x * 1.44269504f + rounder;
    int32_t bits;
    memcpy(&bits, &k, 4);
    k -= rounder;
    const float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    const float series = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f
        + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    bits = (int32_t)(((uint32_t)bits << 23) + 0x3f800000u);
    float power;
    memcpy(&power, &bits, 4);
    return series * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* The gates r, z and the candidate n, and the part of the candidate's input that r scales. */
static inline void gate(
    float gates[3 * D], float recurrent[D], const float *message, const float *before, const struct weights *transposed)
{
    float by_state[3 * D];
    memcpy(gates, transposed->gru_b_ih, sizeof by_state);
    memcpy(by_state, transposed->gru_b_hh, sizeof by_state);
    multiply(gates, message, 1, D, transposed->gru_w_ih, 3 * D, 3 * D);
    multiply(by_state, before, 1, D, transposed->gru_w_hh, 3 * D, 3 * D);
    memcpy(recurrent, by_state + 2 * D, sizeof(float[D]));
    for (int c = 0; c < 2 * D; c++) gates[c] = sigmoid(gates[c] + by_state[c]);
    for (int c = 0; c < D; c++) /* tanh */
        gates[2 * D + c] = 2.0f * sigmoid(2.0f * (gates[2 * D + c] + gates[c] * recurrent[c])) - 1.0f;
}

static inline void rectify(float *x, int width)
{
    for (int c = 0; c < width; c++) x[c] = x[c] < 0.0f ? 0.0f : x[c];
}

/* Keeps a gradient where a rectifier let its input through. */
static inline void keep(float *by_x, const float *x, int width)
{
    for (int c = 0; c < width; c++) by_x[c] = x[c] > 0.0f ? by_x[c] : 0.0f;
}

/* Hidden layers of both message mlps. */
static inline void hide(float hidden[2 * HIDDEN], const float *state, const struct weights *transposed)
{
    memcpy(hidden, transposed->mlp0_b, sizeof(float[HIDDEN]));
    memcpy(hidden + HIDDEN, transposed->ve0_b, sizeof(float[HIDDEN]));
    multiply(hidden, state, 1, D, transposed->mlp0_w, HIDDEN, HIDDEN);
    multiply(hidden + HIDDEN, state, 1, D, transposed->ve0_w, HIDDEN, HIDDEN);
    rectify(hidden, 2 * HIDDEN);
}

/* One sweep over all positions. */
void forward(int64_t nodes, int descending, const struct sweep *sweep, const struct weights *transposed)
{
    for (int64_t step = 0; step < nodes; step++) {
        const int64_t p = descending ? nodes - 1 - step : step;
        const float *before = sweep->before + p * D;
        float *message = sweep->message + p * D, *sent = sweep->sent + 2 * p * D, *after = sweep->after + p * D;
        float gates[3 * D], recurrent[D], hidden[2 * HIDDEN];
        gather(message, sweep, sweep->ptr[2 * p], sweep->ptr[2 * p + 2], 0, sweep->sent);
        gate(gates, recurrent, message, before, transposed);
        for (int c = 0; c < D; c++) after[c] = gates[2 * D + c] + gates[D + c] * (before[c] - gates[2 * D + c]);
        hide(hidden, after, transposed);
        memcpy(sent, transposed->mlp2_b, sizeof(float[D]));
        memcpy(sent + D, transposed->ve2_b, sizeof(float[D]));
        multiply(sent, hidden, 1, HIDDEN, transposed->mlp2_w, D, D);
        multiply(sent + D, hidden + HIDDEN, 1, HIDDEN, transposed->ve2_w, D, D);
        rectify(sent, 2 * D);
    }
}

/* w[rows, columns] += x[nodes, rows]ᵀ · y[nodes, columns], and b[rows] += the sum of x over the nodes. */
static inline __attribute__((always_inline)) void accumulate(
    float *w, float *b, const float *x, int64_t x_stride, int rows, const float *y, int64_t y_stride, int columns,
    int64_t nodes)
{
    for (int row = 0; row < rows; row++) multiply(w + row * columns, x + row, x_stride, nodes, y, y_stride, columns);
    for (int64_t n = 0; n < nodes; n++)
        for (int row = 0; row < rows; row++) b[row] += x[n * x_stride + row];
}

/* A sweep's backward pass: `sweep` has the lists of those that a node sent messages to, `descending` is the direction of
the pass, `grad` [N, D] comes in by the states after the sweep and goes out by those before, `gradients` are added to.
`by_message` [N, D] and `slopes` [N] are room to work in. */
void backward(
    int64_t nodes, int descending, const struct sweep *sweep, const struct weights *weights,
    const struct weights *transposed, const struct weights *gradients, float *grad, float *by_message,
    struct slopes *slopes)
{
    for (int64_t step = 0; step < nodes; step++) {
        const int64_t p = descending ? nodes - 1 - step : step;
        const float *before = sweep->before + p * D;
        float *g = grad + p * D, *m = by_message + p * D;
        float gates[3 * D], recurrent[D];
        struct slopes *s = slopes + p;
        gate(gates, recurrent, sweep->message + p * D, before, transposed);
        hide(s->hidden, sweep->after + p * D, transposed);

        gather(s->by_sent, sweep, sweep->ptr[2 * p], sweep->ptr[2 * p + 1], 1, by_message);
        gather(s->by_sent + D, sweep, sweep->ptr[2 * p + 1], sweep->ptr[2 * p + 2], 1, by_message);
        keep(s->by_sent, sweep->sent + 2 * p * D, 2 * D);
        memset(s->by_hidden, 0, sizeof s->by_hidden);
        multiply(s->by_hidden, s->by_sent, 1, D, weights->mlp2_w, HIDDEN, HIDDEN);
        multiply(s->by_hidden + HIDDEN, s->by_sent + D, 1, D, weights->ve2_w, HIDDEN, HIDDEN);
        keep(s->by_hidden, s->hidden, 2 * HIDDEN);
        multiply(g, s->by_hidden, 1, HIDDEN, weights->mlp0_w, D, D);
        multiply(g, s->by_hidden + HIDDEN, 1, HIDDEN, weights->ve0_w, D, D);

        for (int c = 0; c < D; c++) {
            const float r = gates[c], z = gates[D + c], n = gates[2 * D + c];
            const float by_n = g[c] * (1.0f - z) * (1.0f - n * n);
            s->by_gates[c] = by_n * recurrent[c] * r * (1.0f - r);
            s->by_gates[D + c] = g[c] * (before[c] - n) * z * (1.0f - z);
            s->by_gates[2 * D + c] = by_n;
            s->by_candidate[c] = by_n * r;
            g[c] *= z;
        }
        memset(m, 0, sizeof(float[D]));
        multiply(m, s->by_gates, 1, 3 * D, weights->gru_w_ih, D, D);
        multiply(g, s->by_gates, 1, 2 * D, weights->gru_w_hh, D, D);
        multiply(g, s->by_candidate, 1, D, weights->gru_w_hh + 2 * D * D, D, D);
    }

    const int64_t stride = sizeof(struct slopes) / sizeof(float);
    accumulate(gradients->mlp0_w, gradients->mlp0_b, slopes->by_hidden, stride, HIDDEN, sweep->after, D, D, nodes);
    accumulate(gradients->ve0_w, gradients->ve0_b, slopes->by_hidden + HIDDEN, stride, HIDDEN, sweep->after, D, D, nodes);
    accumulate(gradients->mlp2_w, gradients->mlp2_b, slopes->by_sent, stride, D, slopes->hidden, stride, HIDDEN, nodes);
    accumulate(gradients->ve2_w, gradients->ve2_b, slopes->by_sent + D, stride, D, slopes->hidden + HIDDEN, stride,
               HIDDEN, nodes);
    accumulate(gradients->gru_w_ih, gradients->gru_b_ih, slopes->by_gates, stride, 3 * D, sweep->message, D, D, nodes);
    accumulate(gradients->gru_w_hh, gradients->gru_b_hh, slopes->by_gates, stride, 2 * D, sweep->before, D, D, nodes);
    accumulate(gradients->gru_w_hh + 2 * D * D, gradients->gru_b_hh + 2 * D, slopes->by_candidate, stride, D,
               sweep->before, D, D, nodes);
}
