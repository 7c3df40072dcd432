/* Prefetch policies: pure, told of demand faults, answering with a run of pages to read ahead.
 *
 * A policy does no I/O, keeps no clock and never sees a page's state: the engine clips the run to the region, stops it
 * at pages that are resident, and takes room for it like for any other page.
 */
#ifndef US_READAHEAD_H
#define US_READAHEAD_H
#include <stdbool.h>
#include <stdint.h>

struct us_ahead {
    int64_t stride; /* pages between the pages to read, after the faulting one; 0: nothing */
    uint32_t count;
};

#define US_STREAMS 16u
#define US_RECENT 64u /* a power of two */
#define US_WINDOW_FIRST 4u
#define US_WINDOW_MAX 31u

/* Multi-stream readahead without hit information (stream buffers, Jouppi 1990; Palacharla and Kessler 1994): a demand fault at the
 * edge of a window proves that the window was used, so hits need not be seen. */
struct us_stream {
    int64_t next, stride;
    uint32_t window, used; /* used: for LRU */
};

struct us_streams {
    struct us_stream stream[US_STREAMS];
    int64_t recent[US_RECENT]; /* faults of no stream */
    uint32_t recent_count, clock;
};

void us_streams_init(struct us_streams *streams);
struct us_ahead us_streams_fault(struct us_streams *streams, int64_t page);
#endif
