/* The evict worker: keeps each region below its budget by sending its oldest pages out.
 *
 * DIRTY pages are moved out by the agent (UFFDIO_MOVE is the kernel's own check against pins and writers), or with the mover
 * `protect` are protected, wait, and are dropped in place (protect.c).  CLEAN pages are
 * write-protected since they were installed, so their content cannot change behind us: the worker reads them in place,
 * compresses them, and only a page whose swap to DROPPING then wins is dropped, many in one vectored call.
 */
#define _GNU_SOURCE
#include "pager.h"
#include "protect.h"
#include "report.h"
#include "uffd.h"
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define SPIN_NS 30000ull /* how long the worker looks for a finished order before it sleeps */
#define COMPACT_MOVES 64u
#define LOOK_FOR_LATE_MS 20
#define HELPER_AGAIN_MS 2

static int compare(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static int64_t excess_pages(struct us_region *region) {
    int64_t over = atomic_load(&region->charged) - atomic_load(&region->leaving) - atomic_load(&region->high);
    return over > 0 ? over / US_PAGE + 1 : 0;
}

static bool wants_eviction(struct us_region *region, uint64_t now) {
    struct us_client *client = region->client;
    return excess_pages(region) && !atomic_load(&region->closing) && !atomic_load(&client->agent_late) &&
           !atomic_load(&client->quiet) && now >= atomic_load(&region->retry_ns);
}

static bool wants_table(struct us_region *region, uint64_t now) {
    (void)now;
    return us_extent_is_low(&region->extent) && !atomic_load(&region->closing);
}

/* The next region that wants it, held: the caller lets go of `users`. */
static struct us_region *next_wanting(struct us_client *client, bool (*wants)(struct us_region *region, uint64_t now)) {
    struct us_region *found = NULL;
    uint64_t now = us_now();
    pthread_rwlock_rdlock(&client->map_lock);
    for (uint32_t i = 0; i < client->regions && !found; i++) {
        struct us_region *region = client->region[(client->round + i) % client->regions];
        if (wants(region, now)) {
            found = region;
            client->round = (client->round + i + 1) % client->regions;
            atomic_fetch_add(&region->users, 1);
            if (atomic_load(&region->closing)) { /* quiesce looked between the two */
                atomic_fetch_sub(&region->users, 1);
                found = NULL;
            }
        }
    }
    pthread_rwlock_unlock(&client->map_lock);
    return found;
}

/* Read pages in place, which are write-protected and BUSY: they stay mapped and readable meanwhile.  Returns how many of the first could be read. */
uint32_t us_read_in_place(struct us_region *region, const uint32_t *index, uint32_t count, uint8_t *buffer) {
    struct iovec local = {buffer, (size_t)count * US_PAGE}, remote[US_BATCH_PAGES];
    unsigned long n = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (i && index[i] == index[i - 1] + 1)
            remote[n - 1].iov_len += US_PAGE;
        else
            remote[n++] = (struct iovec){(void *)(uintptr_t)us_address(region, index[i]), US_PAGE};
    }
    ssize_t got = process_vm_readv(region->client->agent_tid, &local, 1, remote, n, 0);
    if (got < 0 && errno == EPERM)
        region->client->copy_out = true;
    return got > 0 ? (uint32_t)((size_t)got / US_PAGE) : 0;
}

static void keep_page(struct us_region *region, uint32_t index) {
    us_word_clear(us_word_at(region, index), US_BUSY);
    us_queue_push(region, index);
}

/* CLEAN | BUSY -> DROPPING once the pool has the content.  Returns false when the page was written, or the pool is full. */
static bool store_in_place(struct us_region *region, uint32_t index, const uint8_t *content, bool *full) {
    us_word *word = us_word_at(region, index);
    uint64_t seen = atomic_load(word), handle;
    if (us_state_of(seen) != US_CLEAN)
        return false;
    if (us_pool_put(region->pool, content, region->extent.base + index, &handle)) {
        *full = true;
        return false;
    }
    while (us_state_of(seen) == US_CLEAN)
        if (us_word_swap(word, &seen, us_with_handle(us_with_state(seen, US_DROPPING), handle) & ~US_BUSY))
            return true;
    us_pool_free(region->pool, handle);
    return false;
}

