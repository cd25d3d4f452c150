/* y[m, n] = sum_k x[m, k] * w[n, k] for a few rows of x: the product a decode step is made of.
 *
 * The weights are read once, in order, whatever m is, so a block of drafted tokens costs little more than one.
 * Every y[m, n] is summed in the same order for every m: row i of a block equals the same token run alone, bit for
 * bit. One row of w at a time: two or four side by side took twice as long, because the prefetcher follows one
 * stream best. */
#pragma once

#include "pool.h"
#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define XROWS 8    /* rows of x at a time: their sums stay in registers */
#define AHEAD 4096 /* bytes of w prefetched ahead */

typedef struct {
  const void *w, *x;
  float *y;
  int64_t n, k, m, rows_per_chunk;
  int bf16;
} Product;

static inline __attribute__((always_inline)) void dot_f32(const float *w, const float *x, float *y, int64_t k,
                                                          int64_t ldy, const int rows) {
  vf sum[XROWS] = {{0}};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    vf a = *(const vf *)(w + i);
    __builtin_prefetch((const char *)(w + i) + AHEAD);
    for (int c = 0; c < rows; c++) sum[c] += a * *(const vf *)(x + c * k + i);
  }
  for (int c = 0; c < rows; c++) {
    float s = total(sum[c]);
    for (int64_t j = i; j < k; j++) s += w[j] * x[c * k + j];
    y[c * ldy] = s;
  }
}

static inline __attribute__((always_inline)) void dot_bf16(const uint16_t *w, const uint16_t *x, float *y, int64_t k,
                                                           int64_t ldy, const int rows) {
  vf sum[XROWS] = {{0}};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 2 * LANES <= k; i += 2 * LANES) {
    __m512bh a = (__m512bh)_mm512_loadu_si512(w + i);
    __builtin_prefetch((const char *)(w + i) + AHEAD);
    for (int c = 0; c < rows; c++)
      sum[c] = (vf)_mm512_dpbf16_ps((__m512)sum[c], a, (__m512bh)_mm512_loadu_si512(x + c * k + i));
  }
#else
  for (; i + LANES <= k; i += LANES) {
    vf a = widen(*(const vh *)(w + i));
    __builtin_prefetch((const char *)(w + i) + AHEAD);
    for (int c = 0; c < rows; c++) sum[c] += a * widen(*(const vh *)(x + c * k + i));
  }
#endif
  for (int c = 0; c < rows; c++) {
    float s = total(sum[c]);
    for (int64_t j = i; j < k; j++) s += bf16_to_f32(w[j]) * bf16_to_f32(x[c * k + j]);
    y[c * ldy] = s;
  }
}

/* All rows of x against rows first..last-1 of w; the constant row counts let the compiler unroll. */
#define CHUNK(NAME, TYPE)                                                            \
  static void NAME##_chunk(const Product *p, int64_t first, int64_t last) {          \
    for (int64_t n = first; n < last; n++) {                                         \
      const TYPE *w = (const TYPE *)p->w + n * p->k, *x = p->x;                      \
      float *y = p->y + n;                                                           \
      int64_t left = p->m;                                                           \
      for (; left >= XROWS; left -= XROWS, x += XROWS * p->k, y += XROWS * p->n)     \
        NAME(w, x, y, p->k, p->n, XROWS);                                            \
      switch (left) {                                                                \
        case 1: NAME(w, x, y, p->k, p->n, 1); break;                                 \
        case 2: NAME(w, x, y, p->k, p->n, 2); break;                                 \
        case 3: NAME(w, x, y, p->k, p->n, 3); break;                                 \
        case 4: NAME(w, x, y, p->k, p->n, 4); break;                                 \
        case 5: NAME(w, x, y, p->k, p->n, 5); break;                                 \
        case 6: NAME(w, x, y, p->k, p->n, 6); break;                                 \
        case 7: NAME(w, x, y, p->k, p->n, 7); break;                                 \
      }                                                                              \
    }                                                                                \
  }

CHUNK(dot_f32, float)
CHUNK(dot_bf16, uint16_t)

static void run_product(const void *args, int64_t chunk) {
  const Product *p = args;
  int64_t first = chunk * p->rows_per_chunk, last = first + p->rows_per_chunk;
  if (last > p->n) last = p->n;
  if (p->bf16) dot_bf16_chunk(p, first, last);
  else dot_f32_chunk(p, first, last);
}

static void product(Product p) {
  int64_t share = p.n / (4 * pool_threads());
  p.rows_per_chunk = share < 16 ? 16 : share;
  share_out((Work){run_product, &p}, (p.n + p.rows_per_chunk - 1) / p.rows_per_chunk);
}
