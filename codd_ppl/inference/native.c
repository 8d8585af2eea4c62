/* The loops along a path: for few states, where calling an operation costs more than doing it, and for a table that
 * all share, which a general matrix product reads more slowly for a handful of vectors.
 *
 * Compiled on first use by native.py, once with REAL = float and WIDE = 0 and once with double and 1; every function
 * has its twin in scan.py, max_scan.py, path_projection.py, leaves.py or potentials/pool.py, its reference. Arrays are row-major, (steps, batch, n).
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

/* Numbers of the exponential below: bits of the mantissa and of the exponent's bias, and the smallest argument whose
 * value is not denormal. */
#undef MANTISSA
#undef BIAS
#undef LOWEST
#undef ROUNDER
#undef LN2_HIGH
#undef LN2_LOW
#undef LOGARITHM
#undef HALF_ROOT
#undef TERMS
#if WIDE
typedef int64_t NAME(bits) __attribute__((vector_size(64)));
#define LOGARITHM __builtin_log
#define MANTISSA 52
#define BIAS 1023
#define LOWEST -708.0
#define ROUNDER 6755399441055744.0
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define HALF_ROOT 0x3fe6a09e667f3bcdLL
#define TERMS 11
#else
typedef int32_t NAME(bits) __attribute__((vector_size(64)));
#define LOGARITHM __builtin_logf
#define MANTISSA 23
#define BIAS 127
#define LOWEST -87.0f
#define ROUNDER 12582912.0f
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define HALF_ROOT 0x3f3504f3
#define TERMS 5
#endif
#define BITS NAME(bits)

/* exp of numbers up to 0: x = n ln 2 + r, |r| <= ln 2 / 2, exp(r) by its series, to the last digit or two; 0 below
 * LOWEST. */
static inline VEC NAME(exponential)(VEC x) {
    const VEC shifted = x * (REAL)1.44269504088896340736 + ROUNDER; /* n in its lowest bits */
    const VEC n = shifted - ROUNDER, r = (x - n * LN2_HIGH) - n * LN2_LOW;
    VEC p = r * (REAL)(1.0 / 5040) + (REAL)(1.0 / 720);
#if WIDE
    p = r * (REAL)(1.0 / 6227020800) + (REAL)(1.0 / 479001600);
    p = p * r + (REAL)(1.0 / 39916800), p = p * r + (REAL)(1.0 / 3628800), p = p * r + (REAL)(1.0 / 362880);
    p = p * r + (REAL)(1.0 / 40320), p = p * r + (REAL)(1.0 / 5040), p = p * r + (REAL)(1.0 / 720);
#endif
    p = p * r + (REAL)(1.0 / 120), p = p * r + (REAL)(1.0 / 24), p = p * r + (REAL)(1.0 / 6);
    p = p * r + (REAL)0.5, p = p * r + (REAL)1, p = p * r + (REAL)1;
    const BITS power = ((BITS)shifted + BIAS) << MANTISSA, zero = (BITS)(x < LOWEST);
    return (VEC)((BITS)(p * (VEC)power) & ~zero);
}

/* log of positive normal numbers: x = 2^n m, m in [sqrt(1/2), sqrt(2)), log m = 2 artanh r by its series, to the last digit
 * or two. */
static inline VEC NAME(logarithm)(VEC x) {
    const BITS shifted = (BITS)x - HALF_ROOT, n = shifted >> MANTISSA;
    const VEC m = (VEC)((BITS)x - (n << MANTISSA)), power = __builtin_convertvector(n, VEC);
    const VEC r = (m - (REAL)1) / (m + (REAL)1), square = r * r;
    VEC p = (VEC){0} + (REAL)1 / (2 * TERMS + 1);
    for (int k = TERMS - 1; k >= 0; k--) p = p * square + (REAL)1 / (2 * k + 1);
    return power * LN2_HIGH + (power * LN2_LOW + 2 * r * p);
}

/* The same for fewer numbers. */
typedef REAL NAME(half) __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
typedef REAL NAME(quarter) __attribute__((vector_size(16), aligned(sizeof(REAL)), may_alias));
#define HALF NAME(half)
#define QUARTER NAME(quarter)

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
#define SUMS(V, lanes)                                                                \
    for (; j + (lanes) <= m; j += (lanes)) {                                          \
        V a = {0};                                                                    \
        for (int64_t i = 0; i < n; i++) a += x[i] * *(const V *)(t + i * m + j);      \
        *(V *)(out + j) = a;                                                          \
    }
    SUMS(VEC, LANES)
    SUMS(HALF, LANES / 2)
    SUMS(QUARTER, LANES / 4)
#undef SUMS
    if (j == m) return;
    memset(out + j, 0, sizeof(REAL) * (m - j));
    for (int64_t i = 0; i < n; i++)
        for (int64_t l = j; l < m; l++) out[l] += x[i] * t[i * m + l];
}

/* The same for `count` vectors x, n numbers apart, and out, m numbers apart: a constant, so that registers hold the
 * sums. */
static inline __attribute__((always_inline)) void NAME(group)(const REAL *x, const REAL *t, REAL *out, int64_t n,
                                                              int64_t m, const int count) {
    int64_t j = 0;
    const int wide = 4; /* of two vectors eight sums are under way then; more gain nothing, measured */
    for (; count == 2 && j + wide * LANES <= m; j += wide * LANES) {
        VEC s[8] = {0};
        for (int64_t i = 0; i < n; i++)
            for (int w = 0; w < wide; w++) {
                const VEC r = AT(t + i * m + j + w * LANES);
                for (int c = 0; c < count; c++) s[c * wide + w] += x[c * n + i] * r;
            }
        for (int c = 0; c < count; c++)
            for (int w = 0; w < wide; w++) *(VEC *)(out + c * m + j + w * LANES) = s[c * wide + w];
    }
#define SUMS(V, lanes)                                                                \
    for (; j + (lanes) <= m; j += (lanes)) {                                          \
        V s[8] = {0};                                                                 \
        for (int64_t i = 0; i < n; i++) {                                             \
            const V r = *(const V *)(t + i * m + j);                                  \
            for (int c = 0; c < count; c++) s[c] += x[c * n + i] * r;                 \
        }                                                                             \
        for (int c = 0; c < count; c++) *(V *)(out + c * m + j) = s[c];               \
    }
    SUMS(VEC, LANES)
    SUMS(HALF, LANES / 2)
    SUMS(QUARTER, LANES / 4)
#undef SUMS
    for (; j < m; j++) {
        REAL s[8] = {0};
        for (int64_t i = 0; i < n; i++) {
            const REAL r = t[i * m + j];
            for (int c = 0; c < count; c++) s[c] += x[c * n + i] * r;
        }
        for (int c = 0; c < count; c++) out[c * m + j] = s[c];
    }
}

