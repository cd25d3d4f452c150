/* Attention of a few queries over a key/value cache: one pass per query over the slots it may read.
 *
 * A query's result depends on its own row of the mask alone and is summed in slot order: the same bits whether it
 * comes alone or in a block. Slots behind the last readable one are never touched. */
#pragma once

#include <math.h>

#include "pool.h"
#include "vec.h"

#define MAX_HEAD_DIM 256
#define MAX_CHUNKS (MAX_HEAD_DIM / LANES)

typedef struct {
  const float *q;       /* [b, s, h, hd] */
  const void *k, *v;    /* [b, kh, c, hd] */
  const uint8_t *mask;  /* [b, s, c] */
  float *y;             /* [b, s, h, hd] */
  float *scores;        /* [chunks, c] */
  int64_t b, s, h, kh, c, hd;
  int bf16;
} Attention;

/* e^x for x <= 0, to about 2 units in the last place; 0 below -87. */
static inline vf exp_vf(vf x) {
  const vf low = (vf){0} - 87.0f;
  vi alive = x > low;
  x = (vf)(((vi)x & alive) | ((vi)low & ~alive));
  vf t = x * 1.44269504088896341f - 0.5f; /* x <= 0: truncation of t is rounding to nearest */
  vi n = __builtin_convertvector(t, vi);
  vf f = __builtin_convertvector(n, vf);
  vf r = x - f * 0.693359375f + f * 2.12194440e-4f;
  vf p = (vf){0} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf scaled = (vf)((vi)p + (n << 23));
  return (vf)((vi)scaled & alive);
}

static inline __attribute__((always_inline)) vf load_kv(const void *base, int64_t at, const int bf16) {
  return bf16 ? widen(*(const vh *)((const uint16_t *)base + at)) : *(const vf *)((const float *)base + at);
}

static inline __attribute__((always_inline)) void attend_query(const Attention *a, const float *q, int64_t cache,
                                                               const uint8_t *mask, int64_t live, float *p, float *y,
                                                               const int64_t hd, const int bf16) {
  const int n = (int)(hd / LANES);
  float scale = 1.0f / sqrtf((float)hd), top = -INFINITY;
  vf x[MAX_CHUNKS], sum[MAX_CHUNKS];
  for (int i = 0; i < n; i++) x[i] = *(const vf *)(q + i * LANES), sum[i] = (vf){0};
  for (int64_t c = 0; c < live; c++) {
    if (!mask[c]) {
      p[c] = -INFINITY;
      continue;
    }
    vf dot = (vf){0};
    for (int i = 0; i < n; i++) dot += x[i] * load_kv(a->k, cache + c * hd + i * LANES, bf16);
    p[c] = total(dot) * scale;
    if (p[c] > top) top = p[c];
  }
  float mass = 0;
  int64_t c = 0;
  for (; c + LANES <= live; c += LANES) {
    vf e = exp_vf(*(vf *)(p + c) - top);
    *(vf *)(p + c) = e;
    mass += total(e);
  }
  if (c < live) {
    vf rest = (vf){0} - INFINITY;
    memcpy(&rest, p + c, 4 * (size_t)(live - c));
    rest = exp_vf(rest - top);
    memcpy(p + c, &rest, 4 * (size_t)(live - c));
    mass += total(rest);
  }
  for (c = 0; c < live; c++) {
    if (!mask[c]) continue;
    for (int i = 0; i < n; i++) sum[i] += p[c] * load_kv(a->v, cache + c * hd + i * LANES, bf16);
  }
  float norm = mass > 0 ? 1.0f / mass : NAN; /* a query that may read nothing has no answer */
  for (int i = 0; i < n; i++) *(vf *)(y + i * LANES) = sum[i] * norm;
}

/* Chunk: one row, one position, one key/value head with its group of query heads. */
static void run_attention(const void *args, int64_t chunk) {
  const Attention *a = args;
  int64_t head = chunk % a->kh, pos = chunk / a->kh % a->s, row = chunk / a->kh / a->s, group = a->h / a->kh;
  const uint8_t *mask = a->mask + (row * a->s + pos) * a->c;
  int64_t live = a->c, cache = (row * a->kh + head) * a->c * a->hd;
  while (live > 0 && !mask[live - 1]) live--;
  for (int64_t g = 0; g < group; g++) {
    int64_t at = ((row * a->s + pos) * a->h + head * group + g) * a->hd;
    float *p = a->scores + chunk * a->c;
    if (a->hd == 64 && a->bf16) attend_query(a, a->q + at, cache, mask, live, p, a->y + at, 64, 1);
    else if (a->hd == 64) attend_query(a, a->q + at, cache, mask, live, p, a->y + at, 64, 0);
    else if (a->bf16) attend_query(a, a->q + at, cache, mask, live, p, a->y + at, a->hd, 1);
    else attend_query(a, a->q + at, cache, mask, live, p, a->y + at, a->hd, 0);
  }
}

/* 0, or -1 where there is no memory for the scores. */
static int attention(Attention a) {
  int64_t chunks = a.b * a.s * a.kh;
  float stack[4096];
  int64_t need = chunks * a.c;
  a.scores = need <= 4096 ? stack : malloc(sizeof(float) * (size_t)need);
  if (!a.scores) return -1;
  pool_threads();
  share_out((Work){run_attention, &a}, chunks);
  if (a.scores != stack) free(a.scores);
  return 0;
}
