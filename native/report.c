/* What Python may ask of a region or a batch: snapshots, never a look into live structures. */
#include "report.h"
#include "pager.h"

void us_region_report(struct us_region *region, struct us_report *out) {
    const struct us_counters *count = &region->count;
    *out = (struct us_report){
        .limit = (uint64_t)atomic_load(&region->limit),
        .charged = (uint64_t)atomic_load(&region->charged),
        .leaving = (uint64_t)atomic_load(&region->leaving),
        .kept = (uint64_t)atomic_load(&region->kept),
        .zero = count->zero,
        .load = count->load,
        .awaited = count->awaited,
        .rescue = count->rescue,
        .protect = count->protect,
        .spurious = count->spurious,
        .forgotten = count->forgotten,
        .parked = count->parked,
        .ahead = count->ahead,
        .dropped = count->dropped,
        .moved = count->moved,
        .refused = count->refused,
        .put_back = count->put_back,
        .full = count->full,
        .over_budget = count->over_budget,
        .lost = count->lost,
        .vanished = count->vanished,
        .is_full = atomic_load(&region->full),
        .is_refused = atomic_load(&region->refused),
        .agent_late = atomic_load(&region->client->agent_late),
        .cpu = region->client->server_cpu,
        .held = atomic_load(&region->held),
    };
}

/* A region in which a fault waits for room; NULL: none. */
struct us_region *us_client_parked(struct us_client *client) {
    struct us_region *found = NULL;
    pthread_rwlock_rdlock(&client->map_lock);
    for (uint32_t i = 0; i < client->regions && !found; i++)
        if (atomic_load(&client->region[i]->parked))
            found = client->region[i];
    pthread_rwlock_unlock(&client->map_lock);
    return found;
}

/* A region in which a fault waits for room that its store does not make, being full, or since no fault of the client was answered
 * between the last look and this one; NULL: none. */
struct us_region *us_client_stuck(struct us_client *client) {
    struct us_region *parked = us_client_parked(client);
    uint64_t progress = atomic_load(&client->channel->progress);
    bool stands = progress == client->progress_looked;
    client->progress_looked = progress;
    return parked && (stands || atomic_load(&parked->full)) ? parked : NULL;
}

/* Whether there may be something that the two below have not told; asked at each wake of the loop, so it looks at no region. */
int us_client_news(struct us_client *client) {
    return atomic_load_explicit(&client->news, memory_order_relaxed) && atomic_exchange(&client->news, 0);
}

/* A region whose store was found full and of which this was not told before; NULL: none. */
struct us_region *us_client_full(struct us_client *client) {
    struct us_region *found = NULL;
    pthread_rwlock_rdlock(&client->map_lock);
    for (uint32_t i = 0; i < client->regions && !found; i++)
        if (atomic_load(&client->region[i]->full_since) && !atomic_exchange(&client->region[i]->full_told, true))
            found = client->region[i];
    pthread_rwlock_unlock(&client->map_lock);
    return found;
}

/* A region whose written pages cannot leave and of which this was not told before; NULL: none. */
struct us_region *us_client_held(struct us_client *client) {
    struct us_region *found = NULL;
    pthread_rwlock_rdlock(&client->map_lock);
    for (uint32_t i = 0; i < client->regions && !found; i++)
        if (atomic_load(&client->region[i]->held) && !atomic_exchange(&client->region[i]->held_told, true))
            found = client->region[i];
    pthread_rwlock_unlock(&client->map_lock);
    return found;
}

/* Pages by state.  ZERO counts every page without a leaf. */
void us_region_census(struct us_region *region, uint64_t *pages) {
    for (unsigned i = 0; i < US_STATES; i++)
        pages[i] = 0;
    uint64_t seen = 0;
    const struct us_extent *extent = &region->extent;
    for (uint64_t i = us_extent_from(extent, 0); i < region->pages; i = us_extent_next(extent, i)) {
        enum us_state state = us_state_of(atomic_load_explicit(us_word_at(region, i), memory_order_relaxed));
        pages[state < US_STATES ? state : US_ZERO]++; /* the client holds the table too */
        seen++;
    }
    pages[US_ZERO] += region->pages - seen;
}

uint64_t us_region_latency(const struct us_region *region, int awaited, double fraction) {
    return us_histogram_at(awaited ? &region->awaited : &region->native, fraction);
}

uint64_t us_region_latency_count(const struct us_region *region, int awaited) {
    return us_histogram_count(awaited ? &region->awaited : &region->native);
}

void us_batch_report(struct us_client *client, uint32_t number, struct us_batch_report *out) {
    const struct us_batch *batch = &client->batch[number % US_BATCHES];
    out->region = batch->region;
    out->pages = batch->pages;
    out->moved = batch->moved;
    out->buffer = batch->buffer;
    for (uint32_t i = 0; i < batch->pages; i++)
        out->index[i] = batch->index[i];
}

uint32_t us_transitions_from(uint32_t state) { return state < US_STATES ? us_transitions[state] : 0; }