/* The same for a table that is larger than the cache: it is read once, in order, and the sums stay in the cache. */
static inline __attribute__((always_inline)) void NAME(stream)(const REAL *x, const REAL *t, REAL *out, int64_t n,
                                                               int64_t m, const int count) {
    int64_t i = 0;
    memset(out, 0, sizeof(REAL) * count * m);
    for (; i + 8 <= n; i += 8) {
        const REAL *r = t + i * m, *y = x + i;
        int64_t j = 0;
        for (; j + LANES <= m; j += LANES) {
            const VEC p = AT(r + j), q = AT(r + m + j), s = AT(r + 2 * m + j), u = AT(r + 3 * m + j);
            const VEC v = AT(r + 4 * m + j), w = AT(r + 5 * m + j), f = AT(r + 6 * m + j), g = AT(r + 7 * m + j);
            for (int c = 0; c < count; c++) {
                const REAL *z = y + c * n;
                *(VEC *)(out + c * m + j) += ((z[0] * p + z[1] * q) + (z[2] * s + z[3] * u)) +
                                             ((z[4] * v + z[5] * w) + (z[6] * f + z[7] * g));
            }
        }
        for (; j < m; j++)
            for (int c = 0; c < count; c++)
                for (int l = 0; l < 8; l++) out[c * m + j] += y[c * n + l] * r[l * m + j];
    }
    for (; i < n; i++)
        for (int c = 0; c < count; c++)
            for (int64_t j = 0; j < m; j++) out[c * m + j] += x[c * n + i] * t[i * m + j];
}

static inline void NAME(rows)(const REAL *x, const REAL *t, REAL *out, int64_t vectors, int64_t n,
                              int64_t m) {
    int64_t b = 0;
    if (n * m > 256 * 256) { /* the table outgrows the cache; where the two are about as fast, measured */
        for (; b + 4 <= vectors; b += 4) NAME(stream)(x + b * n, t, out + b * m, n, m, 4);
        for (; b + 2 <= vectors; b += 2) NAME(stream)(x + b * n, t, out + b * m, n, m, 2);
        for (; b < vectors; b++) NAME(stream)(x + b * n, t, out + b * m, n, m, 1);
        return;
    }
#ifdef __AVX512F__ /* 32 registers */
    for (; b + 8 <= vectors; b += 8) NAME(group)(x + b * n, t, out + b * m, n, m, 8);
#endif
    for (; b + 4 <= vectors; b += 4) NAME(group)(x + b * n, t, out + b * m, n, m, 4);
    for (; b + 2 <= vectors; b += 2) NAME(group)(x + b * n, t, out + b * m, n, m, 2);
    for (; b < vectors; b++) NAME(row)(x + b * n, t, out + b * m, n, m);
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

/* The same for `count` vectors x and out, n numbers apart, and m = n. */
static inline __attribute__((always_inline)) void NAME(dots)(const REAL *x, const REAL *t, REAL *out, int64_t n,
                                                             const int count) {
    for (int64_t i = 0; i < n; i++) {
        const REAL *r = t + i * n;
        VEC s[4] = {0};
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES)
            for (int c = 0; c < count; c++) s[c] += AT(x + c * n + j) * AT(r + j);
        for (int c = 0; c < count; c++) {
            REAL sum = 0;
            for (int l = 0; l < LANES; l++) sum += s[c][l];
            for (int64_t l = j; l < n; l++) sum += x[c * n + l] * r[l];
            out[c * n + i] = sum;
        }
    }
}

static inline void NAME(columns)(const REAL *x, const REAL *t, REAL *out, int64_t vectors, int64_t n) {
    int64_t b = 0;
    for (; b + 4 <= vectors; b += 4) NAME(dots)(x + b * n, t, out + b * n, n, 4);
    for (; b + 2 <= vectors; b += 2) NAME(dots)(x + b * n, t, out + b * n, n, 2);
    for (; b < vectors; b++) NAME(dots)(x + b * n, t, out + b * n, n, 1);
}

static inline REAL NAME(largest)(const REAL *x, int64_t n) {
    REAL top = x[0];
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* The sum of x[i] w[i], w NULL: of x[i]. */
static inline REAL NAME(sum)(const REAL *x, const REAL *w, int64_t n) {
    REAL total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += w ? x[i] * w[i] : x[i];
    return total;
}

static inline void NAME(divide)(REAL *x, REAL by, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] /= by;
}

/* 0 for -inf. */
static inline REAL NAME(finite)(REAL top) { return top - top != 0 && top < 0 ? 0 : top; }

/* out = exp(x) and out = log(x), of whole arrays, perhaps the same. */
#define OVER_ALL(each, one)                                                                     \
    static inline void NAME(each)(const REAL *x, REAL *out, int64_t n) {                        \
        int64_t i = 0;                                                                          \
        for (; i + LANES <= n; i += LANES) *(VEC *)(out + i) = NAME(one)(AT(x + i));            \
        if (i == n) return;                                                                     \
        VEC rest = {0};                                                                         \
        memcpy(&rest, x + i, sizeof(REAL) * (n - i));                                           \
        rest = NAME(one)(rest);                                                                 \
        memcpy(out + i, &rest, sizeof(REAL) * (n - i));                                         \
    }
