/* The pager's native half: one us_client per client process, its regions, its batches.
 *
 * Threads: the fault server (server.c) or, in its place, the asyncio loop; one or two evict workers (evictor.c); the
 * asyncio loop for everything that awaits a store.  They meet in the page words (word.h); locks are held briefly and never
 * across a system call that can wait for the client.  Nothing here knows Python, URLs or sockets.
 */
#ifndef US_PAGER_H
#define US_PAGER_H
#include "channel.h"
#include "pool.h"
#include "readahead.h"
#include "stats.h"
#include "table.h"
#include "trust.h"
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>

#define US_RUN_MAX 32u              /* pages that one install may bring */
#define US_MISSES 8192u             /* faults waiting for the asyncio loop; a power of two */
#define US_LATE_NS 100000000ull     /* an order that waits this long is late: the budget yields, the fault does not wait */

#define US_BATCHES_SPARE 4u /* of the client's batches, for regions that have hardly any under way */
#define US_BATCHES_STEP 2u  /* what a step of eviction takes: one for pages that move, one for pages that stay */

enum us_batch_state {
    US_BATCH_FREE,
    US_BATCH_BUILDING,
    US_BATCH_ORDERED,  /* MOVE, DROP or RELEASE is with the agent */
    US_BATCH_WRITING,  /* with the asyncio loop, which awaits the store */
    US_BATCH_WRITTEN   /* the store has answered; a worker takes it from here */
};
enum us_batch_kind { US_BATCH_MOVE, US_BATCH_PLACE, US_BATCH_DISCARD, US_BATCH_GUARD /* PROTECTED pages, see protect.c */ };

/* how DIRTY pages leave */
enum us_mover { US_MOVER_MOVE, US_MOVER_PROTECT };

/* what keeps the mover `protect` from taking any */
enum us_held { US_HELD_NOT, US_HELD_PINNED, US_HELD_MERGED, US_HELD_UNKNOWN, US_HELD_ENDED /* the process: nobody is to be told */ };

/* where the fault server and the agent run: on the faulting thread's CPU (SAME, the default), elsewhere, or as the kernel likes */
enum us_placement { US_PLACE_NONE, US_PLACE_SAME, US_PLACE_OTHER };

struct us_region;

struct us_batch {
    _Atomic uint32_t state;
    _Atomic uint32_t pins; /* rescues that read the buffer */
    uint32_t kind;
    uint32_t pages;
    uint32_t order; /* the order kind that is open */
    uint64_t moved;      /* MOVE: slots that hold data in staging; PLACE: pages whose copy counted in the budget; GUARD: those read */
    uint64_t number;   /* counts all batches: which came first */
    int64_t returned;  /* MOVE: slots whose page was put back */
    _Atomic uint64_t stranded; /* MOVE: slots whose rescue found no memory */
    uint64_t accepted; /* WRITTEN: the slots that the store took */
    _Atomic bool told, full; /* WRITING: the loop has it; WRITTEN: the store has no room */
    struct us_region *region;
    uint8_t *buffer;
    uint32_t index[US_BATCH_PAGES];
};

/* Deliberately wrong movers, for the tests that must catch them. */
enum us_canary {
    US_CANARY_NO_WAKE = 1,
    US_CANARY_DROP_BEFORE_STORE = 2,
    US_CANARY_DROP_RESCUABLE = 4,
    US_CANARY_STALE_CLEAN = 8,
    US_CANARY_LATE_WRITE = 16,
    US_CANARY_FILL_AFTER_DISCARD = 32,
    US_CANARY_NO_PROTECTION = 64
};

struct us_miss {
    struct us_region *region;
    uint64_t ticket;
    uint64_t time_ns;
    uint32_t first, count;
    uint32_t write;
    uint32_t ahead; /* nobody waits: readahead */
};

struct us_queue { /* resident pages in the order they came; guarded by its lock */
    pthread_mutex_t lock;
    uint32_t *entry;
    uint64_t head, tail, size; /* size is a power of two; entries [tail, head) */
};

struct us_protected_group;

struct us_protected { /* pages that are PROTECTED and wait, oldest first */
    pthread_mutex_t lock;
    struct us_protected_group *first, *last;
    _Atomic uint32_t pages;
};

struct us_client;

