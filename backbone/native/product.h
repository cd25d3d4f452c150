/* y[m, n] = sum_k x[m, k] * w[n, k] for a few rows of x: the product a decode step is made of.
 *
 * The weights are read once, in order, whatever m is, so a block of drafted tokens costs little more than one.
 * Every y[m, n] is summed in the same order for every m: row i of a block equals the same token run alone, bit for
 * bit. The next pair of rows is prefetched in address order while this pair is used: two rows read side by side
 * without it took twice as long, because the hardware follows one stream best (docs/performance.md). */
#pragma once

#include "pool.h"
#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define LINE 64  /* bytes of a cache line */
#define WROWS 2  /* rows of w at a time */
#define XROWS 8  /* rows of x at a time: WROWS * XROWS sums stay in registers */

typedef struct {
  const void *w, *x;
  float *y;
  int64_t n, k, m, rows_per_chunk;
  int bf16;
} Product;

/* `next`: where the following rows of w begin, fetched line by line in order; or null. */
static inline __attribute__((always_inline)) void tile_f32(const float *w, const float *x, float *y, int64_t k,
                                                           int64_t ldy, const char *next, const int wr, const int xr) {
  vf sum[WROWS][XROWS] = {{{0}}};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    vf a[WROWS];
    for (int r = 0; r < wr; r++) {
      if (next) __builtin_prefetch(next + (i / LANES * wr + r) * LINE);
      a[r] = *(const vf *)(w + r * k + i);
    }
    _Pragma("GCC unroll 8") for (int c = 0; c < xr; c++) {
      vf b = *(const vf *)(x + c * k + i);
      for (int r = 0; r < wr; r++) sum[r][c] += a[r] * b;
    }
  }
  _Pragma("GCC unroll 2") for (int r = 0; r < wr; r++)
    _Pragma("GCC unroll 8") for (int c = 0; c < xr; c++) {
      float s = total(sum[r][c]);
      for (int64_t j = i; j < k; j++) s += w[r * k + j] * x[c * k + j];
      y[c * ldy + r] = s;
    }
}

#if defined(__AVX512BF16__)
#define BSTEP (2 * LANES)
typedef __m512bh bv;
static inline bv load_bv(const uint16_t *p) { return (bv)_mm512_loadu_si512(p); }
static inline vf mul_add(vf sum, bv a, bv b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
#define BSTEP LANES
typedef vf bv;
static inline bv load_bv(const uint16_t *p) { return widen(*(const vh *)p); }
static inline vf mul_add(vf sum, bv a, bv b) { return sum + a * b; }
#endif

static inline __attribute__((always_inline)) void tile_bf16(const uint16_t *w, const uint16_t *x, float *y, int64_t k,
                                                            int64_t ldy, const char *next, const int wr, const int xr) {
  vf sum[WROWS][XROWS] = {{{0}}};
  int64_t i = 0;
  for (; i + BSTEP <= k; i += BSTEP) {
    bv a[WROWS];
    for (int r = 0; r < wr; r++) {
      if (next) __builtin_prefetch(next + (i * wr * 2 + r * BSTEP * 2));
      a[r] = load_bv(w + r * k + i);
    }
    _Pragma("GCC unroll 8") for (int c = 0; c < xr; c++) {
      bv b = load_bv(x + c * k + i);
      for (int r = 0; r < wr; r++) sum[r][c] = mul_add(sum[r][c], a[r], b);
    }
  }
  _Pragma("GCC unroll 2") for (int r = 0; r < wr; r++)
    _Pragma("GCC unroll 8") for (int c = 0; c < xr; c++) {
      float s = total(sum[r][c]);
      for (int64_t j = i; j < k; j++) s += bf16_to_f32(w[r * k + j]) * bf16_to_f32(x[c * k + j]);
      y[c * ldy + r] = s;
    }
}

/* All rows of x against `wr` rows of w; the constant row counts let the compiler unroll. */
#define TILES(NAME, TYPE)                                                                                           \
  static inline __attribute__((always_inline)) void NAME##s(const Product *p, int64_t n, const char *next,          \
                                                            const int wr) {                                         \
    const TYPE *w = (const TYPE *)p->w + n * p->k, *x = p->x;                                                       \
    float *y = p->y + n;                                                                                            \
    int64_t left = p->m;                                                                                            \
    for (; left >= XROWS; left -= XROWS, x += XROWS * p->k, y += XROWS * p->n, next = 0)                            \
      NAME(w, x, y, p->k, p->n, next, wr, XROWS);                                                                   \
    switch (left) {                                                                                                 \
      case 1: NAME(w, x, y, p->k, p->n, next, wr, 1); break;                                                        \
      case 2: NAME(w, x, y, p->k, p->n, next, wr, 2); break;                                                        \
      case 3: NAME(w, x, y, p->k, p->n, next, wr, 3); break;                                                        \
      case 4: NAME(w, x, y, p->k, p->n, next, wr, 4); break;                                                        \
      case 5: NAME(w, x, y, p->k, p->n, next, wr, 5); break;                                                        \
      case 6: NAME(w, x, y, p->k, p->n, next, wr, 6); break;                                                        \
      case 7: NAME(w, x, y, p->k, p->n, next, wr, 7); break;                                                        \
    }                                                                                                               \
  }                                                                                                                 \
  static void NAME##_chunk(const Product *p, int64_t first, int64_t last) {                                         \
    int64_t n = first;                                                                                              \
    for (; n + WROWS <= last; n += WROWS) NAME##s(p, n, (const char *)((const TYPE *)p->w + (n + WROWS) * p->k), WROWS); \
    for (; n < last; n++) NAME##s(p, n, 0, 1);                                                                      \
  }

TILES(tile_f32, float)
TILES(tile_bf16, uint16_t)

static void run_product(const void *args, int64_t chunk) {
  const Product *p = args;
  int64_t first = chunk * p->rows_per_chunk, last = first + p->rows_per_chunk;
  if (last > p->n) last = p->n;
  if (p->bf16) tile_bf16_chunk(p, first, last);
  else tile_f32_chunk(p, first, last);
}

static void product(Product p) {
  int64_t share = p.n / (4 * pool_threads());
  p.rows_per_chunk = share < 16 ? 16 : share / WROWS * WROWS;
  share_out((Work){run_product, &p}, (p.n + p.rows_per_chunk - 1) / p.rows_per_chunk);
}