OVER_ALL(powers, exponential)
OVER_ALL(logarithms, logarithm)
#undef OVER_ALL

/* out = exp(x - top), where top, which is returned, is the largest of x, or 0 if all are -inf. */
static inline REAL NAME(exponentials)(const REAL *x, REAL *out, int64_t n) {
    const REAL top = NAME(finite)(NAME(largest)(x, n));
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = x[i] - top;
    NAME(powers)(out, out, n);
    return top;
}

/* Weights (a, b, c) of a logarithmic pool (see potentials/pool.py): from (1, 0, 0) where nothing is masked through `count`
 * free ones, weights (count, 3), at the knots (0, .., count) of the masked share. */
static inline void NAME(pooling)(int64_t count, const REAL *knots, const REAL *weights, const uint8_t *masked,
                                 int64_t sites, REAL *w) {
    int64_t left = 0;
    for (int64_t s = 0; s < sites; s++) left += masked[s];
    w[0] = 1, w[1] = w[2] = 0;
    for (int64_t k = 0; k < count; k++) {
        const REAL way = ((REAL)left / sites - knots[k]) / (knots[k + 1] - knots[k]);
        const REAL share = way < 0 ? 0 : way > 1 ? 1 : way;
        for (int64_t j = 0; j < 3; j++) w[j] = (1 - share) * w[j] + share * weights[k * 3 + j];
    }
}

/* out = w[0] q + w[1] p + w[2] r, normalised; -inf where q or p are, q where that is everywhere. scratch: v. */
static inline void NAME(pooled)(const REAL *w, const REAL *q, const REAL *p, const REAL *r, REAL *out, REAL *scratch,
                                int64_t v) {
    const REAL none = -__builtin_inf();
#pragma omp simd
    for (int64_t i = 0; i < v; i++) out[i] = q[i] + p[i] == none ? none : w[0] * q[i] + w[1] * p[i] + w[2] * r[i];
    if (NAME(largest)(out, v) == none) memcpy(out, q, sizeof(REAL) * v);
    const REAL top = NAME(exponentials)(out, scratch, v) + LOGARITHM(NAME(sum)(scratch, NULL, v));
#pragma omp simd
    for (int64_t i = 0; i < v; i++) out[i] -= top;
}

/* Pools of (batch, sites, v) at the masked sites, 0 at the others. each: stride of alone between batch elements. room: v. */
void NAME(pool)(int64_t batch, int64_t sites, int64_t v, int64_t count, const REAL *knots, const REAL *weights,
                const uint8_t *masked, const REAL *network, const REAL *prior, const REAL *alone, int64_t each, REAL *out,
                REAL *room) {
    for (int64_t b = 0; b < batch; b++) {
        REAL w[3];
        NAME(pooling)(count, knots, weights, masked + b * sites, sites, w);
        for (int64_t s = 0; s < sites; s++) {
            const int64_t at = (b * sites + s) * v;
            if (masked[b * sites + s])
                NAME(pooled)(w, network + at, prior + at, alone + b * each + s * v, out + at, room, v);
            else
                memset(out + at, 0, sizeof(REAL) * v);
        }
    }
}

/* The largest entries of the columns of t, (n, n), or 0 where all are -inf, and exp(t - gauge). */
void NAME(share)(int64_t n, const REAL *t, REAL *gauge, REAL *out) {
    memcpy(gauge, t, sizeof(REAL) * n);
    for (int64_t i = 1; i < n; i++)
#pragma omp simd
        for (int64_t j = 0; j < n; j++) gauge[j] = t[i * n + j] > gauge[j] ? t[i * n + j] : gauge[j];
    for (int64_t j = 0; j < n; j++) gauge[j] = NAME(finite)(gauge[j]);
    for (int64_t i = 0; i < n; i++)
#pragma omp simd
        for (int64_t j = 0; j < n; j++) out[i * n + j] = t[i * n + j] - gauge[j];
    NAME(powers)(out, out, n * n);
}

/* Where a path's vectors come from and go to, and what the loop below does with them. */
typedef struct {
    int64_t steps, batch, n, stride, down, lift, turn; /* strides of base between steps and batch elements */
    int64_t gauged;                                    /* stride of gauge between batch elements */
    const REAL *base, *gauge;
    REAL *rows, *a, *o, *offset;
    const REAL *inner, *last;
    REAL *marginals, *weighted;
} NAME(Path);
#define PATH NAME(Path)

/* exp of what enters at step k: rows_k, or on the way down the first vector. */
static inline void NAME(enter)(const PATH *path, int64_t k, int64_t low, int64_t high) {
    const int64_t n = path->n, at = k * path->batch * n;
    const REAL *gauge = path->down || k ? path->gauge : NULL;
    REAL *out = (path->down ? path->a : path->rows) + at;
    for (int64_t b = low; b < high; b++) {
        const REAL *x = path->base + b * path->turn + (path->down ? 0 : k * path->lift);
        REAL *r = out + b * n, top = x[0];
        if (gauge) {
            const REAL *g = gauge + b * path->gauged;
            top = x[0] + g[0];
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < n; i++) r[i] = x[i] + g[i], top = r[i] > top ? r[i] : top;
            x = r;
        } else
            top = NAME(largest)(x, n);
        top = NAME(finite)(top);
        if (path->offset) path->offset[b * path->steps + k] = top;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) r[i] = x[i] - top;
    }
    NAME(powers)(out + low * n, out + low * n, (high - low) * n);
    if (!k && !path->down) memcpy(path->a + low * n, out + low * n, sizeof(REAL) * (high - low) * n);
}

