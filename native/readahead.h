/* Prefetch policies: pure, told of demand faults, answering with pages to read ahead.
 *
 * A policy does no I/O, keeps no clock and never sees a page's state: the engine clips its answer to the region, stops at pages
 * that are resident, and takes room for them as for any other page.
 */
#ifndef US_READAHEAD_H
#define US_READAHEAD_H
#include <stddef.h>
#include <stdint.h>

struct us_ahead {
    int64_t stride; /* pages between the pages to read, counted from the faulting one; 0: nothing */
    uint32_t count;
};

/* What a policy is: a name, the size of its state, and two functions on that state, which starts zeroed. */
struct us_prefetch {
    const char *name;
    size_t state_bytes;
    void (*init)(void *state);
    struct us_ahead (*fault)(void *state, int64_t page);
};

/* NULL: no policy of that name. */
const struct us_prefetch *us_prefetch_find(const char *name);
/* The n-th policy's name; NULL after the last. */
const char *us_prefetch_name(uint32_t n);

/* For tests and tools: a policy by itself. */
void *us_prefetch_new(const struct us_prefetch *policy);
struct us_ahead us_prefetch_fault(const struct us_prefetch *policy, void *state, int64_t page);
void us_prefetch_free(void *state);
#endif