/* Pages marked BUSY, without a copy: give them one and add them to the batch.  False: not one of them went. */
static bool compress_in_place(struct us_batch *batch, uint32_t *index, uint32_t count) {
    struct us_region *region = batch->region;
    qsort(index, count, sizeof *index, compare);
    bool full = false;
    uint32_t before = batch->pages;
    for (uint32_t start = 0; start < count;) {
        uint32_t got = us_read_in_place(region, index + start, count - start, batch->buffer);
        for (uint32_t i = 0; i < got; i++) {
            uint32_t page = index[start + i];
            if (!full && store_in_place(region, page, batch->buffer + (uint64_t)i * US_PAGE, &full))
                batch->index[batch->pages++] = page;
            else
                keep_page(region, page);
        }
        start += got;
        if (start < count) /* the page that ended the read: protected from reading, or gone */
            keep_page(region, index[start++]);
    }
    bool any = batch->pages != before;
    if (full) {
        us_store_full(region);
    } else if (any && atomic_load(&region->full)) {
        atomic_store(&region->full, false);
    }
    return any;
}

struct victims {
    uint32_t move[US_BATCH_PAGES], moves; /* MOVING; with the mover `protect` PROTECTED, at most `room` */
    uint32_t room;
    uint32_t place[US_BATCH_PAGES], places; /* DROPPING */
    uint32_t bare[US_BATCH_PAGES], bares; /* CLEAN | BUSY: no copy yet */
    uint32_t stale; /* entries of pages that are not there: where many were discarded, all of them stand before the first victim */
};

/* Decide a page's fate by one swap of its word.  Its entry has left the queue, so QUEUED goes with the swap. */
static void choose(struct us_region *region, uint32_t index, struct victims *victims, uint32_t slot_base) {
    us_word *word = us_word_at(region, index);
    struct us_client *client = region->client;
    uint64_t seen = atomic_load(word);
    for (;;) {
        uint64_t gone = seen & ~US_QUEUED, next;
        enum us_state state = us_state_of(seen);
        bool resident = us_state_is_resident(state);
        bool busy = (seen & US_BUSY) && !us_canary_on(client, US_CANARY_LATE_WRITE);
        bool has_copy = !region->pool || us_handle_of(seen);
        bool clean = state == US_CLEAN && (has_copy || !client->copy_out);
        if (!resident && state != US_FILLING && state != US_UNPROTECTING)
            next = gone; /* a stale entry: the page was discarded */
        else if (!resident || busy)
            next = seen;
        else if (clean && has_copy)
            next = us_with_state(gone, US_DROPPING);
        else if (clean)
            next = gone | US_BUSY;
        else if (client->mover == US_MOVER_PROTECT)
            next = victims->moves < victims->room ? us_with_state(seen, US_PROTECTED) : seen; /* keeps its entry */
        else
            next = us_with_handle(us_with_state(gone, US_MOVING), slot_base + victims->moves) | US_BUSY;
        if (us_canary_on(client, US_CANARY_DROP_RESCUABLE) && clean && has_copy)
            next = gone; /* ordered, but still open to writers */
        if (!us_word_swap(word, &seen, next))
            continue;
        if (next == seen) {
            us_word_clear(word, US_QUEUED);
            us_queue_push(region, index);
        } else if (!resident) {
            victims->stale++; /* not ours to send out, though it may be DROPPING: by a discard, whose order it is part of */
        } else if (us_state_of(next) == US_DROPPING || (clean && has_copy)) {
            victims->place[victims->places++] = index;
        } else if (us_state_of(next) == US_MOVING || us_state_of(next) == US_PROTECTED) {
            victims->move[victims->moves++] = index;
        } else if (resident) {
            victims->bare[victims->bares++] = index;
        }
        return;
    }
}