struct us_region {
    struct us_client *client;
    uint64_t start, pages;
    struct us_extent extent; /* its words */
    struct us_pool *pool; /* NULL: the store is awaited */
    bool grow;
    _Atomic bool closing;
    _Atomic uint32_t users; /* batches and workers that hold this region */
    _Atomic int64_t charged, leaving, kept;
    _Atomic int64_t limit, high;
    _Atomic uint32_t parked;  /* a fault waits for room */
    _Atomic bool full;        /* the store is full */
    _Atomic bool full_since, full_told; /* it ever was; and the user knows */
    _Atomic bool refused;     /* nothing could be taken from it lately: pinned, locked */
    _Atomic uint64_t retry_ns; /* no eviction before */
    _Atomic uint64_t backoff_ns;
    _Atomic uint32_t upgrade; /* 0..256: how often a page read in is written soon */
    uint32_t sample;
    struct us_queue queue;
    struct us_protected waiting;
    _Atomic uint32_t held;   /* enum us_held */
    _Atomic bool held_told;
    const struct us_prefetch *prefetch;
    void *prefetch_state;
    struct us_counters count;
    struct us_histogram native, awaited;
};

struct us_client {
    int uffd, channel_fd, order_fd, done_fd, loop_fd;
    int kick_fd;               /* wakes the worker, which sleeps on done_fd: the same, but where a stranger has its ends */
    int agent_order, agent_done; /* the agent's ends of order_fd and done_fd */
    int pid;
    int agent_tid; /* reads go by the agent's thread: the main thread may have ended before its process */
    uint64_t features;
    uint32_t canary;
    int mover; /* enum us_mover */
    int status_fd, merging_fd; /* what /proc tells of the client, for the mover `protect` */
    bool copy_out; /* staging is read by the agent: process_vm_readv is refused */
    uint8_t *own_buffers; /* of the batches, where the client may not see them; NULL: they are in the channel */
    struct us_table table;
    struct us_channel *channel;
    uint64_t staging; /* address in the client */
    pthread_rwlock_t map_lock;
    struct us_region **region; /* sorted by start */
    uint32_t regions, regions_room;
    _Atomic uint32_t round; /* where the next look for pressure starts */
    pthread_mutex_t batch_lock;
    struct us_batch batch[US_BATCHES];
    _Atomic uint64_t batches;
    uint32_t order_posted, order_reaped;
    uint32_t order_batch[US_ORDERS]; /* batch + 1, or 0: revoked */
    _Atomic uint32_t worker_asleep;
    _Atomic bool table_low; /* a region's table wants memory ahead */
    _Atomic bool agent_late, stop, gone, quiet;
    pthread_mutex_t miss_lock;
    struct us_miss *miss;
    uint32_t miss_head, miss_tail;
    bool loop_serves; /* and takes the misses itself; under the lock too */
    _Atomic uint64_t ticket;
    _Atomic uint32_t loop_told;
    uint64_t progress_looked; /* at the last look for a region that stands still */
    pthread_t server, worker, helper;
    bool server_runs, worker_runs, helper_runs;
    _Atomic uint32_t news; /* a region is full, or held: the loop has not looked yet */
    int server_tid, worker_tid, helper_tid, loop_tid;
    _Atomic uint32_t helper_asleep;
    int helper_fd;
    _Atomic bool server_stop, server_ended;
    int placement; /* enum us_placement */
    int server_cpu; /* -1: not placed */
    int apart_cpu;  /* one that is not server_cpu, where there is one */
    uint32_t looks_elsewhere, spread_looks;
    bool worker_apart; /* the worker has a CPU of its own: it may spin */
    uint64_t placed_ns;
};

/* client.c */
int us_client_create(struct us_client **out, int uffd, int pid, uint64_t features, int copy_out, uint32_t canary);
int us_client_descriptors(const struct us_client *client, int which);
void us_client_set_mover(struct us_client *client, int mover);
void us_client_set_agent(struct us_client *client, uint64_t staging, int tid);
int us_client_start(struct us_client *client, int placement);
/* Start the native fault server. */
int us_client_serve(struct us_client *client);
void us_client_stop(struct us_client *client);
void us_client_destroy(struct us_client *client);
void us_client_say(struct us_client *client, const char *text, int waiting);
int us_client_quiet(struct us_client *client);
int us_client_gone(struct us_client *client);
uint64_t us_client_table_bytes(const struct us_client *client);
void us_client_own_pool(struct us_client *client, struct us_pool *pool);
void us_tell_loop(struct us_client *client);
void us_kick_worker(struct us_client *client);
void us_kick_helper(struct us_client *client);
uint64_t us_now(void);
uint64_t us_next_ticket(struct us_client *client);

/* region.c */
int us_region_open(struct us_client *client, uint64_t start, uint64_t pages, uint64_t base, uint64_t limit, struct us_pool *pool,
                   int grow, const struct us_prefetch *prefetch, struct us_region **out);
