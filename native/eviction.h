/* Eviction policies: pure, told which pages came in, naming which should go.
 *
 * A policy does no I/O, keeps no clock and never sees a page's state.  It holds the queue: a page is in it from `insert` until
 * `victim` names it, and must not be inserted in between.  A victim that cannot go is inserted again; one that is no longer
 * there (the program discarded it) is left aside by the caller.  The caller locks.
 */
#ifndef US_EVICTION_H
#define US_EVICTION_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct us_eviction_setting {
    uint64_t pages;    /* of the region: a page is below this */
    uint32_t capacity; /* pages that it may keep */
    uint32_t tail;     /* of 256: the share at each queue's end that is taken out of the program's sight while still in memory */
    uint32_t least;    /* pages that a new page outlives at the least, if there are as many */
    bool hits_seen;    /* `touch` tells all touches, not only those in the tail: for comparison with caches that see them */
    uint64_t seed;
};

struct us_eviction {
    const char *name;
    void *(*open)(const struct us_eviction_setting *setting); /* NULL: no memory */
    void (*close)(void *state);
    void (*resize)(void *state, uint32_t capacity, uint32_t tail);
    bool (*insert)(void *state, uint32_t page, bool ahead); /* ahead: nobody has touched it yet.  False: no memory, nothing changed */
    void (*touch)(void *state, uint32_t page); /* a touch that was seen: the page was in the tail, and is rescued */
    bool (*stage)(void *state, uint32_t *page); /* the next page to take out of sight; false: the tail is long enough */
    bool (*victim)(void *state, uint32_t *page);
};

/* The policies; the first is the default.  NULL: none of that name, or after the last. */
const struct us_eviction *us_eviction_find(const char *name);
const char *us_eviction_name(uint32_t n);

extern const struct us_eviction us_eviction_s3g, us_eviction_bip, us_eviction_auto;

/* A policy by itself: for tests and tools. */
void *us_eviction_open(const struct us_eviction *policy, const struct us_eviction_setting *setting);
void us_eviction_close(const struct us_eviction *policy, void *state);
void us_eviction_resize(const struct us_eviction *policy, void *state, uint32_t capacity, uint32_t tail);
bool us_eviction_insert(const struct us_eviction *policy, void *state, uint32_t page, bool ahead);
void us_eviction_touch(const struct us_eviction *policy, void *state, uint32_t page);
bool us_eviction_stage(const struct us_eviction *policy, void *state, uint32_t *page);
bool us_eviction_victim(const struct us_eviction *policy, void *state, uint32_t *page);

/* --- what the policies share */

/* Pages in the order that they came, with a mark between those in sight and the tail. */
struct us_ring {
    uint32_t *entry;
    uint64_t out, staged, in; /* [out, staged) is the tail; `size` is a power of two */
    uint64_t size;
};
bool us_ring_push(struct us_ring *ring, uint32_t page);
uint32_t us_ring_pop(struct us_ring *ring);
void us_ring_free(struct us_ring *ring);
/* The next page for a tail of `share` of 256, but not one that `touches` counts touches of: it will not go. */
bool us_ring_stage(struct us_ring *ring, uint32_t share, const uint8_t *touches, uint32_t *page);
static inline uint64_t us_ring_count(const struct us_ring *ring) { return ring->in - ring->out; }

static inline uint64_t us_mix(uint64_t x) { /* the finalizer of splitmix64 */
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static inline uint64_t us_random(uint64_t *state) { return us_mix(*state += 0x9e3779b97f4a7c15u); }
#endif
