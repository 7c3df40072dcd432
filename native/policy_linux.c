/* linux: the readahead of Linux' swap-in by virtual addresses (swapin_nr_pages in mm/swap_state.c), as a baseline.
 *
 * The kernel counts hits on the pages it read.  Here few hits are seen, and a fault at the window's edge stands for all of them,
 * as in DiLOS: without that rule its windows never grow.
 */
#include "readahead.h"

#define WINDOW_MAX 8   /* 1 << page-cluster, the faulting page with it */
#define SPAN 512       /* what one page of the kernel's page table covers: readahead does not leave it */

struct swap_ahead {
    int64_t previous; /* the latest page known to be touched */
    int64_t window, hits;
    struct us_ahead_run before;
};

static void linux_init(void *state) { ((struct swap_ahead *)state)->previous = INT64_MIN / 2; }

static int64_t next_window(const struct swap_ahead *ahead, int64_t page) {
    int64_t window = ahead->hits + 2;
    if (window == 2) {
        if (page != ahead->previous + 1 && page != ahead->previous - 1)
            window = 1;
    } else {
        int64_t rounded = 4;
        while (rounded < window)
            rounded *= 2;
        window = rounded;
    }
    if (window > WINDOW_MAX)
        window = WINDOW_MAX;
    return window > ahead->window / 2 ? window : ahead->window / 2; /* shrinks slowly */
}

static struct us_ahead linux_fault(void *state, int64_t page) {
    struct swap_ahead *ahead = state;
    int64_t distance = page - ahead->previous;
    if (!ahead->hits && ahead->window > 1 && (distance == ahead->window || distance == -ahead->window)) {
        ahead->hits = ahead->window - 1;
        distance = distance > 0 ? 1 : -1;
        ahead->previous = page - distance;
    }
    int64_t window = next_window(ahead, page), before = (window - 1) / 2;
    if (distance == 1)
        before = 0;
    else if (distance == -1)
        before = window - 1;
    int64_t after = window - 1 - before, offset = page & (SPAN - 1);
    if (before > offset)
        before = offset;
    if (after > SPAN - 1 - offset)
        after = SPAN - 1 - offset;
    ahead->previous = page;
    ahead->window = window;
    ahead->hits = 0;
    ahead->before = (struct us_ahead_run){page - before, (uint32_t)before};
    return (struct us_ahead){after ? 1 : 0, (uint32_t)after, before != 0};
}

static const struct us_ahead_run *linux_runs(const void *state) { return &((const struct swap_ahead *)state)->before; }

static void linux_used(void *state, int64_t page) {
    struct swap_ahead *ahead = state;
    ahead->previous = page;
    ahead->hits++;
}

const struct us_prefetch us_prefetch_linux = {
    .name = "linux",
    .state_bytes = sizeof(struct swap_ahead),
    .init = linux_init,
    .fault = linux_fault,
    .runs = linux_runs,
    .used = linux_used,
};