/* False: nothing of it could be sent out. */
static bool post_place(struct us_client *client, struct us_batch *batch, const struct victims *victims) {
    struct us_region *region = batch->region;
    uint32_t bare[US_BATCH_PAGES];
    memcpy(batch->index, victims->place, victims->places * sizeof *batch->index);
    batch->pages = victims->places;
    memcpy(bare, victims->bare, victims->bares * sizeof *bare);
    if (victims->bares)
        us_back_off(region, compress_in_place(batch, bare, victims->bares) || victims->places || victims->moves);
    if (!batch->pages) {
        us_batch_free(batch);
        return false;
    }
    qsort(batch->index, batch->pages, sizeof *batch->index, compare);
    for (uint32_t i = 0; i < batch->pages; i++)
        for (uint32_t k = 0; k < victims->places && region->pool; k++)
            if (victims->place[k] == batch->index[i])
                batch->moved |= 1ull << i;
    atomic_fetch_add(&region->leaving, (int64_t)batch->pages * US_PAGE);
    us_order_post(client, batch, US_ORDER_DROP);
    return true;
}

static void post_move(struct us_client *client, struct us_batch *batch, const struct victims *victims) {
    memcpy(batch->index, victims->move, victims->moves * sizeof *batch->index);
    batch->pages = victims->moves;
    if (!batch->pages) {
        us_batch_free(batch);
        return;
    }
    qsort(batch->index, batch->pages, sizeof *batch->index, compare);
    atomic_fetch_add(&batch->region->leaving, (int64_t)batch->pages * US_PAGE);
    us_order_post(client, batch, US_ORDER_MOVE);
}

/* One step for one region with the mover `protect`: out with what has waited, and protect as much again. */
static bool evict_protected(struct us_client *client, struct us_region *region, uint32_t most) {
    uint32_t sent = us_protect_send(client, region, most), index[US_BATCH_PAGES];
    struct us_batch *place = us_batch_take(client, region, US_BATCH_PLACE);
    if (!place)
        return sent != 0;
    struct victims victims = {.room = us_protect_room(region, most, sent)};
    uint32_t n = us_queue_pop(region, index, sent ? victims.room : most);
    for (uint32_t i = 0; i < n; i++)
        choose(region, index[i], &victims, 0);
    qsort(victims.move, victims.moves, sizeof *victims.move, compare);
    us_protect(region, victims.move, victims.moves);
    return post_place(client, place, &victims) || victims.moves || victims.stale || sent;
}

/* One step for one region: up to a batch of each kind. */
static bool evict(struct us_client *client, struct us_region *region) {
    /* whole batches, since each costs the agent and the worker a wake-up; smaller ones where the budget is */
    int64_t share = atomic_load(&region->limit) / US_PAGE / 16;
    uint32_t most = share < US_BATCH_PAGES ? (uint32_t)share : US_BATCH_PAGES;
    if (client->mover == US_MOVER_PROTECT)
        return evict_protected(client, region, most);
    struct us_batch *place = us_batch_take(client, region, US_BATCH_PLACE);
    struct us_batch *move = place ? us_batch_take(client, region, US_BATCH_MOVE) : NULL;
    if (!move) {
        if (place)
            us_batch_free(place);
        return false;
    }
    uint32_t index[US_BATCH_PAGES];
    struct victims victims = {.moves = 0};
    uint32_t n = us_queue_pop(region, index, most);
    for (uint32_t i = 0; i < n; i++)
        choose(region, index[i], &victims, 1 + us_batch_number(move) * US_BATCH_PAGES);
    post_move(client, move, &victims);
    return post_place(client, place, &victims) || victims.moves || victims.stale;
}

static bool orders_open(struct us_client *client) {
    pthread_mutex_lock(&client->batch_lock);
    bool open = client->order_posted != client->order_reaped;
    pthread_mutex_unlock(&client->batch_lock);
    return open;
}

static bool order_done(struct us_client *client) {
    struct us_order *order = &client->channel->order[client->order_reaped % US_ORDERS];
    return atomic_load(&order->state) == US_ORDER_DONE;
}