int us_region_quiesce(struct us_region *region);
void us_region_resume(struct us_region *region);
void us_region_detach(struct us_region *region, int unmapped);
int us_region_free(struct us_region *region);
void us_region_limit(struct us_region *region, uint64_t limit);
struct us_region *us_region_find(struct us_client *client, uint64_t address);
bool us_reserve(struct us_region *region, uint32_t pages, bool force);
bool us_reserve_ahead(struct us_region *region);
/* Whether it may take another batch, with the batches locked. */
bool us_region_has_share(const struct us_region *region);
void us_release(struct us_region *region, int64_t bytes);
us_word *us_word_make(struct us_region *region, uint64_t index);
void us_queue_push(struct us_region *region, uint32_t index);
uint32_t us_queue_pop(struct us_region *region, uint32_t *index, uint32_t most);
void us_wake_page(struct us_region *region, uint32_t index, uint64_t old_word);
void us_drop_copy(struct us_region *region, uint64_t handle, bool was_kept);

/* install.c */
int us_install(struct us_region *region, uint32_t first, uint32_t count, const uint8_t *data, bool writable, bool keep);
bool us_fill_native(struct us_region *region, uint32_t first, uint64_t word, uint32_t ahead, bool write, bool keep);
int us_fill_done(struct us_region *region, const struct us_miss *miss, const uint8_t *data, uint64_t *void_pages);
uint64_t us_fill_failed(struct us_region *region, const struct us_miss *miss, int lost);
int us_install_rescued(struct us_region *region, uint32_t index, const uint8_t *data);
uint8_t *us_run_buffer(void);
const uint8_t *us_zero_page(void);

/* server.c */
#define US_SERVER_SIGNAL (SIGRTMIN + 1) /* ends the fault server's read */
int us_serve(struct us_client *client, int rounds);
void *us_server_main(void *client);
int us_take_misses(struct us_client *client, struct us_miss *out, int most);
int us_serve_misses(struct us_client *client, int rounds, struct us_miss *out, int most);
int us_put_miss(struct us_client *client, const struct us_miss *miss);

/* evictor.c, batch.c */
void *us_worker_main(void *client);
void *us_helper_main(void *client);
bool us_reap(struct us_client *client);
uint32_t us_read_in_place(struct us_region *region, const uint32_t *index, uint32_t count, uint8_t *buffer);
bool us_finish_writes(struct us_client *client);
void us_back_off(struct us_region *region, bool success);
struct us_batch *us_batch_take(struct us_client *client, struct us_region *region, uint32_t kind);
void us_batch_free(struct us_batch *batch);
uint64_t us_batch_mask(const struct us_batch *batch);
void us_order_post(struct us_client *client, struct us_batch *batch, uint32_t kind);
void us_check_late(struct us_client *client);
void us_store_full(struct us_region *region);
void us_put_back(struct us_batch *batch, uint32_t slot);
int us_take_writes(struct us_client *client, uint32_t *batches, int most);
int us_write_done(struct us_client *client, uint32_t batch, uint64_t accepted, int full);
uint64_t us_region_oldest_batch(struct us_region *region);
uint64_t us_client_batches(const struct us_client *client);
uint32_t us_batch_number(const struct us_batch *batch);

/* prefetch.c */
bool us_await_ahead(struct us_region *region, uint32_t first, uint32_t count, uint64_t now);
void us_read_strided(struct us_region *region, uint32_t index, struct us_ahead ahead, bool write, uint64_t now);
void us_read_runs(struct us_region *region, const struct us_ahead_run *run, uint32_t runs, bool write, uint64_t now);
int64_t us_region_prefetch(struct us_region *region, uint64_t first, uint64_t count);

/* discard.c */
int64_t us_region_discard(struct us_region *region, uint64_t first, uint64_t count, uint32_t *mark);
uint64_t us_region_next(const struct us_region *region, uint64_t first);
uint64_t us_discard_begin(struct us_region *region, uint64_t first, uint32_t count);
void us_discard_end(struct us_region *region, uint64_t first, uint64_t pages);

/* trust.c */
void us_take_copies(struct us_client *client, struct us_batch *batch);
void us_trust_free(struct us_client *client);

/* placement.c */
void us_place(struct us_client *client, uint32_t thread_id, uint64_t now);
void us_place_loop(struct us_client *client);
void us_place_freely(void);
int us_client_news(struct us_client *client);

static inline bool us_canary_on(const struct us_client *client, enum us_canary canary) {
    return __builtin_expect((client->canary & (uint32_t)canary) != 0, 0);
}
/* The word of a page; NULL: it has none, and is ZERO. */
static inline us_word *us_word_peek(const struct us_region *region, uint64_t index) {
    return us_extent_peek(&region->extent, index);
}
static inline us_word *us_word_at(struct us_region *region, uint64_t index) {
    us_word *word = us_word_peek(region, index);
    return __builtin_expect(word != NULL, 1) ? word : us_word_make(region, index);
}
static inline uint64_t us_address(const struct us_region *region, uint64_t index) {
    return region->start + (index << US_PAGE_SHIFT);
}
#endif