/* Round j of the loop below, at step k: the vector that goes into the product, and the scale taken out of it. */
static inline REAL NAME(step)(const PATH *path, int64_t j, int64_t k, int64_t b) {
    const int64_t n = path->n, at = (k * path->batch + b) * n, width = path->batch * n;
    REAL *x = path->a + at;
    if (j) {
        const REAL *r = path->rows + (path->down ? at + width : at);
        const REAL *p = path->o + (path->down ? at + width : at - width);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) x[i] = r[i] * p[i];
    }
    if (j % path->stride) return 1;
    const REAL scale = NAME(largest)(x, n);
    NAME(divide)(x, scale, n);
    if (path->offset) path->offset[b * path->steps + k] += (REAL)__builtin_log((double)scale);
    return scale;
}

/* The smallest of n numbers and `least`. */
static inline double NAME(smallest)(const REAL *x, int64_t n, double scale, double least) {
    REAL low = x[0];
#pragma omp simd reduction(min : low)
    for (int64_t i = 0; i < n; i++) low = x[i] < low ? x[i] : low;
    if (!(scale > 0)) return -1; /* nothing is possible */
    return low * scale < least ? low * scale : least;
}

/* x times y over its sum; the sum. */
static inline REAL NAME(normalized)(const REAL *x, const REAL *y, REAL *out, int64_t n) {
    REAL total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += out[i] = x[i] * y[i];
    NAME(divide)(out, total, n);
    return total;
}

/* What the variables of step k believe, from the vectors of both directions; the smaller of the sums and `least`. */
static inline double NAME(believe)(const PATH *path, int64_t k, int64_t b, double least) {
    const int64_t n = path->n, at = (k * path->batch + b) * n;
    REAL *own = path->marginals + (b * (path->steps + 1) + k) * n, *weighted = path->weighted + (b * path->steps + k) * n;
    const REAL *inner = path->inner + at, total = NAME(normalized)(inner, path->o + at, own, n);
    for (int64_t i = 0; i < n; i++) weighted[i] = inner[i] / total;
    if (k == path->steps - 1) NAME(normalized)(path->a + at, path->last + b * n, own + n, n);
    return total < least ? total : least;
}

/* Along a path, for the batch elements low .. high, the rounds from .. to of steps in all.
 *
 * Up: rows_k = exp(base_k + gauge), scaled (the gauge not for k = 0), a_k = rows_k o_{k-1}, scaled every stride-th
 * step, o_k = a_k P_k; the logarithms of the scales in offset, (batch, steps). Down: the first vector, of the last
 * step, is exp(base + gauge), the others e_k = rows_{k + 1} d_{k + 1}, d_k = P_k e_k, with e in a and d in o; and
 * what variables believe, from inner, the upward vectors, and last, the message of the last step:
 * marginals (batch, steps + 1, n), and weighted, inner over its sum with d, (batch, steps, n).
 *
 * The table of step k is at t + (k - first) * step + b * each, and the product runs across its rows (out[j] over i)
 * or down its columns. tops, if not NULL: the tables are given as logarithms; their largest entries are put there,
 * (batch, steps), and belong to the offset.
 *
 * edges, on the way down, if not NULL: room for the marginal of each edge, t[i][j] u[i] v[j] with u, v = e_k and
 * weighted_k * weight[b], the one of the two first that the rows of t belong to; that of step k is at
 * edges + place[k] * n * n + b * edges_each.
 *
 * Returns the smallest of the products over n for each step between scales, and of the sums of inner and d, relative to
 * factors of at most 1; -1 where a vector vanished. room: batch + n + n * n numbers. */
double NAME(scan)(int64_t low, int64_t high, int64_t steps, int64_t from, int64_t to, int64_t batch, int64_t n,
                  int64_t stride, int64_t down, int64_t across, const REAL *base, int64_t lift, int64_t turn,
                  const REAL *gauge, int64_t gauged, REAL *rows, const REAL *t, int64_t first, int64_t step,
                  int64_t each, REAL *a, REAL *o, REAL *offset, REAL *tops, const REAL *inner, const REAL *last,
                  REAL *marginals, REAL *weighted, const REAL *weight, REAL *edges, const int64_t *place,
                  int64_t edges_each, REAL *room) {
    const PATH path = {steps,  batch, n,    stride, down,   lift,  turn, gauged,    base,
                       gauge,  rows,  a,    o,      offset, inner, last, marginals, weighted};
    double least = 1, sums = 1;
    if (!step && !each && !tops && !edges) { /* one table for all */
        for (int64_t j = from; j < to; j++) {
            const int64_t k = down ? steps - 1 - j : j, at = k * batch * n;
            if (!down || !j) NAME(enter)(&path, k, low, high);
            for (int64_t b = low; b < high; b++) room[b] = NAME(step)(&path, j, k, b);
            if (across)
                NAME(rows)(a + at + low * n, t, o + at + low * n, high - low, n, n);
            else
                NAME(columns)(a + at + low * n, t, o + at + low * n, high - low, n);
            for (int64_t b = low; b < high; b++) {
                least = NAME(smallest)(o + at + b * n, n, room[b], least);
                if (least < 0) return least;
                if (down) sums = NAME(believe)(&path, k, b, sums);
            }
        }
    } else {
        for (int64_t j = from; j < to; j++)
            if (!down || !j) NAME(enter)(&path, down ? steps - 1 : j, low, high);
        for (int64_t b = low; b < high; b++)
            for (int64_t j = from; j < to; j++) {
                const int64_t k = down ? steps - 1 - j : j;
                REAL *x = a + (k * batch + b) * n, *out = o + (k * batch + b) * n;
                const REAL scale = NAME(step)(&path, j, k, b), *table = t + (k - first) * step + b * each;
                if (tops) {
                    tops[b * steps + k] = NAME(exponentials)(table, room + n, n * n);
                    if (offset) offset[b * steps + k] += tops[b * steps + k];
                    table = room + n;
                }
                if (across)
                    NAME(row)(x, table, out, n, n);
                else
                    NAME(column)(x, table, out, n, n);
                least = NAME(smallest)(out, n, scale, least);
                if (least < 0) return least;
                if (down) sums = NAME(believe)(&path, k, b, sums);
                if (!edges) continue;
                const REAL *y = weighted + (b * steps + k) * n, w = weight ? weight[b] : 1;
                for (int64_t i = 0; i < n; i++) room[i] = y[i] * w;
                /* down a column of the table is across its rows for the child's vector, and the other way round */
                const REAL *u = across ? x : room, *v = across ? room : x;
                REAL *edge = edges + place[k] * n * n + b * edges_each;
                for (int64_t i = 0; i < n; i++) {
                    const REAL own = u[i];
#pragma omp simd
                    for (int64_t l = 0; l < n; l++) edge[i * n + l] = table[i * n + l] * own * v[l];
                }
            }
    }
    for (int64_t i = 0; i < stride && i < steps; i++) least /= n;
    return sums < least ? sums : least;
}

