#include "stats.h"

static unsigned bucket_of(uint64_t value) {
    if (value < 16)
        return (unsigned)value;
    unsigned top = 63u - (unsigned)__builtin_clzll(value);
    unsigned bucket = (top - 3) * 16 + (unsigned)(value >> (top - 4) & 15);
    return bucket < US_BUCKETS ? bucket : US_BUCKETS - 1;
}

static uint64_t upper_edge(unsigned bucket) {
    if (bucket < 16)
        return bucket;
    unsigned top = bucket / 16 + 3;
    return ((16ull + bucket % 16 + 1) << (top - 4)) - 1;
}

void us_histogram_add(struct us_histogram *histogram, uint64_t nanoseconds) {
    atomic_fetch_add_explicit(&histogram->bucket[bucket_of(nanoseconds)], 1, memory_order_relaxed);
    uint64_t max = atomic_load_explicit(&histogram->max, memory_order_relaxed);
    while (nanoseconds > max && !atomic_compare_exchange_weak(&histogram->max, &max, nanoseconds))
        continue;
}

uint64_t us_histogram_count(const struct us_histogram *histogram) {
    uint64_t total = 0;
    for (unsigned i = 0; i < US_BUCKETS; i++)
        total += atomic_load_explicit(&histogram->bucket[i], memory_order_relaxed);
    return total;
}

uint64_t us_histogram_at(const struct us_histogram *histogram, double fraction) {
    uint64_t total = us_histogram_count(histogram), seen = 0, max = atomic_load(&histogram->max);
    if (!total)
        return 0;
    double wanted = fraction * (double)total;
    for (unsigned i = 0; i < US_BUCKETS; i++) {
        seen += atomic_load_explicit(&histogram->bucket[i], memory_order_relaxed);
        if ((double)seen >= wanted && seen)
            return upper_edge(i) < max ? upper_edge(i) : max;
    }
    return max;
}
