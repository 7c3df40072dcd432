/* Counters and latency histograms: relaxed atomics, written by any thread, read without stopping anyone. */
#ifndef US_STATS_H
#define US_STATS_H
#include <stdatomic.h>
#include <stdint.h>

/* log buckets, 16 to an octave: percentiles are off by 6 % at most */
#define US_BUCKETS (40u * 16u)

struct us_histogram {
    _Atomic uint64_t bucket[US_BUCKETS];
    _Atomic uint64_t max;
};

struct us_counters {
    _Atomic uint64_t zero, load, awaited, rescue, protect, spurious, forgotten, parked; /* faults by what became of them */
    _Atomic uint64_t ahead;                                                            /* pages brought by readahead */
    _Atomic uint64_t dropped, moved, refused, put_back, full, over_budget, lost, vanished;
};

static inline void us_count(_Atomic uint64_t *counter, uint64_t n) {
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

void us_histogram_add(struct us_histogram *histogram, uint64_t nanoseconds);
/* The value below which `fraction` of the samples lie, in ns; 0 without samples. */
uint64_t us_histogram_at(const struct us_histogram *histogram, double fraction);
uint64_t us_histogram_count(const struct us_histogram *histogram);
#endif