/* A value with a chance in proportion to its weight, from a uniform number in [0, 1); weights has room for another
 * (n + 15) / 16 numbers, sums of 16 weights each. */
static inline int64_t NAME(pick)(double *weights, int64_t n, double uniform) {
    double *parts = weights + n, total = 0, before = 0;
    for (int64_t s = 0; s < n; s += 16) {
        const int64_t stop = s + 16 < n ? s + 16 : n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = s; i < stop; i++) sum += weights[i];
        total += parts[s / 16] = sum;
    }
    /* The part in which the sum passes the target, and the value in it; never one of weight 0. */
    const double target = uniform * total;
    int64_t part = 0, value = 0;
    for (int64_t s = 0; s * 16 < n; s++) {
        if (parts[s] == 0) continue;
        part = s;
        if (before + parts[s] > target) break;
        before += parts[s];
    }
    for (int64_t i = part * 16; i < part * 16 + 16 && i < n; i++) {
        if (weights[i] == 0) continue;
        value = i, before += weights[i];
        if (before > target) break;
    }
    return value;
}

/* Values along a path from its last parent's: p(c) ~ a_k[c] t[v][c]. The entry of child value c and parent value v is
 * c * child + v * parent numbers into a table; logs: they are logarithms. uniform is in [0, 1).
 *
 * room: n + (n + 15) / 16 numbers; row: n. */
void NAME(draw)(int64_t steps, int64_t from, int64_t to, int64_t draws, int64_t batch, int64_t alone, int64_t n,
                const REAL *a, const REAL *t, int64_t step, int64_t each, int64_t child, int64_t parent, int64_t logs,
                const double *uniform, const int64_t *last, double *room, REAL *row, int64_t *values) {
    for (int64_t k = to - 1; k >= from; k--)
        for (int64_t d = 0; d < draws; d++)
            for (int64_t b = 0; b < batch; b++) {
                const int64_t at = d * batch + b;
                const int64_t v = k == steps - 1 ? last[at] : values[(k + 1) * draws * batch + at];
                const REAL *x = a + (k * (alone ? 1 : batch) + (alone ? 0 : b)) * n;
                const REAL *r = t + (k - from) * step + b * each + v * parent;
                if (child != 1 || logs) {
                    for (int64_t i = 0; i < n; i++) row[i] = r[i * child];
                    if (logs) NAME(exponentials)(row, row, n);
                    r = row;
                }
                for (int64_t i = 0; i < n; i++) room[i] = x[i] * r[i];
                values[k * draws * batch + at] = NAME(pick)(room, n, uniform[k * draws * batch + at]);
            }
}

/* out[p] = max_c x[c] + t[c][p]. */
static inline void NAME(best_row)(const REAL *x, const REAL *t, REAL *out, int64_t n, int64_t m) {
    for (int64_t p = 0; p < m; p++) out[p] = x[0] + t[p];
    for (int64_t c = 1; c < n; c++) {
        const REAL v = x[c], *row = t + c * m;
#pragma omp simd
        for (int64_t p = 0; p < m; p++) out[p] = v + row[p] > out[p] ? v + row[p] : out[p];
    }
}

/* The same for some rows x. */
void NAME(best_rows)(int64_t rows, int64_t n, int64_t m, const REAL *x, const REAL *t, REAL *out) {
    for (int64_t r = 0; r < rows; r++) NAME(best_row)(x + r * n, t, out + r * m, n, m);
}

/* Max-product: x_k = rows_k + m_{k-1}, m_k[p] = max_c x_k[c] + t[c][p], across: tables (child, parent), else t[p][c];
 * the largest score is taken out of every stride-th step. */
void NAME(best_scores)(int64_t steps, int64_t batch, int64_t n, int64_t stride, const REAL *rows, const REAL *t,
                       int64_t step, int64_t each, int64_t across, REAL *x, REAL *m, REAL *offset) {
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
            for (int64_t p = 0; p < n && !across; p++) {
                const REAL *row = table + p * n;
                REAL top = own[0] + row[0];
#pragma omp simd reduction(max : top)
                for (int64_t c = 0; c < n; c++) top = own[c] + row[c] > top ? own[c] + row[c] : top;
                out[p] = top;
            }
            if (across) NAME(best_row)(own, table, out, n, n);
        }
}

/* The values that reach these scores, from the last parent's; ties go to the smaller value. */
void NAME(best_values)(int64_t steps, int64_t batch, int64_t n, const REAL *x, const REAL *t, int64_t step,
                       int64_t each, int64_t across, const int64_t *last, int64_t *values) {
    const int64_t child = across ? n : 1, parent = across ? 1 : n;
    for (int64_t k = steps - 1; k >= 0; k--)
        for (int64_t b = 0; b < batch; b++) {
            const int64_t v = k == steps - 1 ? last[b] : values[(k + 1) * batch + b];
            const REAL *own = x + (k * batch + b) * n, *table = t + k * step + b * each + v * parent;
            int64_t found = 0;
            REAL top = own[0] + table[0];
            for (int64_t c = 1; c < n; c++)
                if (own[c] + table[c * child] > top) top = own[c] + table[c * child], found = c;
            values[k * batch + b] = found;
        }
}

/* The messages of a hidden Markov model of h states and v tokens (see hidden_path.py), all (batch, sites, .). said are
 * those of the tokens, latent the evidence of the latents, with strides (0: the same for all) between batch elements and
 * sites. Both functions return the smallest number of what they compute, -1 where everything vanished. */

