/* Writes a block's keys and values into the cache, in place; what falls outside the buffer is dropped.
 *
 * XLA:CPU scatters bfloat16 by way of a float32 copy of the whole buffer, every layer, every step. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "vec.h"

typedef struct {
  const float *block;  /* [b, s, kh, hd] */
  const int32_t *pos;  /* [b] */
  void *cache;         /* [b, kh, c, hd] */
  int64_t b, s, kh, c, hd;
  int bf16;
} Store;

/* Round to nearest, ties to even; a NaN stays one. */
static inline uint16_t f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return (uint16_t)(u >> 16 | 64);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static void store(const Store *a) {
  for (int64_t row = 0; row < a->b; row++)
    for (int64_t i = 0; i < a->s; i++) {
      int64_t slot = a->pos[row] + i;
      if (slot < 0 || slot >= a->c) continue;
      for (int64_t head = 0; head < a->kh; head++) {
        const float *from = a->block + ((row * a->s + i) * a->kh + head) * a->hd;
        int64_t to = ((row * a->kh + head) * a->c + slot) * a->hd;
        if (a->bf16)
          for (int64_t j = 0; j < a->hd; j++) ((uint16_t *)a->cache)[to + j] = f32_to_bf16(from[j]);
        else
          memcpy((float *)a->cache + to, from, sizeof(float) * (size_t)a->hd);
      }
    }
}
