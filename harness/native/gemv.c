/* y = W x for a row-major W [rows, cols], split over threads by rows: the least work a decode step can do
 * per weight byte, so its time is the floor under a token. No synchronisation between rows, no activation,
 * no cache: what a model adds to this is the model's own.
 *
 * Each thread reads one linear stream (rows side by side were slower: the hardware prefetcher follows one stream
 * best), two sums at a time, so that the latency of an addition does not bound it. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define LANES 16
#define CHAINS 2
#define AHEAD 4096
#define MAX_THREADS 256

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

typedef struct {
  const char *weights;
  const float *x;
  float *y;
  int64_t first, last, cols;
  int bytes_per_weight;
} Job;

static vf load_f32(const char *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* bfloat16 is the upper half of a float32. */
static vf load_bf16(const char *p) {
  vh h;
  memcpy(&h, p, sizeof h);
  vu wide = __builtin_convertvector(h, vu) << 16;
  vf v;
  memcpy(&v, &wide, sizeof v);
  return v;
}

#define GEMV(NAME, SIZE, LOAD)                                              \
  static void NAME(const Job *job) {                                        \
    const char *w = job->weights + job->first * job->cols * SIZE;           \
    for (int64_t r = job->first; r < job->last; r++) {                      \
      vf sum[CHAINS] = {{0}};                                               \
      for (int64_t c = 0; c < job->cols; c += CHAINS * LANES)               \
        for (int i = 0; i < CHAINS; i++, w += LANES * SIZE) {               \
          __builtin_prefetch(w + AHEAD);                                    \
          sum[i] += LOAD(w) * load_f32((const char *)(job->x + c + i * LANES)); \
        }                                                                   \
      float total = 0;                                                      \
      for (int i = 0; i < CHAINS; i++)                                      \
        for (int lane = 0; lane < LANES; lane++) total += sum[i][lane];     \
      job->y[r] = total;                                                    \
    }                                                                       \
  }

GEMV(gemv_f32, 4, load_f32)
GEMV(gemv_bf16, 2, load_bf16)

static void *run(void *arg) {
  const Job *job = arg;
  if (job->bytes_per_weight == 4) gemv_f32(job);
  else gemv_bf16(job);
  return 0;
}

/* Seconds of one pass, or a negative number: -1 bad shape, -2 no thread.
 * cols must be a multiple of 32; bytes_per_weight is 4 (float32) or 2 (bfloat16). */
double headway_gemv(const void *weights, const float *x, float *y, int64_t rows, int64_t cols,
                    int bytes_per_weight, int threads) {
  if (rows < 0 || cols % (CHAINS * LANES) || threads < 1 || threads > MAX_THREADS ||
      (bytes_per_weight != 4 && bytes_per_weight != 2))
    return -1;
  pthread_t ids[MAX_THREADS];
  Job jobs[MAX_THREADS];
  struct timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  int started = 1, failed = 0;
  for (int t = 0; t < threads; t++) {
    Job job = {weights, x, y, rows * t / threads, rows * (t + 1) / threads, cols, bytes_per_weight};
    jobs[t] = job;
  }
  for (; started < threads && !failed; started += !failed)
    failed = pthread_create(&ids[started], 0, run, &jobs[started]) != 0;
  run(&jobs[0]);
  for (int t = 1; t < started; t++) pthread_join(ids[t], 0);
  clock_gettime(CLOCK_MONOTONIC, &end);
  if (failed) return -2;
  return (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
}
