/* Compressed RAM: pages go in, handles come out.
 *
 * A handle is 36 bits: 0 is none; with US_HANDLE_SAME it is the page itself, one 32-bit pattern over and over, and costs
 * nothing; otherwise it is a place in the pool's memfd.  Every object knows the `slot` of its one reference, so that
 * us_pool_compact can move it: it copies the object and asks the owner to swap the reference.
 *
 * Invariants:
 *  1. Who holds a handle makes its reference unrelocatable first (by changing the word that `relocate` compares), then reads,
 *     then frees.  A get between the two never sees the object move.
 *  2. relocate swaps only a word that still says `from`, with at least release order, and never calls the pool.
 *  3. The memory held never exceeds the limit; a put beyond it fails and changes nothing.
 *
 * All functions are safe from any thread.  Nothing here knows regions, page states or faults.
 */
#ifndef US_POOL_H
#define US_POOL_H
#include "codec.h"
#include "slots.h"
#include <stdint.h>

#define US_HANDLE_SAME US_HANDLE_LIMIT

struct us_pool;

struct us_pool_stats {
    uint64_t objects;       /* without the same-filled */
    uint64_t same_filled;
    uint64_t whole_pages;   /* objects kept uncompressed */
    uint64_t payload_bytes; /* what the objects' contents come to */
    uint64_t object_bytes;  /* with headers and rounding to size classes */
    uint64_t file_bytes;    /* memory held, as the kernel counts it */
    uint64_t limit_bytes;   /* 0: none */
    uint64_t compactions;   /* calls that moved something */
    uint64_t moved;         /* objects moved by them */
    uint32_t codec;
    uint32_t locked;        /* 1: the kernel will not swap the pool out */
};

/* Make a pool; `shuffle` as for us_pack: 0, -EINVAL (codec, shuffle), -ENOPKG (its library is not open), or what making the memfd failed with. */
int us_pool_create(struct us_pool **out, int codec, int level, int shuffle, uint64_t limit_bytes);
void us_pool_destroy(struct us_pool *pool);
void us_pool_set_owner(struct us_pool *pool, us_relocate_fn *relocate, void *owner);
int us_pool_fd(const struct us_pool *pool);

/* Keep a copy of one page for the reference at `slot` (47 bits): 0, -ENOSPC (limit), -ENOMEM.  At the limit it first moves
 * other objects together: relocate must need no lock that the caller holds. */
int us_pool_put(struct us_pool *pool, const void *page, uint64_t slot, uint64_t *handle);

/* Write the page that a handle stands for: 0, -EILSEQ (not a handle of this pool, or what it names is damaged), -ENOMEM. */
int us_pool_get(struct us_pool *pool, uint64_t handle, void *page);

void us_pool_free(struct us_pool *pool, uint64_t handle);

/* Bytes that the object occupies, the same at every call; 0 for none and for same-filled pages. */
uint32_t us_pool_cost(struct us_pool *pool, uint64_t handle);

/* 1 when so much memory is held beyond the objects' that us_pool_compact is worth its copying: cheap, asks no lock. */
int us_pool_wants_compaction(const struct us_pool *pool);

/* Move up to `max_moves` objects out of sparse blocks and return emptied memory: the number moved, 0 when nothing is worth
 * moving. */
int us_pool_compact(struct us_pool *pool, unsigned max_moves);

/* Memory held, by the pool's own count: cheap. */
uint64_t us_pool_held(const struct us_pool *pool);
void us_pool_stats(struct us_pool *pool, struct us_pool_stats *stats);
#endif
