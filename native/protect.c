/* The mover `protect`: how pages that were written leave on kernels without UFFDIO_MOVE (Linux 5.7 to 6.7).
 *
 * A page is write-protected and waits in place, PROTECTED, for the grace; then it is read, stored and dropped.  A write on the
 * way is a message like any other, which makes the page DIRTY, and then the swap to DROPPING fails.
 *
 * What protection does not see is I/O that got hold of the page before it: such a write goes to the frame, past the page
 * table.  Nothing new can get hold of a protected page, so only what is older matters: long-term pins are counted by the kernel
 * (VmPin), and nothing is read while there are any; short ones (O_DIRECT) are given the grace to end.  One that lasts longer is
 * lost: this is the mover's limit, and why it has to be asked for.
 */
#define _GNU_SOURCE
#include "protect.h"
#include "uffd.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Solid-state disks answer well within it; and since half of a region may wait, it lets five budgets a second go. */
#define GRACE_NS ((uint64_t)US_GRACE_MS * 1000000)
#define RESERVE_SHARE 16 /* of the resident pages, one in so many is kept protected ahead of need */
#define STATUS_BYTES 4096

struct us_protected_group {
    struct us_protected_group *next;
    uint64_t since_ns; /* taken after the last page was protected */
    uint32_t pages;
    uint32_t index[US_BATCH_PAGES];
};

/* --- what speaks against reading and dropping --- */

void us_protect_watch(struct us_client *client, int thread) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/status", thread);
    client->status_fd = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%d/ksm_merging_pages", thread);
    client->merging_fd = open(path, O_RDONLY | O_CLOEXEC); /* -1: a kernel that cannot tell */
}

static bool read_text(int fd, char *text, size_t size) {
    ssize_t length = fd < 0 ? -1 : pread(fd, text, size - 1, 0);
    text[length > 0 ? length : 0] = 0;
    return length > 0;
}

/* Why no page that was written may leave at the moment. */
static enum us_held held_by(struct us_client *client) {
    char text[STATUS_BYTES];
    if (read_text(client->merging_fd, text, sizeof text) && strtoull(text, NULL, 10))
        return US_HELD_MERGED; /* merging drops the protection of a page without a word */
    const char *pinned = read_text(client->status_fd, text, sizeof text) ? strstr(text, "\nVmPin:") : NULL;
    if (!pinned) /* a process that ends has no memory left to tell of, before it is gone */
        return client->status_fd >= 0 && !strstr(text, "\nVmSize:") ? US_HELD_ENDED : US_HELD_UNKNOWN;
    return strtoull(pinned + 7, NULL, 10) ? US_HELD_PINNED : US_HELD_NOT;
}

/* --- the pages that wait --- */

/* A page that does not go: DIRTY, and young again.  `own` is the flag that was this module's hold on it: QUEUED while its entry
 * was here, BUSY in a batch. */
static void give_up(struct us_region *region, uint32_t index, uint64_t own) {
    us_word_leave(us_word_at(region, index), US_PROTECTED, US_DIRTY, 0, 0, 0);
    us_word_clear(us_word_at(region, index), own);
    us_queue_push(region, index);
}

/* How many pages more should be protected, `sent` having just gone: as many as a grace's worth of eviction needs. */
uint32_t us_protect_room(struct us_region *region, uint32_t most, uint32_t sent) {
    struct us_protected *waiting = &region->waiting;
    int64_t resident = atomic_load(&region->charged) / US_PAGE, pages = atomic_load(&waiting->pages);
    int64_t reserve = resident / RESERVE_SHARE, room = sent;
    pthread_mutex_lock(&waiting->lock);
    bool slow = waiting->first && us_now() - waiting->first->since_ns > 2 * GRACE_NS;
    pthread_mutex_unlock(&waiting->lock);
    if (pages < reserve)
        room = reserve - pages;
    else if (atomic_load(&region->parked))
        room = most;
    else if (slow)
        room = 0;
    if (room > resident / 2 - pages)
        room = resident / 2 - pages;
    return room < 0 ? 0 : room < most ? (uint32_t)room : most;
}

/* 0 once the range cannot be written any more without a message. */
static int protect_run(struct us_client *client, uint64_t address, uint32_t pages) {
    if (us_canary_on(client, US_CANARY_NO_PROTECTION))
        return 0;
    int rc = us_uffd_protect(client->uffd, address, (uint64_t)pages * US_PAGE);
    if (rc == -ESRCH)
        atomic_store(&client->gone, true);
    return rc;
}

