/* Pages that left lately: a set of the last so many, whose memory is bounded.
 *
 * A page that comes back while it is here was sent out too early.  Entries say with which departure their page left; what left too
 * long ago counts no more.  Buckets of one cache line; a full bucket loses its oldest entry.
 */
#ifndef US_GHOST_H
#define US_GHOST_H
#include <stdbool.h>
#include <stdint.h>

#define US_GHOST_BUCKET 8u

struct us_ghost_entry {
    uint32_t page;
    uint32_t number; /* of the departure; 0: free */
};

struct us_ghost {
    struct us_ghost_entry *entry;
    uint32_t buckets; /* a power of two */
    uint32_t reach;   /* departures that count */
    uint32_t number;
};

/* Also to make it larger or smaller.  False: no memory, and it is as it was. */
bool us_ghost_size(struct us_ghost *ghost, uint32_t reach);
void us_ghost_add(struct us_ghost *ghost, uint32_t page);
/* Whether it is there; then it is not any more. */
bool us_ghost_take(struct us_ghost *ghost, uint32_t page);
void us_ghost_free(struct us_ghost *ghost);
#endif