/* In how many ms eviction should be tried again, -1: no region is over its mark. */
static int next_try(struct us_client *client) {
    uint64_t now = us_now();
    int soonest = -1;
    pthread_rwlock_rdlock(&client->map_lock);
    for (uint32_t i = 0; i < client->regions; i++) {
        struct us_region *region = client->region[i];
        if (!excess_pages(region) || atomic_load(&region->closing))
            continue;
        uint64_t retry = atomic_load(&region->retry_ns);
        int wait = retry > now ? (int)((retry - now) / 1000000) + 1 : 2;
        soonest = soonest < 0 || wait < soonest ? wait : soonest;
    }
    pthread_rwlock_unlock(&client->map_lock);
    return soonest;
}

static bool write_done(struct us_client *client) {
    for (uint32_t i = 0; i < US_BATCHES; i++)
        if (atomic_load(&client->batch[i].state) == US_BATCH_WRITTEN)
            return true;
    return false;
}

/* Sleep until the agent has finished something, a fault presses, or it is time to look whether an order is late. */
static void rest(struct us_client *client) {
    uint64_t until = us_now() + SPIN_NS;
    bool open = orders_open(client);
    while (open && client->worker_apart && us_now() < until)
        if (order_done(client))
            return;
    atomic_store(&client->worker_asleep, 1);
    atomic_store(&client->channel->pager_waits, 1);
    /* only now: who presses after this look finds the worker asleep, and kicks it */
    int pressed_ms = next_try(client);
    open = orders_open(client);
    if (!order_done(client) && !write_done(client) && !atomic_load(&client->table_low) && !atomic_load(&client->stop)) {
        struct pollfd wait = {.fd = client->done_fd, .events = POLLIN};
        poll(&wait, 1, open ? LOOK_FOR_LATE_MS : pressed_ms);
    }
    atomic_store(&client->worker_asleep, 0);
    atomic_store(&client->channel->pager_waits, 0);
    uint64_t count;
    ssize_t ignored = read(client->done_fd, &count, sizeof count);
    (void)ignored;
}

static bool prepare_table(struct us_client *client) {
    if (!atomic_load(&client->table_low) || !atomic_exchange(&client->table_low, false))
        return false;
    struct us_region *region;
    while ((region = next_wanting(client, wants_table))) {
        us_extent_prepare(&region->extent);
        atomic_fetch_sub(&region->users, 1);
    }
    return true;
}

/* Finish what has come back, and send out a batch more if a region is over its mark. */
static bool work(struct us_client *client) {
    bool progress = prepare_table(client) | us_reap(client) | us_finish_writes(client);
    struct us_region *region = atomic_load(&client->gone) ? NULL : next_wanting(client, wants_eviction);
    if (region) {
        progress |= evict(client, region);
        if (region->pool && us_pool_wants_compaction(region->pool))
            us_pool_compact(region->pool, COMPACT_MOVES);
        atomic_fetch_sub(&region->users, 1);
    }
    return progress;
}

void *us_worker_main(void *argument) {
    struct us_client *client = argument;
    client->worker_tid = (int)syscall(SYS_gettid);
    while (!atomic_load(&client->stop)) {
        if (work(client))
            continue;
        us_check_late(client);
        rest(client);
    }
    return NULL;
}

/* The worker's helper: on the faulting thread's CPU, which is idle while a fault is parked for want of room. */
void *us_helper_main(void *argument) {
    struct us_client *client = argument;
    client->helper_tid = (int)syscall(SYS_gettid);
    while (!atomic_load(&client->stop)) {
        struct pollfd wait = {.fd = client->helper_fd, .events = POLLIN};
        uint64_t count;
        atomic_store(&client->helper_asleep, 1);
        poll(&wait, 1, us_client_parked(client) ? HELPER_AGAIN_MS : -1);
        ssize_t ignored = read(client->helper_fd, &count, sizeof count);
        (void)ignored;
        while (!atomic_load(&client->stop) && us_client_parked(client) && work(client))
            continue;
        us_kick_worker(client); /* it looks after the orders that were posted here */
    }
    return NULL;
}