/* Sorted pages whose words are PROTECTED and whose entries are ours: protect them, and let them wait. */
void us_protect(struct us_region *region, const uint32_t *index, uint32_t count) {
    struct us_client *client = region->client;
    struct us_protected *waiting = &region->waiting;
    struct us_protected_group *group = malloc(sizeof *group);
    uint32_t run = 0, most = group ? count : 0;
    if (group)
        group->pages = 0;
    for (uint32_t i = 0; i < count; i += run) {
        for (run = 1; run < most && i + run < count && index[i + run] == index[i] + run;)
            run++;
        int rc = group ? protect_run(client, us_address(region, index[i]), run) : -ENOMEM;
        if (rc == -ENOENT && run > 1) { /* the program split the mapping: older kernels protect no range over the seam */
            most = 1;
            run = 0;
        }
        for (uint32_t k = 0; k < run; k++)
            if (rc)
                give_up(region, index[i + k], US_QUEUED);
            else
                group->index[group->pages++] = index[i + k];
    }
    if (!group || !group->pages) {
        free(group);
        return;
    }
    group->next = NULL;
    group->since_ns = us_now();
    pthread_mutex_lock(&waiting->lock);
    if (waiting->first)
        waiting->last->next = group;
    else
        waiting->first = group;
    waiting->last = group;
    atomic_fetch_add(&waiting->pages, group->pages);
    pthread_mutex_unlock(&waiting->lock);
}

/* The oldest group, if it has waited long enough and is no larger than `most`. */
static struct us_protected_group *take_due(struct us_protected *waiting, uint32_t most) {
    pthread_mutex_lock(&waiting->lock);
    struct us_protected_group *group = waiting->first;
    if (group && (group->pages > most || us_now() - group->since_ns < GRACE_NS))
        group = NULL;
    if (group) {
        waiting->first = group->next;
        atomic_fetch_sub(&waiting->pages, group->pages);
    }
    pthread_mutex_unlock(&waiting->lock);
    return group;
}

static bool any_due(struct us_protected *waiting) {
    pthread_mutex_lock(&waiting->lock);
    bool due = waiting->first && us_now() - waiting->first->since_ns >= GRACE_NS;
    pthread_mutex_unlock(&waiting->lock);
    return due;
}

void us_protect_free(struct us_region *region) {
    struct us_protected_group *group = region->waiting.first;
    while (group) {
        struct us_protected_group *next = group->next;
        free(group);
        group = next;
    }
    pthread_mutex_destroy(&region->waiting.lock);
}

/* --- from PROTECTED to the store --- */

/* What still is PROTECTED becomes BUSY and the batch's; the others were written, and are young again. */
static void collect(struct us_batch *batch, const struct us_protected_group *group) {
    struct us_region *region = batch->region;
    for (uint32_t i = 0; i < group->pages; i++) {
        us_word *word = us_word_at(region, group->index[i]);
        uint64_t seen = atomic_load(word);
        bool ours = false;
        while (us_state_of(seen) == US_PROTECTED && !(seen & US_BUSY) && !ours)
            ours = us_word_swap(word, &seen, (seen | US_BUSY) & ~US_QUEUED);
        if (ours)
            batch->index[batch->pages++] = group->index[i];
        else
            give_up(region, group->index[i], US_QUEUED);
    }
}

