/* The loops along a path, for few states, where calling an operation costs more than doing it.
 *
 * Compiled on first use by native.py, once with REAL = float and once with double; every function has its twin in
 * scan.py, max_scan.py or path_projection.py, which is its reference. Arrays are row-major, (steps, batch, n).
 */
#include <stdint.h>
#include <string.h>

#define GLUE_(name, suffix) name##_##suffix
#define GLUE(name, suffix) GLUE_(name, suffix)
#define NAME(name) GLUE(name, SUFFIX)

/* 64 bytes of numbers, wherever they start. */
typedef REAL NAME(vec) __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
#define VEC NAME(vec)
#define LANES ((int64_t)(64 / sizeof(REAL)))
#define AT(p) (*(const VEC *)(p))

/* out[j] = sum_i x[i] t[i * m + j], the sums of four vectors' width in registers */
static inline void NAME(row)(const REAL *x, const REAL *t, REAL *out, int64_t n, int64_t m) {
    int64_t j = 0;
    for (; j + 4 * LANES <= m; j += 4 * LANES) {
        VEC a = {0}, b = {0}, c = {0}, d = {0};
        for (int64_t i = 0; i < n; i++) {
            const REAL *r = t + i * m + j;
            a += x[i] * AT(r), b += x[i] * AT(r + LANES), c += x[i] * AT(r + 2 * LANES), d += x[i] * AT(r + 3 * LANES);
        }
        *(VEC *)(out + j) = a, *(VEC *)(out + j + LANES) = b;
        *(VEC *)(out + j + 2 * LANES) = c, *(VEC *)(out + j + 3 * LANES) = d;
    }
    for (; j + LANES <= m; j += LANES) {
        VEC a = {0};
        for (int64_t i = 0; i < n; i++) a += x[i] * AT(t + i * m + j);
        *(VEC *)(out + j) = a;
    }
    if (j == m) return;
    memset(out + j, 0, sizeof(REAL) * (m - j));
    for (int64_t i = 0; i < n; i++)
        for (int64_t l = j; l < m; l++) out[l] += x[i] * t[i * m + l];
}

/* out[i] = sum_j t[i * m + j] x[j] */
static inline void NAME(column)(const REAL *x, const REAL *t, REAL *out, int64_t n, int64_t m) {
    for (int64_t i = 0; i < n; i++) {
        const REAL *r = t + i * m;
        REAL s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t j = 0; j < m; j++) s += r[j] * x[j];
        out[i] = s;
    }
}

static inline REAL NAME(largest)(const REAL *x, int64_t n) {
    REAL top = x[0];
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static inline void NAME(divide)(REAL *x, REAL by, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] /= by;
}

/* Along a path: vectors a (or e) and products o (or d), with tables at t + k * step + b * batch. first is a_0; then
 * a_k = rows_{k - order} o_{k-1} for the way up (order 0), e_k = rows_{k + 1} d_{k + 1} for the way down (order 1).
 * across: the product runs along the table's rows (out[j] over i) or down its columns. */
void NAME(scan)(int64_t steps, int64_t batch, int64_t n, int64_t stride, int64_t down, int64_t across,
                const REAL *rows, const REAL *t, int64_t step, int64_t each, REAL *a, REAL *o, REAL *scales) {
    const int64_t width = batch * n;
    for (int64_t j = 0; j < steps; j++) {
        const int64_t k = down ? steps - 1 - j : j, before = down ? k + 1 : k - 1, from = down ? k + 1 : k;
        for (int64_t b = 0; b < batch; b++) {
            REAL *x = a + k * width + b * n;
            if (j) {
                const REAL *r = rows + from * width + b * n, *p = o + before * width + b * n;
#pragma omp simd
                for (int64_t i = 0; i < n; i++) x[i] = r[i] * p[i];
            }
            if (j % stride == 0) {
                const REAL s = NAME(largest)(x, n);
                scales[(j / stride) * batch + b] = s;
                NAME(divide)(x, s, n);
            }
            const REAL *table = t + k * step + b * each;
            if (across)
                NAME(row)(x, table, o + k * width + b * n, n, n);
            else
                NAME(column)(x, table, o + k * width + b * n, n, n);
        }
    }
}

/* Values along a path from its last parent's: p(c) ~ a_k[c] t[v][c], tables (parent, child). uniform is in [0, 1). */
void NAME(draw)(int64_t steps, int64_t draws, int64_t batch, int64_t alone, int64_t n, const REAL *a, const REAL *t,
                int64_t step, int64_t each, const double *uniform, const int64_t *last, double *room,
                int64_t *values) {
    for (int64_t k = steps - 1; k >= 0; k--)
        for (int64_t d = 0; d < draws; d++)
            for (int64_t b = 0; b < batch; b++) {
                const int64_t at = d * batch + b;
                const int64_t v = k == steps - 1 ? last[at] : values[(k + 1) * draws * batch + at];
                const REAL *x = a + (k * (alone ? 1 : batch) + (alone ? 0 : b)) * n;
                const REAL *r = t + k * step + b * each + v * n;
                double total = 0;
                for (int64_t i = 0; i < n; i++) room[i] = total += (double)(x[i] * r[i]);
                const double target = uniform[k * draws * batch + at] * total;
                int64_t i = 0;
                while (i < n - 1 && room[i] <= target) i++;
                values[k * draws * batch + at] = i;
            }
}