/* x = a b c, its largest entry 1; the factor that was taken out, at most 1, for the floor below; 0 if nothing is left. */
static inline REAL NAME(meet)(const REAL *a, const REAL *b, const REAL *c, REAL *x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = a[i] * b[i] * c[i];
    const REAL top = NAME(largest)(x, n);
    if (!(top > 0)) return 0;
    NAME(divide)(x, top, n);
    return top < 1 ? top : 1;
}

/* The smallest entry of products, as if their vectors hadn't been scaled. */
static inline double NAME(floor)(const REAL *y, const REAL *tops, int64_t count, int64_t n, double least) {
    for (int64_t c = 0; c < count; c++) least = NAME(smallest)(y + c * n, n, tops[c], least);
    return least;
}

/* right_{s-1} = T (said_s right_s latent_s), from the last site on. room: batch * (2 * h + 1). */
double NAME(path_right)(int64_t sites, int64_t batch, int64_t h, const REAL *back, const REAL *latent, int64_t each,
                        int64_t step, const REAL *said, REAL *right, REAL *room) {
    REAL *x = room, *y = room + batch * h, *tops = y + batch * h;
    double least = 1;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < h; i++) right[(b * sites + sites - 1) * h + i] = 1;
    for (int64_t s = sites - 1; s > 0; s--) {
        for (int64_t b = 0; b < batch; b++) {
            const int64_t at = (b * sites + s) * h;
            if (!(tops[b] = NAME(meet)(latent + b * each + s * step, said + at, right + at, x + b * h, h))) return -1;
        }
        NAME(rows)(x, back, y, batch, h, h);
        for (int64_t b = 0; b < batch; b++) memcpy(right + (b * sites + s - 1) * h, y + b * h, sizeof(REAL) * h);
        least = NAME(floor)(y, tops, batch, h, least);
    }
    return least;
}

/* left_{s+1} = (left_s said_s latent_s) T, from the first site on. With a cavity, it becomes (left_s right_s latent_s) P at
 * the free sites on the way, such that its sum over the values, each times its weight (NULL: 1), is 1; and with a quotient
 * q the token's message there is quotient / cavity times the transposed P. room: batch * (2 * max(h, v) + 1); which:
 * batch. */
double NAME(path_left)(int64_t sites, int64_t batch, int64_t h, int64_t v, const REAL *emit, const REAL *tokens,
                       const REAL *move, const REAL *latent, int64_t each, int64_t step, const uint8_t *free,
                       const REAL *right, const REAL *weight, const REAL *quotient, REAL *said, REAL *left, REAL *cavity,
                       REAL *room, int64_t *which) {
    const int64_t wide = h > v ? h : v;
    REAL *x = room, *y = room + batch * wide, *tops = y + batch * wide;
    double least = 1;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < h; i++) left[b * sites * h + i] = 1;
    for (int64_t s = 0; s < sites; s++) {
        int64_t count = 0;
        for (int64_t b = 0; cavity && b < batch; b++)
            if (free[b * sites + s]) {
                const int64_t at = (b * sites + s) * h;
                if (!(tops[count] = NAME(meet)(latent + b * each + s * step, left + at, right + at, x + count * h, h)))
                    return -1;
                which[count++] = b;
            }
        if (count) NAME(rows)(x, emit, y, count, h, v);
        if (count) least = NAME(floor)(y, tops, count, v, least);
        for (int64_t c = 0; c < count; c++) {
            const int64_t at = (which[c] * sites + s) * v;
            const REAL total = NAME(sum)(y + c * v, weight ? weight + at : NULL, v);
            if (!(total > 0)) return -1;
            memcpy(cavity + at, y + c * v, sizeof(REAL) * v);
            NAME(divide)(cavity + at, total, v);
            if (!quotient) continue;
#pragma omp simd
            for (int64_t i = 0; i < v; i++) x[c * v + i] = quotient[at + i] / cavity[at + i];
        }
        if (count && quotient) {
            NAME(rows)(x, tokens, y, count, v, h);
            least = NAME(smallest)(y, count * h, 1, least);
            for (int64_t c = 0; c < count; c++)
                memcpy(said + (which[c] * sites + s) * h, y + c * h, sizeof(REAL) * h);
        }
        for (int64_t b = 0; b < batch; b++) {
            const int64_t at = (b * sites + s) * h;
            if (!(tops[b] = NAME(meet)(latent + b * each + s * step, left + at, said + at, x + b * h, h))) return -1;
        }
        if (s + 1 == sites) { /* nothing goes on from here, but draws begin here */
            least = NAME(smallest)(tops, batch, 1, least);
            break;
        }
        NAME(rows)(x, move, y, batch, h, h);
        least = NAME(floor)(y, tops, batch, h, least);
        for (int64_t b = 0; b < batch; b++) memcpy(left + (b * sites + s + 1) * h, y + b * h, sizeof(REAL) * h);
    }
    return least;
}

/* The same with a quotient, and in the same pass, with messages of its own from the left, the prior's marginals, with which
 * the targets are pooled before they are met (see pooled above): target becomes log q', weight q' / cavity and log_weight
 * its logarithm at the free sites. Tokens have no weights of their own. mix: batch * 3; room: batch * (4 * max(h, v) + 2) +
 * 2 * v. */