static int compare(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Read the batch into its buffer: slot i is page i.  Returns the bits of the pages that could be read. */
static uint64_t read_batch(struct us_batch *batch) {
    uint64_t readable = 0;
    for (uint32_t start = 0; start < batch->pages;) {
        uint8_t *to = batch->buffer + (uint64_t)start * US_PAGE;
        uint32_t got = us_read_in_place(batch->region, batch->index + start, batch->pages - start, to);
        for (uint32_t i = 0; i < got; i++)
            readable |= 1ull << (start + i);
        start += got + 1; /* the page that ended the read stays */
    }
    return readable;
}

/* Send out, at most `most` pages, what has waited long enough.  Returns how many pages went, or tried to. */
uint32_t us_protect_send(struct us_client *client, struct us_region *region, uint32_t most) {
    if (!any_due(&region->waiting))
        return 0;
    enum us_held held = held_by(client);
    if (held == US_HELD_ENDED) {
        us_back_off(region, false);
        return 0;
    }
    if (held != US_HELD_NOT) {
        us_count(&region->count.refused, atomic_load(&region->waiting.pages));
        if (atomic_exchange(&region->held, held) != held) {
            atomic_store(&region->client->news, 1);
            us_tell_loop(client);
        }
        us_back_off(region, false);
        return 0;
    }
    atomic_store(&region->held, US_HELD_NOT);
    struct us_batch *batch = us_batch_take(client, region, US_BATCH_GUARD);
    if (!batch)
        return 0;
    struct us_protected_group *group;
    uint32_t tried = 0;
    while ((group = take_due(&region->waiting, US_BATCH_PAGES - batch->pages)) != NULL) {
        tried += group->pages;
        collect(batch, group);
        free(group);
        if (tried >= most)
            break;
    }
    if (!batch->pages) {
        us_batch_free(batch);
        return tried;
    }
    qsort(batch->index, batch->pages, sizeof *batch->index, compare);
    atomic_fetch_add(&region->leaving, (int64_t)batch->pages * US_PAGE);
    uint64_t readable = client->copy_out ? 0 : read_batch(batch);
    if (client->copy_out)
        us_order_post(client, batch, US_ORDER_READ);
    else
        us_protect_store(client, batch, readable);
    return tried;
}

/* The content of a page that is PROTECTED and BUSY is stored under `handle`: take it, unless it was written meanwhile. */
static bool win(struct us_region *region, uint32_t index, uint64_t handle) {
    us_word *word = us_word_at(region, index);
    uint64_t seen = atomic_load(word);
    while (us_state_of(seen) == US_PROTECTED)
        if (us_word_swap(word, &seen, us_with_handle(us_with_state(seen, US_DROPPING), handle) & ~US_BUSY))
            return true;
    if (region->pool)
        us_pool_free(region->pool, handle);
    return false;
}

/* Drop the pages of the batch that are DROPPING; the others, which are BUSY, stay. */
static void drop(struct us_client *client, struct us_batch *batch, uint64_t dropping) {
    struct us_region *region = batch->region;
    uint32_t n = 0, all = batch->pages;
    for (uint32_t i = 0; i < all; i++) {
        if (dropping >> i & 1)
            batch->index[n++] = batch->index[i];
        else
            give_up(region, batch->index[i], US_BUSY);
    }
    atomic_fetch_sub(&region->leaving, (int64_t)(all - n) * US_PAGE);
    batch->pages = n;
    batch->moved = 0; /* its copies do not count in the budget */
    if (n)
        us_order_post(client, batch, US_ORDER_DROP);
    else
        us_batch_free(batch);
}

/* The buffer holds the pages of `readable`. */
void us_protect_store(struct us_client *client, struct us_batch *batch, uint64_t readable) {
    struct us_region *region = batch->region;
    uint64_t dropping = 0, handle;
    bool full = false;
    if (!readable)
        us_back_off(region, false);
    if (!region->pool && readable) {
        batch->moved = readable;
        atomic_store(&batch->told, false);
        atomic_store(&batch->state, US_BATCH_WRITING);
        us_tell_loop(client);
        return;
    }
    for (uint32_t i = 0; i < batch->pages && !full; i++) {
        uint32_t index = batch->index[i];
        if (!(readable >> i & 1) || us_state_of(atomic_load(us_word_at(region, index))) != US_PROTECTED)
            continue;
        full = us_pool_put(region->pool, batch->buffer + (uint64_t)i * US_PAGE, region->extent.base + index, &handle) != 0;
        if (!full && win(region, index, handle))
            dropping |= 1ull << i;
    }
    if (full)
        us_store_full(region);
    else if (readable && atomic_load(&region->full))
        atomic_store(&region->full, false);
    drop(client, batch, dropping);
}

/* The agent has read the batch for us, the pages of `readable` at least. */
void us_protect_read(struct us_client *client, struct us_batch *batch, uint64_t readable) {
    batch->moved = readable & us_batch_mask(batch);
    us_take_copies(client, batch);
    us_protect_store(client, batch, batch->moved);
}

/* An awaited store has answered. */
void us_protect_stored(struct us_client *client, struct us_batch *batch) {
    uint64_t accepted = batch->accepted & batch->moved, dropping = 0;
    for (uint32_t i = 0; i < batch->pages; i++)
        if ((accepted >> i & 1) && win(batch->region, batch->index[i], 0))
            dropping |= 1ull << i;
    drop(client, batch, dropping);
}
