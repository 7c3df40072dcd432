/* Batches and orders: what is under way between the pager, the agent and the store.
 *
 * A batch is up to 64 pages of one region, sorted by index, so that runs move with one ioctl.  Bit i of every mask is the page
 * index[i], and for a moved page its slot i of the batch's staging area and buffer.
 */
#define _GNU_SOURCE
#include "uffd.h"
#include "pager.h"
#include "protect.h"
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define BACKOFF_FIRST_NS 2000000ull
#define BACKOFF_MAX_NS 1000000000ull
#define PUT_BACK_AGAIN_US 200
#define PINS_AGAIN_US 10
#define FULL_RETRY_NS 50000000ull /* between tries to write to a full store */

uint32_t us_batch_number(const struct us_batch *batch) {
    return (uint32_t)(batch - batch->region->client->batch);
}

uint64_t us_batch_mask(const struct us_batch *batch) {
    return batch->pages >= 64 ? ~0ull : (1ull << batch->pages) - 1;
}

/* NULL: all batches are under way. */
struct us_batch *us_batch_take(struct us_client *client, struct us_region *region, uint32_t kind) {
    struct us_batch *found = NULL;
    pthread_mutex_lock(&client->batch_lock);
    /* revoked orders hold places of the ring until the agent has passed them: leave one for each batch */
    bool room = client->order_posted - client->order_reaped <= US_ORDERS - 2 * US_BATCHES;
    room = room && (kind == US_BATCH_DISCARD || (!atomic_load(&client->quiet) && us_region_has_share(region)));
    for (uint32_t i = 0; room && i < US_BATCHES && !found; i++) {
        struct us_batch *batch = &client->batch[i];
        if (atomic_load(&batch->state) == US_BATCH_FREE)
            found = batch;
    }
    if (found) {
        atomic_store(&found->state, US_BATCH_BUILDING);
        found->kind = kind;
        found->pages = 0;
        found->moved = 0;
        found->returned = 0;
        found->number = atomic_fetch_add(&client->batches, 1) + 1;
        found->region = region;
        atomic_fetch_add(&region->users, 1);
    }
    pthread_mutex_unlock(&client->batch_lock);
    return found;
}

void us_batch_free(struct us_batch *batch) {
    struct us_region *region = batch->region;
    atomic_store(&batch->state, US_BATCH_FREE);
    atomic_fetch_sub(&region->users, 1);
}

static uint32_t describe_runs(const struct us_batch *batch, struct us_order *order) {
    uint32_t runs = 0, slot = us_batch_number(batch) * US_BATCH_PAGES;
    for (uint32_t i = 0; i < batch->pages; i++) {
        struct us_run *last = runs ? &order->run[runs - 1] : NULL;
        if (last && batch->index[i] == batch->index[i - 1] + 1)
            last->pages++;
        else
            order->run[runs++] = (struct us_run){us_address(batch->region, batch->index[i]), slot + i, 1};
    }
    return runs;
}

/* Give the agent an order for the whole batch.  us_batch_take left room for it in the ring.  What is written there is never read
 * back: a stranger may have changed it. */
void us_order_post(struct us_client *client, struct us_batch *batch, uint32_t kind) {
    struct us_channel *channel = client->channel;
    pthread_mutex_lock(&client->batch_lock);
    struct us_order *order = &channel->order[client->order_posted % US_ORDERS];
    uint32_t number = us_batch_number(batch);
    order->kind = kind;
    order->batch = number;
    order->posted_ns = us_now();
    if (kind == US_ORDER_RELEASE || kind == US_ORDER_COPY) {
        order->runs = 1;
        order->run[0] = (struct us_run){0, number * US_BATCH_PAGES, batch->pages};
        order->taken = batch->moved;
    } else {
        order->runs = describe_runs(batch, order);
    }
    client->order_batch[client->order_posted++ % US_ORDERS] = number + 1;
    batch->order = kind;
    atomic_store(&batch->state, US_BATCH_ORDERED);
    atomic_store(&order->state, US_ORDER_POSTED);
    pthread_mutex_unlock(&client->batch_lock);
    if (atomic_exchange(&channel->agent_asleep, 0)) {
        uint64_t one = 1;
        ssize_t ignored = write(client->order_fd, &one, sizeof one);
        (void)ignored;
    }
}

