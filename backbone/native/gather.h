/* Products with some rows of a matrix w [nb, bn, k]: blocks of bn rows, named by ids, of which `active` count.
 *
 * rows_in:  y[m, i * bn + r] = sum_k x[m, k] w[ids[i], r, k], with the very sums of product.h; 0 where i >= active.
 * rows_out: y[m, k] = sum_{i < active, r} h[m, i * bn + r] w[ids[i], r, k], rows in order, whatever m is.
 * Only the rows that are named are read, and each of them once. */
#pragma once

#include "product.h"

typedef struct {
  Product p;            /* n: rows named; k, m, x, y as there; h in the place of x */
  const int32_t *ids;
  int64_t nb, bn, active, per_chunk;
} Gather;

static inline int64_t gathered_block(const Gather *g, int64_t i) {
  int64_t id = g->ids[i];
  return (id < 0 ? 0 : id >= g->nb ? g->nb - 1 : id) * g->bn * g->p.k;
}

static void run_rows_in(const void *args, int64_t chunk) {
  const Gather *g = args;
  int64_t first = chunk * g->per_chunk, last = first + g->per_chunk;
  if (last > g->active) last = g->active;
  for (int64_t i = first; i < last; i++) {
    Product block = g->p;
    block.w = (const char *)g->p.w + gathered_block(g, i) * (g->p.bf16 ? 2 : 4);
    block.y = g->p.y + i * g->bn;
    if (g->p.bf16) tile_bf16_chunk(&block, 0, g->bn);
    else tile_f32_chunk(&block, 0, g->bn);
  }
}

static void rows_in(Gather g) {
  for (int64_t c = 0; c < g.p.m; c++)
    memset(g.p.y + c * g.p.n + g.active * g.bn, 0, sizeof(float) * (size_t)(g.p.n - g.active * g.bn));
  int64_t share = g.active / (4 * pool_threads()), least = (16 + g.bn - 1) / g.bn;
  g.per_chunk = share < least ? least : share;
  share_out((Work){run_rows_in, &g}, (g.active + g.per_chunk - 1) / g.per_chunk);
}

#define DEEP 4 /* rows of w added to y at a time: y is loaded and stored once for them */

/* y[first..last) += h0 w0 + h1 w1 + ..., `deep` rows of w. */
#define ADD_ROWS(NAME, TYPE, WIDE, NARROW)                                                                          \
  static inline __attribute__((always_inline)) void NAME(const TYPE *const *w, const float *h, float *y,            \
                                                         int64_t first, int64_t last, const int deep) {             \
    int64_t e = first;                                                                                              \
    for (; e + LANES <= last; e += LANES) {                                                                         \
      vf sum = *(vf *)(y + e);                                                                                      \
      for (int r = 0; r < deep; r++) sum += h[r] * WIDE(w[r] + e);                                                  \
      *(vf *)(y + e) = sum;                                                                                         \
    }                                                                                                               \
    for (; e < last; e++)                                                                                           \
      for (int r = 0; r < deep; r++) y[e] += h[r] * NARROW(w[r][e]);                                                \
  }                                                                                                                 \
  static void NAME##_chunk(const Gather *g, int64_t first, int64_t last) {                                          \
    int64_t rows = g->active * g->bn, left;                                                                         \
    for (int64_t c = 0; c < g->p.m; c++)                                                                            \
      memset(g->p.y + c * g->p.k + first, 0, sizeof(float) * (size_t)(last - first));                               \
    for (int64_t i = 0; i < rows; i += DEEP) {                                                                      \
      const TYPE *w[DEEP];                                                                                          \
      left = rows - i < DEEP ? rows - i : DEEP;                                                                     \
      for (int64_t r = 0; r < left; r++)                                                                            \
        w[r] = (const TYPE *)g->p.w + gathered_block(g, (i + r) / g->bn) + (i + r) % g->bn * g->p.k;                \
      for (int64_t c = 0; c < g->p.m; c++) {                                                                        \
        const float *h = (const float *)g->p.x + c * g->p.n + i;                                                    \
        float *y = g->p.y + c * g->p.k;                                                                             \
        if (left == DEEP) NAME(w, h, y, first, last, DEEP);                                                         \
        else                                                                                                        \
          for (int64_t r = 0; r < left; r++) NAME(w + r, h + r, y, first, last, 1);                                 \
      }                                                                                                             \
    }                                                                                                               \
  }

static inline vf wide_f32(const float *p) { return *(const vf *)p; }
static inline vf wide_bf16(const uint16_t *p) { return widen(*(const vh *)p); }
static inline float narrow_f32(float f) { return f; }
ADD_ROWS(add_f32, float, wide_f32, narrow_f32)
ADD_ROWS(add_bf16, uint16_t, wide_bf16, bf16_to_f32)

static void run_rows_out(const void *args, int64_t chunk) {
  const Gather *g = args;
  int64_t first = chunk * g->per_chunk, last = first + g->per_chunk;
  if (last > g->p.k) last = g->p.k;
  if (g->p.bf16) add_bf16_chunk(g, first, last);
  else add_f32_chunk(g, first, last);
}

/* The threads share the columns, not the rows: nothing has to be added up across them. */
static void rows_out(Gather g) {
  int64_t share = g.p.k / pool_threads() / LANES * LANES;
  g.per_chunk = share < 128 ? 128 : share;
  share_out((Work){run_rows_out, &g}, (g.p.k + g.per_chunk - 1) / g.per_chunk);
}