/* Max-product: x_k = rows_k + m_{k-1}, m_k[p] = max_c x_k[c] + t[c][p], tables (child, parent); the largest score is
 * taken out of every stride-th step. */
void NAME(best_scores)(int64_t steps, int64_t batch, int64_t n, int64_t stride, const REAL *rows, const REAL *t,
                       int64_t step, int64_t each, REAL *x, REAL *m, REAL *offset) {
    const int64_t width = batch * n;
    for (int64_t k = 0; k < steps; k++)
        for (int64_t b = 0; b < batch; b++) {
            REAL *own = x + k * width + b * n, *out = m + k * width + b * n;
            const REAL *r = rows + k * width + b * n, *table = t + k * step + b * each;
            for (int64_t i = 0; i < n; i++) own[i] = k ? r[i] + out[i - width] : r[i];
            offset[b * steps + k] = 0;
            if (k % stride == 0) {
                const REAL s = NAME(largest)(own, n);
                if (s - s == 0) { /* finite */
                    for (int64_t i = 0; i < n; i++) own[i] -= s;
                    offset[b * steps + k] = s;
                }
            }
            for (int64_t p = 0; p < n; p++) out[p] = own[0] + table[p];
            for (int64_t c = 1; c < n; c++) {
                const REAL v = own[c], *row = table + c * n;
#pragma omp simd
                for (int64_t p = 0; p < n; p++) out[p] = v + row[p] > out[p] ? v + row[p] : out[p];
            }
        }
}

/* The values that reach these scores, from the last parent's; ties go to the smaller value. */
void NAME(best_values)(int64_t steps, int64_t batch, int64_t n, const REAL *x, const REAL *t, int64_t step,
                       int64_t each, const int64_t *last, int64_t *values) {
    for (int64_t k = steps - 1; k >= 0; k--)
        for (int64_t b = 0; b < batch; b++) {
            const int64_t v = k == steps - 1 ? last[b] : values[(k + 1) * batch + b];
            const REAL *own = x + (k * batch + b) * n, *table = t + k * step + b * each + v;
            int64_t found = 0;
            REAL top = own[0] + table[0];
            for (int64_t c = 1; c < n; c++)
                if (own[c] + table[c * n] > top) top = own[c] + table[c * n], found = c;
            values[k * batch + b] = found;
        }
}

/* One sweep of the projection along a hidden Markov model of h states and v tokens: right, left, cavity and the
 * messages of the free tokens (see path_projection.py). */
void NAME(sweep)(int64_t sites, int64_t batch, int64_t h, int64_t v, const REAL *emit, const REAL *tokens,
                 const REAL *move, const REAL *back, const REAL *latent, const REAL *quotient, const uint8_t *free,
                 REAL *message, REAL *right, REAL *left, REAL *cavity, REAL *room) {
    const int64_t width = batch * h;
    for (int64_t b = 0; b < batch; b++) {
        REAL *r = right + b * h, *l = left + b * h, *m = message + b * h;
        const REAL *z = latent + b * h;
        for (int64_t i = 0; i < h; i++) r[(sites - 1) * width + i] = 1;
        for (int64_t s = sites - 1; s > 0; s--) {
            for (int64_t i = 0; i < h; i++) {
                const int64_t at = s * width + i;
                room[i] = z[at] * r[at] * m[at];
            }
            NAME(divide)(room, NAME(largest)(room, h), h);
            NAME(row)(room, back, r + (s - 1) * width, h, h);
        }
        for (int64_t i = 0; i < h; i++) l[i] = z[i];
        for (int64_t s = 0; s < sites; s++) {
            if (free[s * batch + b]) {
                REAL *c = cavity + (s * batch + b) * v;
                const REAL *q = quotient + (s * batch + b) * v;
                for (int64_t i = 0; i < h; i++) room[i] = l[s * width + i] * r[s * width + i];
                NAME(row)(room, emit, c, h, v);
                for (int64_t x = 0; x < v; x++) room[x] = q[x] / c[x];
                NAME(row)(room, tokens, m + s * width, v, h);
            }
            if (s + 1 < sites) {
                for (int64_t i = 0; i < h; i++) room[i] = l[s * width + i] * m[s * width + i];
                NAME(divide)(room, NAME(largest)(room, h), h);
                REAL *next = l + (s + 1) * width;
                NAME(row)(room, move, next, h, h);
                for (int64_t i = 0; i < h; i++) next[i] *= z[(s + 1) * width + i];
            }
        }
    }
}

#undef VEC
#undef LANES
#undef AT
