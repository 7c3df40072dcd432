/* Regions: the interval map from addresses to page words, each region's budget and its queue of resident pages. */
#define _GNU_SOURCE
#include "pager.h"
#include "protect.h"
#include "uffd.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define QUEUE_FIRST 1024u

/* The caller holds map_lock, for reading at least. */
struct us_region *us_region_find(struct us_client *client, uint64_t address) {
    uint32_t low = 0, high = client->regions;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (client->region[middle]->start <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return NULL;
    struct us_region *region = client->region[low - 1];
    return address < us_address(region, region->pages) ? region : NULL;
}

/* Eviction starts `gap` below the limit, so that a fault seldom has to wait for room. */
static int64_t gap_of(int64_t limit) {
    int64_t gap = limit / 128, least = limit / 16, most = 8 * (int64_t)US_BATCH_PAGES * US_PAGE;
    int64_t batches = 2 * (int64_t)US_BATCH_PAGES * US_PAGE;
    if (gap < batches)
        gap = batches < least ? batches : least;
    return gap < most ? gap : most;
}

void us_region_limit(struct us_region *region, uint64_t limit) {
    atomic_store(&region->limit, (int64_t)limit);
    atomic_store(&region->high, (int64_t)limit - gap_of((int64_t)limit));
    atomic_store(&region->retry_ns, 0);
    us_kick_worker(region->client);
    us_release(region, 0);
}

/* Take room for pages about to be installed.  Fails at the limit: then the caller parks the fault. */
bool us_reserve(struct us_region *region, uint32_t pages, bool force) {
    int64_t bytes = (int64_t)pages * US_PAGE;
    int64_t after = atomic_fetch_add(&region->charged, bytes) + bytes;
    if (after > atomic_load(&region->high))
        us_kick_worker(region->client);
    if (after <= atomic_load(&region->limit))
        return true;
    bool yields = (region->grow && atomic_load(&region->full)) || atomic_load(&region->refused) ||
                  atomic_load(&region->client->agent_late) || atomic_load(&region->client->quiet) ||
                  atomic_load(&region->closing); /* no eviction: nothing would ever make room */
    if (force || yields) {
        us_count(&region->count.over_budget, pages);
        return true;
    }
    atomic_fetch_sub(&region->charged, bytes);
    return false;
}

/* Room for a page that nobody waits for: never over the budget, and never while a fault is parked for want of it. */
bool us_reserve_ahead(struct us_region *region) {
    if (atomic_load(&region->parked) || atomic_load(&region->charged) + US_PAGE > atomic_load(&region->limit))
        return false;
    return us_reserve(region, 1, false);
}

/* Give room back; faults that were parked for want of it are woken and come again. */
void us_release(struct us_region *region, int64_t bytes) {
    int64_t before = atomic_fetch_sub(&region->charged, bytes);
#ifdef US_DEBUG
    if (before < bytes) { /* what is given back was taken before: else the budget would not hold any more */
        fprintf(stderr, "userswap: a region of %lld bytes gives back %lld\n", (long long)before, (long long)bytes);
        abort();
    }
#endif
    (void)before;
    if (atomic_load(&region->parked) && atomic_exchange(&region->parked, 0))
        us_uffd_wake(region->client->uffd, region->start, region->pages << US_PAGE_SHIFT);
}

/* The worker gets memory for the next nodes meanwhile. */
us_word *us_word_make(struct us_region *region, uint64_t index) {
    us_word *word = us_extent_make(&region->extent, index);
    if (us_extent_is_low(&region->extent) && !atomic_exchange(&region->client->table_low, true))
        us_kick_worker(region->client);
    return word;
}

static bool queue_grow(struct us_queue *queue) {
    uint64_t size = queue->size ? queue->size * 2 : QUEUE_FIRST;
    uint32_t *entry = mmap(NULL, size * sizeof *entry, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (entry == MAP_FAILED)
        return false;
    for (uint64_t i = queue->tail; i != queue->head; i++)
        entry[i & (size - 1)] = queue->entry[i & (queue->size - 1)];
    if (queue->entry)
        munmap(queue->entry, queue->size * sizeof *entry);
    queue->entry = entry;
    queue->size = size;
    return true;
}

/* Give a page its entry in the queue, unless it has one. */
void us_queue_push(struct us_region *region, uint32_t index) {
    if (atomic_fetch_or(us_word_at(region, index), US_QUEUED) & US_QUEUED)
        return;
    struct us_queue *queue = &region->queue;
    pthread_mutex_lock(&queue->lock);
    if (queue->head - queue->tail < queue->size || queue_grow(queue))
        queue->entry[queue->head++ & (queue->size - 1)] = index;
    else
        us_word_clear(us_word_at(region, index), US_QUEUED); /* no memory for the queue: the page stays until it is touched again */
    pthread_mutex_unlock(&queue->lock);
}

/* Oldest first.  The pages keep QUEUED until the caller has decided their fate. */
uint32_t us_queue_pop(struct us_region *region, uint32_t *index, uint32_t most) {
    struct us_queue *queue = &region->queue;
    uint32_t n = 0;
    pthread_mutex_lock(&queue->lock);
    while (n < most && queue->tail != queue->head)
        index[n++] = queue->entry[queue->tail++ & (queue->size - 1)];
    pthread_mutex_unlock(&queue->lock);
    return n;
}

/* `old_word` is the word as it was when a passing state ended. */
void us_wake_page(struct us_region *region, uint32_t index, uint64_t old_word) {
    if ((old_word & US_WAITER) && !us_canary_on(region->client, US_CANARY_NO_WAKE))
        us_uffd_wake(region->client->uffd, us_address(region, index), US_PAGE);
}

/* A page's compressed copy is of no use any more. */
void us_drop_copy(struct us_region *region, uint64_t handle, bool was_kept) {
    if (!region->pool || !handle)
        return;
    int64_t cost = was_kept ? (int64_t)us_pool_cost(region->pool, handle) : 0;
    us_pool_free(region->pool, handle);
    if (cost) {
        atomic_fetch_sub(&region->kept, cost);
        us_release(region, cost);
    }
}

static void free_region(struct us_region *region) {
    us_extent_close(&region->extent);
    if (region->queue.entry)
        munmap(region->queue.entry, region->queue.size * sizeof *region->queue.entry);
    pthread_mutex_destroy(&region->queue.lock);
    us_protect_free(region);
    us_prefetch_free(region->prefetch_state);
    free(region);
}

int us_region_open(struct us_client *client, uint64_t start, uint64_t pages, uint64_t base, uint64_t limit, struct us_pool *pool,
                   int grow, const struct us_prefetch *prefetch, struct us_region **out) {
    if (!pages || pages > UINT32_MAX || (start & (US_PAGE - 1)))
        return -EINVAL;
    struct us_region *region = calloc(1, sizeof *region);
    if (!region)
        return -ENOMEM;
    int rc = us_extent_open(&region->extent, &client->table, base, pages);
    if (rc) {
        free(region);
        return rc;
    }
    region->client = client;
    region->start = start;
    region->pages = pages;
    region->pool = pool;
    region->grow = grow != 0;
    region->prefetch = prefetch;
    region->prefetch_state = us_prefetch_new(prefetch);
    pthread_mutex_init(&region->queue.lock, NULL);
    pthread_mutex_init(&region->waiting.lock, NULL);
    us_region_limit(region, limit);
    pthread_rwlock_wrlock(&client->map_lock);
    rc = region->prefetch_state ? 0 : -ENOMEM;
    for (uint32_t i = 0; i < client->regions && rc == 0; i++) {
        const struct us_region *other = client->region[i];
        if (start < us_address(other, other->pages) && other->start < start + (pages << US_PAGE_SHIFT))
            rc = -EEXIST;
    }
    if (rc == 0 && client->regions == client->regions_room) {
        uint32_t room = client->regions_room ? client->regions_room * 2 : 16;
        struct us_region **grown = realloc(client->region, room * sizeof *grown);
        if (grown) {
            client->region = grown;
            client->regions_room = room;
        } else {
            rc = -ENOMEM;
        }
    }
    if (rc == 0) {
        uint32_t at = client->regions++;
        for (; at > 0 && client->region[at - 1]->start > start; at--)
            client->region[at] = client->region[at - 1];
        client->region[at] = region;
    }
    pthread_rwlock_unlock(&client->map_lock);
    if (rc)
        free_region(region);
    else
        *out = region;
    return rc;
}

/* Stop eviction; 0 once nothing of the region is with the agent or the store any more, else -EAGAIN: ask again. */
int us_region_quiesce(struct us_region *region) {
    if (!atomic_exchange(&region->closing, true))
        us_release(region, 0);
    return atomic_load(&region->users) ? -EAGAIN : 0;
}

void us_region_resume(struct us_region *region) {
    atomic_store(&region->closing, false);
    us_kick_worker(region->client);
}

static void forget_pages(struct us_region *region) {
    const struct us_extent *extent = &region->extent;
    for (uint64_t i = us_extent_from(extent, 0); region->pool && i < region->pages; i = us_extent_next(extent, i)) {
        uint64_t word = atomic_exchange(us_word_at(region, i), 0);
        enum us_state state = us_state_of(word);
        bool holds = state == US_STORED || state == US_CLEAN || state == US_DROPPING || state == US_UNPROTECTING || state == US_FILLING;
        if (holds && us_handle_of(word))
            us_pool_free(region->pool, us_handle_of(word));
    }
}

/* After quiesce: no fault finds the region any more.  `unmapped`: the client's memory is gone already, its address may be
 * another region's by now. */
void us_region_detach(struct us_region *region, int unmapped) {
    struct us_client *client = region->client;
    pthread_rwlock_wrlock(&client->map_lock);
    uint32_t at = 0;
    while (at < client->regions && client->region[at] != region)
        at++;
    if (at < client->regions) {
        client->regions--;
        memmove(&client->region[at], &client->region[at + 1], (client->regions - at) * sizeof *client->region);
    }
    pthread_rwlock_unlock(&client->map_lock);
    if (!unmapped)
        us_uffd_unregister(client->uffd, region->start, region->pages << US_PAGE_SHIFT);
    else /* who slept on it faults again, and finds no memory */
        us_uffd_wake(client->uffd, region->start, region->pages << US_PAGE_SHIFT);
}

/* After us_region_detach, once every fill has ended and every batch is free. */
int us_region_free(struct us_region *region) {
    if (atomic_load(&region->users))
        return -EBUSY;
    forget_pages(region);
    free_region(region);
    return 0;
}

/* A region whose store hangs must not end up with every batch: of the last ones a region gets no more than a step needs. */
bool us_region_has_share(const struct us_region *region) {
    const struct us_client *client = region->client;
    uint32_t mine = 0, left = US_BATCHES;
    for (uint32_t i = 0; i < US_BATCHES; i++) {
        if (atomic_load(&client->batch[i].state) == US_BATCH_FREE)
            continue;
        left--;
        mine += client->batch[i].region == region;
    }
    return left > US_BATCHES_SPARE || mine < US_BATCHES_STEP || client->regions == 1;
}
