/* A pool of threads for products of microseconds. XLA's thread calls `share_out`; workers of our own take chunks of
 * the work. They spin for a moment after each piece of work, because the next one of the same decode step follows
 * within microseconds, then sleep. */
#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define SPIN_NS 100000
#define MAX_THREADS 64

/* `run` does chunk number 0..chunks-1 of what `args` describes; args outlives the call. */
typedef struct {
  void (*run)(const void *args, int64_t chunk);
  const void *args;
} Work;

/* `ticket` is generation << 32 | chunks left to take: taking one is a compare-and-swap that fails if the product
 * has changed meanwhile, so `current` is only ever used by those who hold a chunk of it. */
static Work current;
static _Atomic uint64_t ticket;
static _Atomic int64_t chunks_done;
static _Atomic int sleepers;
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int workers = -1;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int take_and_run(void) {
  uint64_t seen = atomic_load_explicit(&ticket, memory_order_acquire);
  if ((uint32_t)seen == 0) return 0;
  Work mine = current;
  if (!atomic_compare_exchange_strong(&ticket, &seen, seen - 1)) return 1;
  mine.run(mine.args, (int64_t)(uint32_t)seen - 1);
  atomic_fetch_add(&chunks_done, 1);
  return 1;
}

static void *work(void *arg) {
  (void)arg;
  for (;;) {
    int64_t until = now_ns() + SPIN_NS;
    for (int i = 0;; i++) {
      if (take_and_run()) {
        until = now_ns() + SPIN_NS;
        continue;
      }
      relax();
      if ((i & 63) == 0 && now_ns() > until) break;
    }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleepers, 1);
    while ((uint32_t)atomic_load(&ticket) == 0) pthread_cond_wait(&wake, &sleep_lock);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
  }
  return 0;
}

static void start_workers(void) {
  const char *wish = getenv("HEADWAY_THREADS");
  int threads = wish ? atoi(wish) : 0;
  if (threads < 1) {
    cpu_set_t set;
    threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  }
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  workers = 0;
  for (int i = 1; i < threads; i++) {
    pthread_t id;
    if (pthread_create(&id, 0, work, 0)) break;
    pthread_detach(id);
    workers++;
  }
}

/* A forked child has none of the parent's workers and perhaps a lock one of them held. */
static void after_fork(void) {
  workers = -1;
  pthread_mutex_init(&busy, 0);
  pthread_mutex_init(&sleep_lock, 0);
  pthread_cond_init(&wake, 0);
  atomic_store(&sleepers, 0);
}

__attribute__((constructor)) static void init(void) { pthread_atfork(0, 0, after_fork); }

static int pool_threads(void) {
  pthread_mutex_lock(&sleep_lock);
  if (workers < 0) start_workers();
  pthread_mutex_unlock(&sleep_lock);
  return workers + 1;
}

static void share_out(Work work, int64_t chunks) {
  if (chunks == 1 || pthread_mutex_trylock(&busy)) { /* nothing to share, or the workers are taken: do it here */
    for (int64_t i = 0; i < chunks; i++) work.run(work.args, i);
    return;
  }
  current = work;
  atomic_store(&chunks_done, 0);
  uint64_t generation = (atomic_load(&ticket) >> 32) + 1;
  atomic_store(&ticket, generation << 32 | (uint64_t)chunks);
  if (atomic_load(&sleepers) > 0) {
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleep_lock);
  }
  while (take_and_run()) {
  }
  for (int i = 0; atomic_load(&chunks_done) < chunks; i++) {
    relax();
    if ((i & 1023) == 1023) sched_yield();
  }
  pthread_mutex_unlock(&busy);
}