/* Pages of an order that did not go: they are resident again, and wait their turn from the end of the queue. */
static void stay(struct us_batch *batch, uint64_t pages, enum us_state from, enum us_state to) {
    struct us_region *region = batch->region;
    for (uint32_t i = 0; i < batch->pages; i++) {
        if (!(pages >> i & 1))
            continue;
        us_word *word = us_word_at(region, batch->index[i]);
        uint64_t handle = from == US_DROPPING ? us_handle_of(atomic_load(word)) : 0;
        bool fresh = region->pool && handle && !(batch->moved >> i & 1); /* a copy that the budget does not know */
        uint64_t seen = atomic_load(word);
        while (batch->kind == US_BATCH_DISCARD && !us_word_swap(word, &seen, us_next_generation(seen)))
            continue; /* tells a refusal from a page that was dropped and filled anew */
        uint64_t old = us_word_leave(word, from, to, fresh || to != US_CLEAN ? 0 : handle, US_BUSY, 0);
        us_wake_page(region, batch->index[i], old);
        if (fresh)
            us_pool_free(region->pool, handle);
        us_queue_push(region, batch->index[i]);
    }
    atomic_fetch_sub(&region->leaving, (int64_t)__builtin_popcountll(pages) * US_PAGE);
}

/* Nothing could be taken: pinned, mlocked, shared after a fork.  Ask again later, and let faults pass meanwhile. */
void us_back_off(struct us_region *region, bool success) {
    if (success) {
        atomic_store(&region->backoff_ns, 0);
        if (atomic_load(&region->refused))
            atomic_store(&region->refused, false);
        return;
    }
    uint64_t before = atomic_load(&region->backoff_ns);
    uint64_t next = before ? before * 2 : BACKOFF_FIRST_NS;
    next = next < BACKOFF_MAX_NS ? next : BACKOFF_MAX_NS;
    atomic_store(&region->backoff_ns, next);
    atomic_store(&region->retry_ns, us_now() + next);
    atomic_store(&region->refused, true);
    us_release(region, 0);
}

/* Pages that had nothing in memory: the program dropped them itself, they read as zeros. */
static void vanish(struct us_batch *batch, uint64_t pages) {
    struct us_region *region = batch->region;
    for (uint32_t i = 0; i < batch->pages; i++)
        if (pages >> i & 1) {
            uint64_t old = us_word_leave(us_word_at(region, batch->index[i]), US_MOVING, US_ZERO, 0, US_BUSY, 0);
            us_wake_page(region, batch->index[i], old);
        }
    int64_t bytes = (int64_t)__builtin_popcountll(pages) * US_PAGE;
    atomic_fetch_sub(&region->leaving, bytes);
    us_count(&region->count.vanished, (uint64_t)__builtin_popcountll(pages));
    us_release(region, bytes);
}

/* Copy the moved slots of staging into the batch's buffer: one system call. */
static bool read_staging(struct us_client *client, struct us_batch *batch) {
    struct iovec local[US_BATCH_PAGES], remote[US_BATCH_PAGES];
    uint64_t base = client->staging + (uint64_t)us_batch_number(batch) * US_BATCH_PAGES * US_PAGE;
    unsigned long n = 0;
    ssize_t total = 0;
    for (uint32_t i = 0; i < batch->pages; i++) {
        if (!(batch->moved >> i & 1))
            continue;
        total += US_PAGE;
        if (n && i && (batch->moved >> (i - 1) & 1)) {
            local[n - 1].iov_len += US_PAGE;
            remote[n - 1].iov_len += US_PAGE;
            continue;
        }
        local[n] = (struct iovec){batch->buffer + (uint64_t)i * US_PAGE, US_PAGE};
        remote[n++] = (struct iovec){(void *)(uintptr_t)(base + (uint64_t)i * US_PAGE), US_PAGE};
    }
    return !n || process_vm_readv(client->agent_tid, local, n, remote, n, 0) == total;
}

/* Put a LEAVING page back: its store has no room.  The region may go over its budget by it. */
void us_put_back(struct us_batch *batch, uint32_t slot) {
    struct us_region *region = batch->region;
    uint32_t index = batch->index[slot];
    us_word *word = us_word_at(region, index);
    uint64_t seen = atomic_load(word);
    us_count(&region->count.put_back, 1);
    while (us_state_of(seen) == US_LEAVING)
        if (us_word_swap(word, &seen, us_with_handle(us_with_state(seen, US_FILLING), 0))) {
            batch->returned++; /* the room of its slot, which is released next, is its own now */
            if (us_install_rescued(region, index, batch->buffer + (uint64_t)slot * US_PAGE))
                atomic_fetch_or(&batch->stranded, 1ull << slot);
        }
    us_word_clear(word, US_BUSY);
}