double NAME(path_pool)(int64_t sites, int64_t batch, int64_t h, int64_t v, const REAL *emit, const REAL *tokens,
                       const REAL *move, const REAL *latent, int64_t each, int64_t step, const uint8_t *free,
                       const REAL *right, int64_t knots, const REAL *knot, const REAL *weights, const REAL *network,
                       const REAL *alone, int64_t apart, REAL *said, REAL *left, REAL *prior, REAL *weight,
                       REAL *log_weight, REAL *mix, REAL *room, int64_t *which) {
    const int64_t wide = h > v ? h : v;
    REAL *x = room, *y = x + 2 * batch * wide, *tops = y + 2 * batch * wide, *target = tops + 2 * batch, *log = target + v;
    double least = 1;
    for (int64_t b = 0; b < batch; b++) {
        NAME(pooling)(knots, knot, weights, free + b * sites, sites, mix + b * 3);
        for (int64_t i = 0; i < h; i++) left[b * sites * h + i] = prior[b * h + i] = 1;
    }
    for (int64_t s = 0; s < sites; s++) {
        int64_t count = 0;
        for (int64_t b = 0; b < batch; b++) count += free[b * sites + s];
        for (int64_t b = 0, c = 0; c < count; b++) {
            if (!free[b * sites + s]) continue;
            const int64_t at = (b * sites + s) * h;
            const REAL *z = latent + b * each + s * step;
            const REAL one = NAME(meet)(z, prior + b * h, right + at, x + c * h, h);
            const REAL two = NAME(meet)(z, left + at, right + at, x + (count + c) * h, h);
            if (!one || !two) return -1;
            tops[c] = one, tops[count + c] = two, which[c++] = b;
        }
        if (count) NAME(rows)(x, emit, y, 2 * count, h, v);
        if (count) least = NAME(floor)(y, tops, 2 * count, v, least);
        for (int64_t c = 0; c < count; c++) {
            const int64_t b = which[c], at = (b * sites + s) * v;
            REAL *p = y + c * v, *cavity = y + (count + c) * v, *q = x + c * v;
            NAME(divide)(p, NAME(sum)(p, NULL, v), v);
            NAME(divide)(cavity, NAME(sum)(cavity, NULL, v), v);
            NAME(logarithms)(p, p, v);
            NAME(pooled)(mix + b * 3, network + at, p, alone + b * apart + s * v, target, log, v);
            NAME(logarithms)(cavity, log, v);
#pragma omp simd
            for (int64_t i = 0; i < v; i++) log_weight[at + i] = target[i] - log[i];
            NAME(powers)(target, q, v);
#pragma omp simd
            for (int64_t i = 0; i < v; i++) weight[at + i] = q[i] = q[i] / cavity[i];
        }
        if (count) NAME(rows)(x, tokens, y, count, v, h);
        if (count) least = NAME(smallest)(y, count * h, 1, least);
        for (int64_t b = 0; s + 1 < sites && b < batch; b++) {
            const REAL *z = latent + b * each + s * step, *own = said + (b * sites + s) * h;
            if (!(tops[b] = NAME(meet)(z, prior + b * h, own, x + b * h, h))) return -1;
        }
        for (int64_t c = 0; c < count; c++) memcpy(said + (which[c] * sites + s) * h, y + c * h, sizeof(REAL) * h);
        if (s + 1 == sites) break;
        for (int64_t b = 0; b < batch; b++) {
            const int64_t at = (b * sites + s) * h, k = batch + b;
            if (!(tops[k] = NAME(meet)(latent + b * each + s * step, left + at, said + at, x + k * h, h))) return -1;
        }
        NAME(rows)(x, move, y, 2 * batch, h, h);
        least = NAME(floor)(y, tops, 2 * batch, h, least);
        memcpy(prior, y, sizeof(REAL) * batch * h);
        for (int64_t b = 0; b < batch; b++)
            memcpy(left + (b * sites + s + 1) * h, y + (batch + b) * h, sizeof(REAL) * h);
    }
    return least;
}

/* Joint draws of states, from the last site on, and of the tokens that are free: z_s ~ left_s said_s latent_s T[., z_{s+1}],
 * x_s ~ P[z_s, .] weight_s. uniform: (draws, batch, sites, 2), in [0, 1); states and values (draws, batch, sites), the
 * second filled in where free, or NULL. room: n + (n + 15) / 16, n = max(h, v). */
void NAME(path_draw)(int64_t draws, int64_t sites, int64_t batch, int64_t h, int64_t v, const REAL *latent,
                     int64_t each, int64_t step, const REAL *left, const REAL *said, const REAL *back, const REAL *emit, const REAL *weight, const uint8_t *free,
                     const double *uniform, int64_t *states, int64_t *values, double *room) {
    for (int64_t d = 0; d < draws; d++)
        for (int64_t b = 0; b < batch; b++) {
            int64_t state = 0;
            for (int64_t s = sites - 1; s >= 0; s--) {
                const int64_t at = b * sites + s, here = d * batch * sites + at;
                const REAL *f = left + at * h, *m = said + at * h, *z = latent + b * each + s * step;
                const REAL *t = back + state * h;
                for (int64_t i = 0; i < h; i++) room[i] = (double)f[i] * m[i] * z[i];
                if (s + 1 < sites)
                    for (int64_t i = 0; i < h; i++) room[i] *= t[i];
                states[here] = state = NAME(pick)(room, h, uniform[2 * here]);
                if (!values || !free[at]) continue;
                const REAL *p = emit + state * v, *w = weight + at * v;
                for (int64_t i = 0; i < v; i++) room[i] = (double)p[i] * w[i];
                values[here] = NAME(pick)(room, v, uniform[2 * here + 1]);
            }
        }
}

/* out[j] = max_i x[i] t[i * m + j] */
static inline void NAME(greatest)(const REAL *x, const REAL *t, REAL *out, int64_t n, int64_t m) {
    for (int64_t j = 0; j < m; j++) out[j] = x[0] * t[j];
    for (int64_t i = 1; i < n; i++) {
        const REAL v = x[i], *row = t + i * m;
#pragma omp simd
        for (int64_t j = 0; j < m; j++) out[j] = v * row[j] > out[j] ? v * row[j] : out[j];
    }
}

/* The place of the largest of x[i] y[i] z[i] t[i], the first of several. */
static inline int64_t NAME(best)(const REAL *x, const REAL *y, const REAL *z, const REAL *t, int64_t n) {
    int64_t place = 0;
    double top = -1;
    for (int64_t i = 0; i < n; i++) {
        const double own = (double)x[i] * y[i] * z[i] * (t ? t[i] : 1);
        if (own > top) top = own, place = i;
    }
    return place;
}

