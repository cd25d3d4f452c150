/* Sixteen floats at a time, whatever the processor makes of it. */
#pragma once

#include <stdint.h>
#include <string.h>

#define LANES 16

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* bfloat16 is the upper half of a float32. */
static inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

static inline float bf16_to_f32(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline float total(vf v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}
