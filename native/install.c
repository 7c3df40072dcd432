/* Installing pages: from zeros, from the pool, from what the asyncio loop has read. */
#define _GNU_SOURCE
#include "pager.h"
#include "uffd.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define WRITE_SOON 128u   /* of 256: above this, pages read in are installed writable at once */
#define KEEP_BYTES_MAX 2048 /* a larger copy costs more residency than its making again is worth */
#define SAMPLE_EVERY 64u  /* of those, one in so many stays protected, to see whether that is still right */

/* A page-aligned buffer of US_RUN_MAX pages for this thread. */
uint8_t *us_run_buffer(void) {
    static _Thread_local uint8_t *buffer;
    if (!buffer) {
        void *got = mmap(NULL, US_RUN_MAX * US_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (got == MAP_FAILED)
            abort();
        buffer = got;
    }
    return buffer;
}

/* US_RUN_MAX pages of zeros. */
const uint8_t *us_zero_page(void) {
    static const uint8_t zeros[(US_RUN_MAX + 1) * US_PAGE];
    uintptr_t aligned = ((uintptr_t)zeros + US_PAGE - 1) & ~(uintptr_t)(US_PAGE - 1);
    return (const uint8_t *)aligned;
}

/* BUSY in FILLING is the fill's own only where a ticket stands in the handle; else a write or a discard of the store. */
static uint64_t own_busy(const struct us_region *region, uint64_t word) {
    return !region->pool && us_handle_of(word) ? US_BUSY : 0;
}

/* End FILLING for a page that is installed. */
static void filled(struct us_region *region, uint32_t index, bool writable, bool keep) {
    us_word *word = us_word_at(region, index);
    uint64_t seen = atomic_load(word); /* FILLING: the handle is ours */
    uint64_t copy = region->pool ? us_handle_of(seen) : 0;
    int64_t cost = copy ? (int64_t)us_pool_cost(region->pool, copy) : 0;
    bool kept = !writable && copy && (cost == 0 || (keep && cost <= KEEP_BYTES_MAX));
    if (kept) {
        atomic_fetch_add(&region->charged, cost);
        atomic_fetch_add(&region->kept, cost);
    }
    us_queue_push(region, index);
    enum us_state to = writable ? US_DIRTY : US_CLEAN;
    uint64_t old = us_word_leave(word, US_FILLING, to, kept ? copy : 0, own_busy(region, seen), 0);
    us_wake_page(region, index, old);
    if (copy && !kept)
        us_pool_free(region->pool, copy);
}

/* End FILLING for a page that could not be installed: it is what it was. */
static void unfilled(struct us_region *region, uint32_t index) {
    us_word *word = us_word_at(region, index);
    uint64_t seen = atomic_load(word), handle = us_handle_of(seen);
    enum us_state to = handle ? US_STORED : US_ZERO; /* what is neither in a pool nor awaited is zeros */
    uint64_t old = us_word_leave(word, US_FILLING, to, region->pool ? handle : 0, own_busy(region, seen), 0);
    us_wake_page(region, index, old | US_WAITER);
    us_release(region, US_PAGE);
}

/* Install a run whose words are FILLING and ours.  Each page ends resident or as it was; all waiters are woken.
 * Returns 0 or the errno that stopped it. */
int us_install(struct us_region *region, uint32_t first, uint32_t count, const uint8_t *data, bool writable, bool keep) {
    struct us_client *client = region->client;
    uint64_t mode = writable ? 0 : US_COPY_WP;
    uint32_t page = 0, most = count;
    int error = 0;
    while (page < count) {
        uint64_t done;
        uint32_t run = count - page < most ? count - page : most;
        int rc = us_uffd_copy(client->uffd, us_address(region, first + page), data + (uint64_t)page * US_PAGE,
                              (uint64_t)run * US_PAGE, mode, &done);
        for (uint64_t i = 0; i < done / US_PAGE; i++)
            filled(region, first + page + (uint32_t)i, writable, keep);
        page += (uint32_t)(done / US_PAGE);
        if (rc == 0)
            continue;
        if (rc == -ENOENT && run > 1) { /* the program split the mapping (mlock, mprotect): no copy crosses the seam */
            most = 1;
            continue;
        }
        if (rc == -EAGAIN && done)
            continue; /* the next call tells the page's own errno */
        if (rc == -EEXIST) { /* memory that was there before the region was: it is the page, and it may have been written */
            us_count(&region->count.vanished, 1);
            filled(region, first + page, true, false);
            us_uffd_wake(client->uffd, us_address(region, first + page), US_PAGE);
            page++;
            continue;
        }
        if (rc == -ESRCH)
            atomic_store(&client->gone, true);
        error = rc;
        for (; page < count; page++)
            unfilled(region, first + page);
    }
    return error;
}

/* Install a page whose only copies are in a batch: FILLING, charged.  On an error (ENOMEM: the client's memory cgroup is at its
 * limit for the moment) the word is still FILLING and the caller's. */
int us_install_rescued(struct us_region *region, uint32_t index, const uint8_t *data) {
    struct us_client *client = region->client;
    uint64_t done;
    int rc = us_uffd_copy(client->uffd, us_address(region, index), data, US_PAGE, 0, &done);
    if (rc && rc != -EEXIST && rc != -ESRCH && rc != -ENOENT)
        return rc;
    filled(region, index, true, false);
    us_uffd_wake(client->uffd, us_address(region, index), US_PAGE);
    return 0;
}

/* Will this page be written soon after it was read?  Learned from pages that are installed protected. */
static bool write_expected(struct us_region *region) {
    if (atomic_load_explicit(&region->upgrade, memory_order_relaxed) < WRITE_SOON)
        return false;
    return ++region->sample % SAMPLE_EVERY != 0;
}

/* Take pages after the first into the run, as long as they are of its kind and there is room. */
static uint32_t widen(struct us_region *region, uint32_t first, uint32_t ahead, enum us_state kind) {
    uint32_t count = 1;
    if (ahead > US_RUN_MAX - 1)
        ahead = US_RUN_MAX - 1;
    while (count <= ahead && first + count < region->pages) {
        us_word *word = us_word_at(region, first + count);
        uint64_t seen = atomic_load(word);
        if (us_state_of(seen) != kind || (seen & US_BUSY))
            break;
        if (!us_reserve_ahead(region))
            break;
        if (!us_word_swap(word, &seen, us_with_state(seen, US_FILLING) | US_AHEAD)) {
            us_release(region, US_PAGE);
            break;
        }
        count++;
    }
    us_count(&region->count.ahead, count - 1);
    return count;
}

static bool fetch(struct us_region *region, uint32_t first, uint32_t count, uint8_t *buffer) {
    for (uint32_t i = 0; i < count; i++) {
        uint64_t handle = us_handle_of(atomic_load(us_word_at(region, first + i)));
        if (us_pool_get(region->pool, handle, buffer + (uint64_t)i * US_PAGE))
            return false;
    }
    return true;
}

/* A page of the pool that does not decompress is lost: that page alone. */
static void poison(struct us_region *region, uint32_t index) {
    struct us_client *client = region->client;
    us_count(&region->count.lost, 1);
    us_release(region, US_PAGE);
    if (!(client->features & US_FEATURE_POISON)) {
        us_client_say(client, "a page was lost and this kernel cannot poison it (Linux 6.6 can): the thread waits", 1);
        return; /* FILLING for ever: blocked, never zeros */
    }
    us_uffd_poison(client->uffd, us_address(region, index), US_PAGE);
    uint64_t old = us_word_leave(us_word_at(region, index), US_FILLING, US_POISONED, 0, US_BUSY, 0);
    us_wake_page(region, index, old | US_WAITER);
    if (region->pool)
        us_pool_free(region->pool, us_handle_of(old));
}

/* Answer a fault on a ZERO page, or on a STORED page of a pool, from memory.  `word` is the word just seen.  False: the word has
 * changed, look again. */
bool us_fill_native(struct us_region *region, uint32_t first, uint64_t word, uint32_t ahead, bool write, bool keep) {
    enum us_state kind = us_state_of(word);
    if (!us_word_swap(us_word_at(region, first), &word, us_with_state(word & ~US_AHEAD, US_FILLING))) {
        us_release(region, US_PAGE);
        return false;
    }
    uint32_t count = ahead ? widen(region, first, ahead, kind) : 1;
    if (kind == US_ZERO) {
        us_count(&region->count.zero, 1);
        us_install(region, first, count, us_zero_page(), true, false);
        return true;
    }
    us_count(&region->count.load, 1);
    uint8_t *buffer = us_run_buffer();
    bool writable = write || write_expected(region);
    if (fetch(region, first, count, buffer)) {
        us_install(region, first, count, buffer, writable, keep);
        return true;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t index = first + i;
        if (fetch(region, index, 1, buffer))
            us_install(region, index, 1, buffer, writable, keep);
        else
            poison(region, index);
    }
    return true;
}

/* Whether a page still waits for this fill. */
static bool carries(uint64_t word, uint64_t ticket) { return us_state_of(word) == US_FILLING && us_handle_of(word) == ticket; }

/* A run from an awaited store has arrived.  Pages whose word no longer carries the ticket were discarded meanwhile: nothing is
 * installed there, their bits in `void_pages` are set and the caller ends their BUSY after the store's discard. */
int us_fill_done(struct us_region *region, const struct us_miss *miss, const uint8_t *data, uint64_t *void_pages) {
    bool writable = miss->write || write_expected(region);
    int error = 0;
    *void_pages = 0;
    for (uint32_t i = 0; i < miss->count;) {
        uint32_t n = 0;
        for (; i + n < miss->count; n++) {
            uint64_t seen = atomic_load(us_word_at(region, miss->first + i + n));
            if (!carries(seen, miss->ticket) && !us_canary_on(region->client, US_CANARY_FILL_AFTER_DISCARD))
                break;
        }
        if (n) {
            int rc = us_install(region, miss->first + i, n, data + (uint64_t)i * US_PAGE, writable, false);
            error = error ? error : rc;
            i += n;
        } else {
            *void_pages |= 1ull << i++;
            us_release(region, US_PAGE);
        }
    }
    us_histogram_add(&region->awaited, us_now() - miss->time_ns);
    atomic_fetch_add(&region->client->channel->progress, 1);
    return error;
}

/* End a fill that never began, by one swap: the asyncio loop may discard the page at any moment.  False: it has. */
static bool put_back(struct us_region *region, uint32_t index, uint64_t ticket) {
    us_word *word = us_word_at(region, index);
    uint64_t seen = atomic_load(word);
    while (carries(seen, ticket)) {
        uint64_t next = us_with_handle(us_with_state(seen, US_STORED), 0) & ~(US_BUSY | US_WAITER);
        if (us_word_swap(word, &seen, next)) {
            us_wake_page(region, index, seen | US_WAITER);
            return true;
        }
    }
    return false;
}

/* The store could not give these pages: poison them (on the loop alone, as its discards are), or put them back so that the fault
 * comes again.  Returns the bits of pages that were discarded meanwhile, as us_fill_done does. */
uint64_t us_fill_failed(struct us_region *region, const struct us_miss *miss, int lost) {
    uint64_t void_pages = 0;
    for (uint32_t i = 0; i < miss->count; i++) {
        uint32_t index = miss->first + i;
        if (lost && carries(atomic_load(us_word_at(region, index)), miss->ticket)) {
            poison(region, index);
            continue;
        }
        if (lost || !put_back(region, index, miss->ticket))
            void_pages |= 1ull << i;
        us_release(region, US_PAGE);
    }
    return void_pages;
}