/* The store has no room: no eviction for a while, and with on_full="grow" no fault waits for it. */
void us_store_full(struct us_region *region) {
    us_count(&region->count.full, 1);
    atomic_store(&region->full, true);
    if (!atomic_exchange(&region->full_since, true)) {
        atomic_store(&region->client->news, 1);
        us_tell_loop(region->client);
    }
    atomic_store(&region->retry_ns, us_now() + FULL_RETRY_NS);
    us_release(region, 0);
}

/* A page of the batch is in the store: LEAVING -> STORED, unless it was rescued or discarded meanwhile. */
static void stored(struct us_batch *batch, uint32_t slot, uint64_t handle) {
    struct us_region *region = batch->region;
    us_word *word = us_word_at(region, batch->index[slot]);
    enum us_state to = handle == US_HANDLE_SAME ? US_ZERO : US_STORED;
    uint64_t kept = to == US_ZERO ? 0 : handle;
    uint64_t old = us_word_leave(word, US_LEAVING, to, kept, US_BUSY, 0);
    bool rescued = us_state_of(old) != US_LEAVING;
    if (region->pool && (rescued || to == US_ZERO))
        us_pool_free(region->pool, handle);
    if (rescued)
        us_word_clear(word, US_BUSY);
}

static void compress(struct us_batch *batch) {
    struct us_region *region = batch->region;
    bool full = false;
    for (uint32_t i = 0; i < batch->pages; i++) {
        if (!(batch->moved >> i & 1))
            continue;
        us_word *word = us_word_at(region, batch->index[i]);
        uint64_t handle, slot = region->extent.base + batch->index[i];
        if (us_state_of(atomic_load(word)) != US_LEAVING) { /* rescued before it was compressed */
            us_word_clear(word, US_BUSY);
        } else if (full || us_pool_put(region->pool, batch->buffer + (uint64_t)i * US_PAGE, slot, &handle)) {
            full = true;
            us_put_back(batch, i);
        } else {
            stored(batch, i, handle);
        }
    }
    if (full)
        us_store_full(region);
    else if (atomic_load(&region->full))
        atomic_store(&region->full, false);
}

/* The buffer holds the batch: from here on its pages can be rescued. */
static void leave(struct us_client *client, struct us_batch *batch) {
    struct us_region *region = batch->region;
    for (uint32_t i = 0; i < batch->pages; i++)
        if (batch->moved >> i & 1) {
            uint64_t where = 1 + (uint64_t)us_batch_number(batch) * US_BATCH_PAGES + i;
            uint64_t old = us_word_leave(us_word_at(region, batch->index[i]), US_MOVING, US_LEAVING, where, 0, 0);
            us_wake_page(region, batch->index[i], old);
        }
    if (region->pool) {
        compress(batch);
        us_order_post(client, batch, US_ORDER_RELEASE);
    } else {
        atomic_store(&batch->told, false);
        atomic_store(&batch->state, US_BATCH_WRITING);
        us_tell_loop(client);
    }
}

static void moved(struct us_client *client, struct us_batch *batch, const struct us_order *order) {
    struct us_region *region = batch->region;
    uint64_t all = us_batch_mask(batch), taken = order->taken & all, absent = order->absent & all & ~taken;
    uint64_t refused = all & ~taken & ~absent;
    batch->moved = taken;
    if (absent)
        vanish(batch, absent);
    if (refused) {
        us_count(&region->count.refused, (uint64_t)__builtin_popcountll(refused));
        stay(batch, refused, US_MOVING, US_DIRTY);
    }
    us_count(&region->count.moved, (uint64_t)__builtin_popcountll(taken));
    us_back_off(region, taken || absent);
    if (!taken) {
        us_batch_free(batch);
    } else if (us_canary_on(client, US_CANARY_DROP_BEFORE_STORE)) {
        memset(batch->buffer, 0, (size_t)batch->pages * US_PAGE);
        leave(client, batch);
    } else if (!client->copy_out && read_staging(client, batch)) {
        leave(client, batch);
    } else if (!client->copy_out && errno == ESRCH) {
        atomic_store(&client->gone, true); /* nobody is left to miss the pages */
    } else {
        client->copy_out = true; /* a client that changed its user id forbids to be read: the agent copies instead */
        us_order_post(client, batch, US_ORDER_COPY);
    }
}

static void copied(struct us_client *client, struct us_batch *batch) {
    us_take_copies(client, batch);
    leave(client, batch);
}