/* A most probable assignment of states and free tokens: the messages above with maxima for sums, said of the free tokens and
 * right written, then from the first site on. values: (batch, sites), filled in where free. room: 2 * h + 1. */
double NAME(path_best)(int64_t sites, int64_t batch, int64_t h, int64_t v, const REAL *emit, const REAL *tokens,
                       const REAL *move, const REAL *back, const REAL *latent, int64_t each, int64_t step,
                       const REAL *weight, const uint8_t *free, REAL *said, REAL *right, int64_t *values, REAL *room) {
    REAL *x = room, *y = room + h;
    double least = 1;
    for (int64_t b = 0; b < batch; b++) {
        REAL *r = right + b * sites * h, *m = said + b * sites * h;
        for (int64_t i = 0; i < h; i++) r[(sites - 1) * h + i] = 1;
        for (int64_t s = sites - 1; s >= 0; s--) {
            const REAL *z = latent + b * each + s * step;
            if (free[b * sites + s]) NAME(greatest)(weight + (b * sites + s) * v, tokens, m + s * h, v, h);
            const REAL top = NAME(meet)(z, m + s * h, r + s * h, x, h);
            if (!top) return -1;
            if (!s) {
                least = top < least ? top : least;
                break;
            }
            NAME(greatest)(x, back, y, h, h);
            least = NAME(smallest)(y, h, top, least);
            memcpy(r + (s - 1) * h, y, sizeof(REAL) * h);
        }
        int64_t state = 0;
        for (int64_t s = 0; s < sites; s++) {
            const REAL *z = latent + b * each + s * step;
            state = NAME(best)(z, m + s * h, r + s * h, s ? move + state * h : NULL, h);
            if (!free[b * sites + s]) continue;
            const REAL *w = weight + (b * sites + s) * v, *p = emit + state * v;
            int64_t value = 0;
            for (int64_t i = 1; i < v; i++)
                if (p[i] * w[i] > p[value] * w[value]) value = i;
            values[b * sites + s] = value;
        }
    }
    return least;
}

/* Tokens of a hidden Markov model of h states and v tokens, drawn one after the other (see site_by_site.py): a cursor goes
 * from site `at` to each visit's site in turn, and there draws for the batch elements row[start[k]] .. row[start[k + 1]].
 *
 * emit (v, h), turned (h, v), ahead and behind (h, h) in linear space; evidence (batch, sites, v) in log space; latent,
 * said, left and right (sites, batch, h); uniform and values (sites, batch), uniform in [0, 1).
 *
 * Returns the smallest of the totals that a draw or a move rests on, -1 where one vanished. room: batch * (h + v) + v
 * numbers. */
double NAME(turns)(int64_t visits, const int64_t *site, const int64_t *start, const int64_t *row, int64_t at, int64_t sites,
                   int64_t batch, int64_t h, int64_t v, const REAL *emit, const REAL *turned, const REAL *ahead,
                   const REAL *behind, const REAL *latent, const REAL *evidence, const double *temperature,
                   const double *uniform, REAL *said, REAL *left, REAL *right, int64_t *values, REAL *room) {
    const int64_t width = batch * h;
    REAL *belief = room, *weights = room + width, *own = weights + batch * v;
    double least = 1;
    for (int64_t k = 0; k < visits; k++) {
        while (at != site[k]) {
            const int64_t next = at < site[k] ? at + 1 : at - 1;
            REAL *message = next > at ? left : right;
            for (int64_t b = 0; b < batch; b++) {
                const REAL *x = message + at * width + b * h, *y = said + at * width + b * h;
                REAL *out = room + b * h;
#pragma omp simd
                for (int64_t i = 0; i < h; i++) out[i] = x[i] * y[i];
                const REAL top = NAME(largest)(out, h);
                if (!(top > 0)) return -1;
                least = top < least ? top : least;
                NAME(divide)(out, top, h);
            }
            NAME(rows)(room, next > at ? ahead : behind, message + next * width, batch, h, h);
            at = next;
        }
        const int64_t count = start[k + 1] - start[k];
        for (int64_t r = 0; r < count; r++) {
            const int64_t here = at * width + row[start[k] + r] * h;
#pragma omp simd
            for (int64_t i = 0; i < h; i++) belief[r * h + i] = left[here + i] * right[here + i] * latent[here + i];
        }
        NAME(rows)(belief, turned, weights, count, h, v);
        for (int64_t r = 0; r < count; r++) {
            const int64_t b = row[start[k] + r], here = at * width + b * h;
            REAL *weight = weights + r * v;
            NAME(exponentials)(evidence + (b * sites + at) * v, own, v);
            for (int64_t x = 0; x < v; x++) weight[x] *= own[x];
            const REAL top = NAME(largest)(weight, v);
            if (!(top > 0)) return -1;
            least = top < least ? top : least;
            double total = 0;
            if (*temperature != 1) {
                const REAL factor = 1 / *temperature;
                for (int64_t x = 0; x < v; x++) {
                    if (*temperature > 1 && own[x] > 0 && weight[x] < least) least = weight[x];
                    weight[x] = weight[x] > 0 ? LOGARITHM(weight[x] / top) * factor : 2 * (REAL)LOWEST;
                }
                NAME(powers)(weight, weight, v);
            }
            for (int64_t x = 0; x < v; x++) total += weight[x];
            const double target = uniform[at * batch + b] * total;
            int64_t value = 0;
            double before = 0;
            for (int64_t x = 0; x < v; x++) {
                if (weight[x] == 0) continue;
                value = x, before += weight[x];
                if (before > target) break;
            }
            values[at * batch + b] = value;
            for (int64_t i = 0; i < h; i++) said[here + i] = emit[value * h + i] * latent[here + i];
        }
    }
    return least;
}

#undef VEC
#undef LANES
#undef AT
#undef BITS
#undef PATH
#undef HALF
#undef QUARTER
