/* The bare loop of `userswap bench`: what a fault costs when its server does nothing but read it, decompress the page and
 * install it. One process touches, another one serves, as with userswap; there is no budget, no eviction, no page table.
 * It is the limit that the fault server is compared with, so it issues the same system calls: a read fault is installed
 * write-protected, a page without stored bytes is copied from a page of zeros.
 */
#ifndef USERSWAP_BARE_H
#define USERSWAP_BARE_H

#include <stdint.h>

struct us_bare {
    uint8_t *memory;
    uint64_t pages;
    int32_t uffd;
};

/* Where the server finds the pages. The arrays are read in the server process, so they are made before it forks. */
struct us_bare_source {
    const uint8_t *stored;    /* compressed pages, one after the other; NULL: all pages are zeros */
    const uint64_t *offsets;  /* pages + 1 of them */
    int32_t codec;
};

/* Maps `pages` pages, unreserved, and registers them with a new userfaultfd. */
int us_bare_open(struct us_bare *bare, uint64_t pages);
void us_bare_close(struct us_bare *bare);

/* Serves faults in a process forked after us_bare_open, until that of `parent` ends. Returns -errno. */
int us_bare_serve(const struct us_bare *bare, const struct us_bare_source *source, int32_t parent);

#endif