static void dropped(struct us_batch *batch, const struct us_order *order) {
    struct us_region *region = batch->region;
    uint64_t all = us_batch_mask(batch), taken = order->taken & all;
    int64_t freed = 0;
    for (uint32_t i = 0; i < batch->pages; i++) {
        if (!(taken >> i & 1))
            continue;
        us_word *word = us_word_at(region, batch->index[i]);
        uint64_t handle = us_handle_of(atomic_load(word)); /* DROPPING: nobody else changes it */
        bool zero = batch->kind == US_BATCH_DISCARD || handle == US_HANDLE_SAME;
        int64_t cost = region->pool && handle ? (int64_t)us_pool_cost(region->pool, handle) : 0;
        bool was_kept = batch->moved >> i & 1;
        uint64_t old = us_word_leave(word, US_DROPPING, zero ? US_ZERO : US_STORED, zero ? 0 : handle, 0, 0);
        us_wake_page(region, batch->index[i], old);
        if (zero && region->pool && handle)
            us_pool_free(region->pool, handle);
        if (was_kept) { /* the copy is the store's again, no longer the budget's */
            atomic_fetch_sub(&region->kept, cost);
            freed += cost;
        }
        freed += US_PAGE;
    }
    int64_t pages = __builtin_popcountll(taken);
    atomic_fetch_sub(&region->leaving, pages * US_PAGE);
    us_count(&region->count.dropped, (uint64_t)pages);
    if (taken != all) {
        us_count(&region->count.refused, (uint64_t)__builtin_popcountll(all & ~taken));
        stay(batch, all & ~taken, US_DROPPING, batch->kind == US_BATCH_PLACE ? US_CLEAN : US_DIRTY);
    }
    if (batch->kind != US_BATCH_DISCARD)
        us_back_off(region, taken != 0);
    us_release(region, freed);
    us_batch_free(batch);
}

/* No word of the batch says LEAVING any more, so rescues that began before end in a moment.  What they or a put-back found no memory
 * for is installed here, from the batch's buffer: after staging was released, whose memory may be what is wanted, and where waiting
 * holds no fault up. */
static void settle_rescues(struct us_batch *batch) {
    while (atomic_load(&batch->pins))
        usleep(PINS_AGAIN_US);
    uint64_t stranded = atomic_exchange(&batch->stranded, 0);
    for (uint32_t i = 0; i < batch->pages; i++)
        while (stranded >> i & 1 && !atomic_load(&batch->region->client->stop) &&
               us_install_rescued(batch->region, batch->index[i], batch->buffer + (uint64_t)i * US_PAGE))
            usleep(PUT_BACK_AGAIN_US); /* its only copy: not given up while the client is served */
}

static void released(struct us_batch *batch) {
    settle_rescues(batch);
    int64_t slots = __builtin_popcountll(batch->moved);
    atomic_fetch_sub(&batch->region->leaving, slots * US_PAGE);
    us_release(batch->region, (slots - batch->returned) * US_PAGE);
    us_batch_free(batch);
}

/* Take the next finished order off the ring; false when none is there. */
static bool reap_one(struct us_client *client) {
    pthread_mutex_lock(&client->batch_lock);
    struct us_order *order = &client->channel->order[client->order_reaped % US_ORDERS], copy;
    bool done = client->order_reaped != client->order_posted && atomic_load(&order->state) == US_ORDER_DONE;
    uint32_t number = 0;
    if (done) {
        copy.taken = order->taken;
        copy.absent = order->absent;
        number = client->order_batch[client->order_reaped++ % US_ORDERS];
        atomic_store(&order->state, US_ORDER_EMPTY);
        atomic_store(&client->agent_late, false); /* under the lock, as where it is set: the last word is the true one */
    }
    pthread_mutex_unlock(&client->batch_lock);
    if (!done)
        return false;
    if (number) {
        struct us_batch *batch = &client->batch[number - 1];
        if (batch->order == US_ORDER_MOVE)
            moved(client, batch, &copy);
        else if (batch->order == US_ORDER_COPY)
            copied(client, batch);
        else if (batch->order == US_ORDER_READ)
            us_protect_read(client, batch, copy.taken);
        else if (batch->order == US_ORDER_DROP || batch->order == US_ORDER_DISCARD)
            dropped(batch, &copy);
        else
            released(batch);
    }
    return true;
}

bool us_reap(struct us_client *client) {
    bool reaped = false;
    while (reap_one(client))
        reaped = true;
    return reaped;
}

/* An order that the agent has not taken for 100 ms (stopped, traced, starved of CPU) is revoked: its pages stay where they are, and
 * until the agent answers again faults are served over the budget, since none may wait for it. */
