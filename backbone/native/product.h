/* y[m, n] = sum_k x[m, k] * w[n, k] for a few rows of x: the product a decode step is made of.
 *
 * The weights are read once, in order, whatever m is, so a block of drafted tokens costs little more than one.
 * Every y[m, n] is summed in the same order for every m: row i of a block equals the same token run alone, bit for
 * bit. */
#pragma once

#include "pool.h"
#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define WROWS 4  /* rows of w at a time */
#define XROWS 4  /* rows of x at a time: WROWS * XROWS sums stay in registers */

typedef struct {
  const void *w, *x;
  float *y;
  int64_t n, k, m, rows_per_chunk;
  int bf16;
} Product;

static inline __attribute__((always_inline)) void tile_f32(const float *w, const float *x, float *y, int64_t k,
                                                           int64_t ldy, const int wr, const int xr) {
  vf sum[WROWS][XROWS] = {{{0}}};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES)
    for (int r = 0; r < wr; r++) {
      vf a = *(const vf *)(w + r * k + i);
      __builtin_prefetch(w + (r + WROWS) * k + i);
      for (int c = 0; c < xr; c++) sum[r][c] += a * *(const vf *)(x + c * k + i);
    }
  for (int r = 0; r < wr; r++)
    for (int c = 0; c < xr; c++) {
      float s = total(sum[r][c]);
      for (int64_t j = i; j < k; j++) s += w[r * k + j] * x[c * k + j];
      y[c * ldy + r] = s;
    }
}

static inline __attribute__((always_inline)) void tile_bf16(const uint16_t *w, const uint16_t *x, float *y, int64_t k,
                                                            int64_t ldy, const int wr, const int xr) {
  vf sum[WROWS][XROWS] = {{{0}}};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 2 * LANES <= k; i += 2 * LANES)
    for (int r = 0; r < wr; r++) {
      __m512bh a = (__m512bh)_mm512_loadu_si512(w + r * k + i);
      __builtin_prefetch(w + (r + WROWS) * k + i);
      for (int c = 0; c < xr; c++)
        sum[r][c] = (vf)_mm512_dpbf16_ps((__m512)sum[r][c], a, (__m512bh)_mm512_loadu_si512(x + c * k + i));
    }
#else
  for (; i + LANES <= k; i += LANES)
    for (int r = 0; r < wr; r++) {
      vf a = widen(*(const vh *)(w + r * k + i));
      for (int c = 0; c < xr; c++)
        sum[r][c] += a * widen(*(const vh *)(x + c * k + i));
    }
#endif
  for (int r = 0; r < wr; r++)
    for (int c = 0; c < xr; c++) {
      float s = total(sum[r][c]);
      for (int64_t j = i; j < k; j++) s += bf16_to_f32(w[r * k + j]) * bf16_to_f32(x[c * k + j]);
      y[c * ldy + r] = s;
    }
}

#define TILES(NAME, TYPE)                                                                                   \
  static inline __attribute__((always_inline)) void NAME##_rows(const TYPE *w, const Product *job, int64_t row, \
                                                                const int wr) {                             \
    const TYPE *x = job->x;                                                                                 \
    int64_t c = 0;                                                                                          \
    for (; c + XROWS <= job->m; c += XROWS)                                                                 \
      NAME(w, x + c * job->k, job->y + c * job->n + row, job->k, job->n, wr, XROWS);                        \
    const TYPE *rest = x + c * job->k;                                                                      \
    float *y = job->y + c * job->n + row;                                                                   \
    switch (job->m - c) {                                                                                   \
      case 1: NAME(w, rest, y, job->k, job->n, wr, 1); break;                                               \
      case 2: NAME(w, rest, y, job->k, job->n, wr, 2); break;                                               \
      case 3: NAME(w, rest, y, job->k, job->n, wr, 3); break;                                               \
    }                                                                                                       \
  }                                                                                                         \
  static void NAME##_chunk(const Product *job, int64_t first, int64_t last) {                                   \
    const TYPE *w = job->w;                                                                                 \
    int64_t row = first;                                                                                    \
    for (; row + WROWS <= last; row += WROWS) NAME##_rows(w + row * job->k, job, row, WROWS);               \
    for (; row < last; row++) NAME##_rows(w + row * job->k, job, row, 1);                                   \
  }

TILES(tile_f32, float)
TILES(tile_bf16, uint16_t)

static void run_product(const void *args, int64_t chunk) {
  const Product *job = args;
  int64_t first = chunk * job->rows_per_chunk, last = first + job->rows_per_chunk;
  if (last > job->n) last = job->n;
  if (job->bf16) tile_bf16_chunk(job, first, last);
  else tile_f32_chunk(job, first, last);
}

static void product(Product p) {
  int64_t share = p.n / (4 * pool_threads());
  p.rows_per_chunk = share < 16 ? 16 : share / WROWS * WROWS;
  share_out((Work){run_product, &p}, (p.n + p.rows_per_chunk - 1) / p.rows_per_chunk);
}
