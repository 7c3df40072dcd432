/* Discard: pages of a range become ZERO, whatever they were; their generation is bumped, so that nothing older returns. */
#define _GNU_SOURCE
#include "pager.h"
#include "uffd.h"

#define DONE UINT32_MAX

static uint32_t generation_of(uint64_t word) { return (uint32_t)((word & US_GENERATION_MASK) >> US_GENERATION_SHIFT); }

/* A resident page: to be dropped in place by the agent.  Its copy, if it has one, goes now; its entry in the queue stays, and is
 * found stale there.  `mark` remembers the generation, plus one. */
static void drop_resident(struct us_region *region, struct us_batch *batch, uint32_t index, uint64_t seen, uint32_t *mark) {
    uint64_t copy = us_handle_of(seen), next = us_with_handle(us_with_state(us_next_generation(seen), US_DROPPING), 0);
    bool poisoned = us_state_of(seen) == US_POISONED;
    if (!us_word_swap(us_word_at(region, index), &seen, next))
        return;
    if (poisoned)
        us_reserve(region, 1, true); /* its room was given back; the end of the drop does so again */
    us_drop_copy(region, copy, true);
    *mark = generation_of(next) + 1;
    batch->index[batch->pages++] = index;
}

/* What is only in the store, or on its way from an awaited store: ZERO at once. */
static bool forget_stored(struct us_region *region, uint32_t index, uint64_t seen) {
    uint64_t handle = us_handle_of(seen), next = us_with_handle(us_with_state(us_next_generation(seen), US_ZERO), 0);
    if (!us_word_swap(us_word_at(region, index), &seen, next & ~US_WAITER))
        return false;
    if (us_state_of(seen) == US_STORED)
        us_drop_copy(region, handle, false);
    /* who asked for the fill has set no WAITER: the fill, had it come, would have woken */
    us_wake_page(region, index, us_state_of(seen) == US_FILLING ? seen | US_WAITER : seen);
    return true;
}

/* True when the page has been ZERO since the discard began; false: it is on its way there, or passing through a state that ends
 * by itself. */
static bool discard_page(struct us_region *region, struct us_batch *batch, uint32_t index, uint32_t *mark) {
    uint64_t seen = atomic_load(us_word_at(region, index));
    /* The generation is still the one that the drop gave it (a refusal counts on): it was dropped, what came since is younger. */
    if (*mark && *mark == generation_of(seen) + 1)
        return us_state_of(seen) != US_DROPPING;
    switch (us_state_of(seen)) {
    case US_ZERO:
        return true;
    case US_STORED:
        return forget_stored(region, index, seen);
    case US_FILLING: /* from an awaited store, which may take long; a fill from memory ends in microseconds */
        return !region->pool && us_handle_of(seen) && forget_stored(region, index, seen);
    case US_CLEAN:
    case US_DIRTY:
    case US_PROTECTED:
    case US_POISONED:
        if (batch && !(seen & US_BUSY))
            drop_resident(region, batch, index, seen, mark);
        return false;
    default:
        return false;
    }
}

static void post(struct us_batch *batch) {
    if (!batch->pages) {
        us_batch_free(batch);
        return;
    }
    atomic_fetch_add(&batch->region->leaving, (int64_t)batch->pages * US_PAGE);
    us_order_post(batch->region->client, batch, US_ORDER_DISCARD);
}

/* One pass over a range.  `mark` has a zeroed entry for each page, kept from pass to pass.  Returns how many pages have not been
 * ZERO yet: call again, a little later, until none is left.  -ECANCELED: the region is being closed. */
int64_t us_region_discard(struct us_region *region, uint64_t first, uint64_t count, uint32_t *mark) {
    struct us_client *client = region->client;
    struct us_batch *batch = NULL;
    int64_t left = 0;
    uint64_t end = first + count;
    if (end > region->pages)
        return -EINVAL;
    if (atomic_load(&region->closing))
        return -ECANCELED;
    for (uint64_t i = us_extent_from(&region->extent, first); i < end; i = us_extent_next(&region->extent, i)) {
        uint32_t *its = &mark[i - first];
        if (*its == DONE)
            continue;
        if (!batch && !atomic_load(&client->agent_late))
            batch = us_batch_take(client, region, US_BATCH_DISCARD);
        if (discard_page(region, batch, (uint32_t)i, its))
            *its = DONE;
        else
            left++;
        if (batch && batch->pages == US_BATCH_PAGES) {
            post(batch);
            batch = NULL;
        }
    }
    if (batch)
        post(batch);
    us_kick_worker(client); /* it reaps the orders */
    return left;
}

/* For an awaited store, after the range is ZERO: mark the pages (64 at most) whose store copy may now be discarded.  BUSY keeps
 * them from being written to the store until us_discard_end. */
uint64_t us_discard_begin(struct us_region *region, uint64_t first, uint32_t count) {
    uint64_t marked = 0;
    for (uint32_t i = 0; i < count && i < 64 && first + i < region->pages; i++) {
        us_word *word = us_word_peek(region, first + i); /* without a leaf: never written, the store has nothing */
        uint64_t seen = word ? atomic_load(word) : US_BUSY;
        if (us_state_of(seen) == US_ZERO && !(seen & US_BUSY) && us_word_swap(word, &seen, seen | US_BUSY))
            marked |= 1ull << i;
    }
    return marked;
}

/* The first page at or after `first` that may be anything else than ZERO. */
uint64_t us_region_next(const struct us_region *region, uint64_t first) { return us_extent_from(&region->extent, first); }

void us_discard_end(struct us_region *region, uint64_t first, uint64_t pages) {
    for (uint32_t i = 0; i < 64; i++)
        if (pages >> i & 1)
            us_word_clear(us_word_at(region, first + i), US_BUSY);
}