void us_check_late(struct us_client *client) {
    pthread_mutex_lock(&client->batch_lock);
    uint64_t now = us_now(); /* under the lock: no order is younger */
    uint32_t revoked[US_ORDERS], n = 0;
    bool late = false;
    for (uint32_t at = client->order_reaped; at != client->order_posted; at++) {
        struct us_order *order = &client->channel->order[at % US_ORDERS];
        uint32_t state = US_ORDER_POSTED, number = client->order_batch[at % US_ORDERS];
        if (atomic_load(&order->state) == US_ORDER_DONE || now - order->posted_ns < US_LATE_NS)
            continue;
        late = true;
        uint32_t kind = number ? client->batch[number - 1].order : US_ORDER_RELEASE;
        if (kind == US_ORDER_RELEASE || kind == US_ORDER_COPY)
            continue;
        if (atomic_compare_exchange_strong(&order->state, &state, US_ORDER_REVOKED)) {
            client->order_batch[at % US_ORDERS] = 0;
            revoked[n++] = number - 1;
        }
    }
    bool news = late && !atomic_exchange(&client->agent_late, true);
    pthread_mutex_unlock(&client->batch_lock);
    if (news) {
        pthread_rwlock_rdlock(&client->map_lock);
        for (uint32_t i = 0; i < client->regions; i++)
            us_release(client->region[i], 0);
        pthread_rwlock_unlock(&client->map_lock);
    }
    for (uint32_t i = 0; i < n; i++) {
        struct us_batch *batch = &client->batch[revoked[i]];
        uint64_t all = us_batch_mask(batch);
        bool move = batch->order == US_ORDER_MOVE;
        us_count(&batch->region->count.refused, batch->pages);
        if (batch->order == US_ORDER_READ) {
            us_protect_store(client, batch, 0);
            continue;
        }
        stay(batch, all, move ? US_MOVING : US_DROPPING, batch->kind == US_BATCH_PLACE ? US_CLEAN : US_DIRTY);
        us_batch_free(batch);
    }
}

/* The number of the region's oldest batch under way; UINT64_MAX: none is. */
uint64_t us_region_oldest_batch(struct us_region *region) {
    struct us_client *client = region->client;
    uint64_t oldest = UINT64_MAX;
    pthread_mutex_lock(&client->batch_lock);
    for (uint32_t i = 0; i < US_BATCHES; i++) {
        const struct us_batch *batch = &client->batch[i];
        uint32_t state = atomic_load(&batch->state);
        bool open = state != US_BATCH_FREE && batch->region == region;
        if (open && batch->number < oldest)
            oldest = batch->number;
    }
    pthread_mutex_unlock(&client->batch_lock);
    return oldest;
}

uint64_t us_client_batches(const struct us_client *client) { return atomic_load(&client->batches); }

/* Batches whose store write the asyncio loop should await. */
int us_take_writes(struct us_client *client, uint32_t *batches, int most) {
    int n = 0;
    for (uint32_t i = 0; i < US_BATCHES && n < most; i++) {
        struct us_batch *batch = &client->batch[i];
        if (atomic_load(&batch->state) == US_BATCH_WRITING && !atomic_exchange(&batch->told, true))
            batches[n++] = i;
    }
    return n;
}

/* The loop's write has ended: `accepted` pages are in the store, the others go back to memory.  A worker does the rest: putting a
 * page back may have to wait for memory, which the loop must not. */
int us_write_done(struct us_client *client, uint32_t number, uint64_t accepted, int full) {
    struct us_batch *batch = &client->batch[number % US_BATCHES];
    batch->accepted = accepted;
    atomic_store(&batch->full, full != 0);
    atomic_store(&batch->state, US_BATCH_WRITTEN);
    us_kick_worker(client);
    return 0;
}

static void finish_write(struct us_client *client, struct us_batch *batch) {
    for (uint32_t i = 0; i < batch->pages && batch->kind == US_BATCH_MOVE; i++) {
        if (!(batch->moved >> i & 1))
            continue;
        if (batch->accepted >> i & 1)
            stored(batch, i, 0);
        else
            us_put_back(batch, i);
    }
    if (atomic_load(&batch->full))
        us_store_full(batch->region);
    else
        atomic_store(&batch->region->full, false);
    if (batch->kind == US_BATCH_GUARD)
        us_protect_stored(client, batch);
    else
        us_order_post(client, batch, US_ORDER_RELEASE);
}

bool us_finish_writes(struct us_client *client) {
    bool any = false;
    for (uint32_t i = 0; i < US_BATCHES; i++) {
        uint32_t state = US_BATCH_WRITTEN;
        if (atomic_compare_exchange_strong(&client->batch[i].state, &state, US_BATCH_BUILDING)) {
            finish_write(client, &client->batch[i]);
            any = true;
        }
    }
    return any;
}
