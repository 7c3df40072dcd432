/* What a client's agent and the pager share: a ring of orders in a sealed memfd, and two words of state.
 *
 * The pager writes an order and posts it; the agent takes orders strictly in ring order, carries them out in its own memory map
 * and marks them done.  An order not yet taken can be revoked.  Neither side trusts the other's pace: the pager never
 * waits for the agent on a fault's behalf, the agent never takes a lock of its process.
 */
#ifndef US_CHANNEL_H
#define US_CHANNEL_H
#include "uapi.h"
#include <stdatomic.h>
#include <stdint.h>

#define US_CHANNEL_MAGIC 0x31777375u /* "usw1" */
#define US_BATCH_PAGES 64u           /* pages an order may speak of: the width of its result masks */
#define US_BATCHES 16u
#define US_ORDERS 64u /* a power of two, more than the orders that all batches can have open */
#define US_STAGING_PAGES (US_BATCHES * US_BATCH_PAGES)
#define US_TEXT 480u

enum us_order_kind { US_ORDER_MOVE = 1, US_ORDER_DROP = 2, US_ORDER_RELEASE = 3, US_ORDER_COPY = 4, US_ORDER_DISCARD = 5, US_ORDER_READ = 6 };
enum us_order_state { US_ORDER_EMPTY, US_ORDER_POSTED, US_ORDER_TAKEN, US_ORDER_DONE, US_ORDER_REVOKED };

struct us_run {
    uint64_t address;
    uint32_t staging; /* first slot in the staging area (MOVE, RELEASE) */
    uint32_t pages;
};
_Static_assert(sizeof(struct us_run) == 16, "us_run crosses processes");

struct us_order {
    _Atomic uint32_t state;
    uint32_t kind;
    uint32_t runs;
    uint32_t batch;
    uint64_t taken;  /* result: one bit a page, moved or dropped */
    uint64_t absent; /* result: one bit a page, there was nothing to move */
    int32_t error;   /* result: the last errno that refused a page */
    uint32_t reserved;
    uint64_t posted_ns;
    struct us_run run[US_BATCH_PAGES];
};
_Static_assert(sizeof(struct us_order) == 48 + 16 * US_BATCH_PAGES, "us_order crosses processes");

struct us_channel {
    uint32_t magic;
    uint32_t reserved0;
    _Atomic uint32_t agent_asleep;
    _Atomic uint32_t pager_waits;
    _Atomic int32_t move_cpu;  /* the CPU the agent should move pages on, -1: as it likes */
    _Atomic uint32_t quit;
    _Atomic uint64_t progress; /* faults answered: tells a slow pager from a stuck one */
    _Atomic uint32_t text_version;
    _Atomic int32_t drop_cpu;  /* and drop them on */
    char text[US_TEXT]; /* set by the pager: what waits, for which store, what to do */
    struct us_order order[US_ORDERS];
};
/* the buffers of the batches follow the channel, page aligned: the pager reads staging into them with process_vm_readv, or,
 * where that is refused, the agent copies: from staging (US_ORDER_COPY) or in place (US_ORDER_READ) */
#define US_CHANNEL_BYTES ((sizeof(struct us_channel) + US_PAGE - 1) / US_PAGE * US_PAGE)
#define US_CHANNEL_TOTAL (US_CHANNEL_BYTES + (uint64_t)US_STAGING_PAGES * US_PAGE)
#endif
