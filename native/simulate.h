/* The simulator: a trace of touches against an eviction and a prefetch policy, the same objects that the pager runs.
 *
 * One page at a time and one program thread.  What the policies see is what they would see in a pager: faults, and touches of pages
 * in the tail; the setting can show them more.  Time is what waits take, and `touch_ns` a touch.
 */
#ifndef US_SIMULATE_H
#define US_SIMULATE_H
#include "eviction.h"
#include "readahead.h"

struct us_simulate_setting {
    const struct us_eviction *eviction;
    const struct us_prefetch *prefetch;
    struct us_eviction_setting evict;
    bool stored;     /* all pages are in the store from the beginning; else a page's first touch finds zeros and reads nothing */
    bool used_seen;  /* the prefetch policy is told which of its pages are touched */
    uint64_t store_ns, fault_ns, touch_ns; /* a read of the store; a fault beside it; what the program does between two touches */
};

/* The program says that a phase begins: before the touch with this number. */
struct us_simulate_phase {
    uint64_t before;
    int64_t name;
};

struct us_simulate_result {
    uint64_t touches;
    uint64_t misses; /* touches that had to wait for a whole read, or for a page of zeros */
    uint64_t zeros;  /* of those, pages of zeros */
    uint64_t rescued; /* touches in the tail */
    uint64_t ahead, used, late, wasted; /* pages read ahead: all; touched; touched before they had come; sent out untouched */
    uint64_t stall_ns;
};

/* 0 or -ENOMEM. */
int us_simulate(const struct us_simulate_setting *setting, const uint32_t *touch, uint64_t touches, const struct us_simulate_phase *phase,
                uint64_t phases, struct us_simulate_result *result);

/* Belady's optimum, which knows the future: the fewest misses that any eviction policy can have without reading ahead. */
int us_simulate_best(const uint32_t *touch, uint64_t touches, uint64_t pages, uint32_t capacity, uint64_t *misses);

/* For each touch the number of the next one of the same page, or `touches`; how many different pages there are, or -ENOMEM. */
int64_t us_simulate_next(const uint32_t *touch, uint64_t touches, uint64_t pages, uint64_t *next);
#endif
