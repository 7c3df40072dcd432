/* The touching program of `userswap bench`: the same compiled loop runs over memory paged by userswap, over memory
 * under the kernel's swap and over the bare loop, so that a difference between them is the pager's and not the program's.
 *
 * Page p holds sample page (hash of p) with a stamp {version, mark, p} in its first and in its last 16 bytes. A read checks
 * both stamps and 16 bytes between them against the sample; US_TOUCH_CHECK compares all 4096. The versions are kept
 * outside of the memory under test, so a page that comes back one write too old is seen.
 *
 * Latencies are counted in log buckets of 1/32 octave: one clock_gettime() between any two accesses
 * (us_touch_clock_cost() says what it costs), so an access includes the loop's own bookkeeping and no time is lost.
 */
#ifndef USERSWAP_TOUCH_H
#define USERSWAP_TOUCH_H

#include <stdint.h>

#define US_TOUCH_BUCKETS 1216
#define US_TOUCH_SUB_BITS 5
#define US_TOUCH_MAX_THREADS 64

enum us_touch_operation {
    US_TOUCH_FILL = 0,   /* write the whole page, version 0 */
    US_TOUCH_READ = 1,   /* verify */
    US_TOUCH_UPDATE = 2, /* verify, then write a new version: the first access is a load */
    US_TOUCH_WRITE = 3,  /* write a new version, then verify the rest: the first access is a store */
    US_TOUCH_ZERO = 4,   /* verify that the page reads as zeros */
    US_TOUCH_CHECK = 5,  /* compare every byte */
};

struct us_touch_plan {
    uint8_t *memory;
    const uint8_t *sample;
    const uint32_t *order;   /* thread t takes the t-th of `threads` equal parts */
    uint32_t *versions;      /* one per page; NULL: every page is of version 0 and nothing writes */
    uint64_t sample_pages;
    uint64_t count;          /* accesses, all threads together */
    uint32_t operation;
    uint32_t threads;
    int32_t cpus[US_TOUCH_MAX_THREADS]; /* CPU of each thread, -1 = the scheduler's choice */
};

struct us_touch_result {
    uint64_t elapsed_ns;
    uint64_t user_ns;
    uint64_t system_ns;
    uint64_t accesses;
    uint64_t bad;
    uint64_t first_bad_page;  /* valid where bad > 0 */
    uint64_t major_faults;
    uint64_t minor_faults;
    uint64_t latency_max_ns;
    uint64_t histogram[US_TOUCH_BUCKETS];
};

int us_touch_run(const struct us_touch_plan *plan, struct us_touch_result *result);

/* What page `page` holds at `version`; `out` has 4096 bytes. */
void us_touch_page(const uint8_t *sample, uint64_t sample_pages, uint64_t page, uint32_t version, uint8_t *out);

/* Lowest latency in nanoseconds that falls into a bucket. */
uint64_t us_touch_bucket_floor(uint32_t bucket);

/* Picoseconds that one reading of the clock costs here. */
uint64_t us_touch_clock_cost(void);

#endif
