/* The page word: everything the pager knows of a page, in 8 bytes changed by compare-and-swap.
 *
 *     state 4 | flags 4 | generation 20 | handle 36
 *
 * Invariants (each closes a hole found by experiment or by interleaving; see ARCHITECTURE.md):
 *  1. A message for a resident page is resolved at once, under UNPROTECTING: no ioctl acts on a resident page that an
 *     evictor could take away between the look at its word and the ioctl.  In FILLING, UNPROTECTING, MOVING and DROPPING a
 *     message is forgotten after it has set WAITER; every end of these states, failures included, wakes where WAITER was set.
 *  2. Only a page whose swap LEAVING -> STORED won may lose its staging slot as its only copy; only one whose swap to DROPPING
 *     won may be dropped in place.  CLEAN arises only by installing with write protection.
 *  3. Rescue is a copy: LEAVING -> FILLING, UFFDIO_COPY from the pager's own copy of the batch, which is kept until every page of the
 *     batch is stored or resident; the staging slot may go before.
 *  4. Discard bumps the generation; a fill, rescue or store completion of an older generation installs nothing.
 *  5. BUSY: a store operation on this index is in flight.  A BUSY page is not a victim, its index starts no second operation.
 *  6. resident + staging + kept copies <= budget; only a full store or a late agent may let it grow, and that is counted.
 *  7. PROTECTED arises only from a resident page's entry in the eviction queue, which then waits among the protected until its
 *     fate is decided: so a page found PROTECTED by its entry has been write-protected without a break since that entry was made.
 *     It leaves for DROPPING by a swap from PROTECTED, made after its content was read and the grace has passed: a write in
 *     between has made it DIRTY, and the swap fails.
 *
 * handle: ZERO 0; STORED and CLEAN the pool's handle or US_HANDLE_SAME | pattern (0: no copy in the pool, or in an awaited
 * store); MOVING and LEAVING 1 + batch * 64 + slot; FILLING from an awaited store the ticket of the fill.
 */
#ifndef US_WORD_H
#define US_WORD_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum us_state {
    US_ZERO,         /* never written or discarded: reads as zeros */
    US_FILLING,      /* a load is under way */
    US_CLEAN,        /* resident, write-protected, content unchanged since it was installed */
    US_UNPROTECTING, /* a message for a resident page is being resolved; never a victim */
    US_DIRTY,        /* resident, writable */
    US_MOVING,       /* ordered from the agent, may still be in place */
    US_LEAVING,      /* moved out, readable in the batch's buffer, store write under way */
    US_DROPPING,     /* being dropped in place; no way back until the agent reports */
    US_STORED,       /* only in the store */
    US_POISONED,     /* lost */
    US_PROTECTED,    /* resident, was writable, write-protected on its way out (mover `protect`) */
    US_STATES
};

#define US_WAITER (1ull << 4) /* a message was forgotten in a passing state: the end of the state wakes */
#define US_BUSY (1ull << 5)   /* a store operation on this index is in flight */
#define US_QUEUED (1ull << 6) /* has an entry in the region's eviction queue */
#define US_AHEAD (1ull << 7)  /* came by readahead */
#define US_FLAGS (US_WAITER | US_BUSY | US_QUEUED | US_AHEAD)
#define US_GENERATION_SHIFT 8
#define US_GENERATION_MASK (((1ull << 20) - 1) << US_GENERATION_SHIFT)
#define US_HANDLE_SHIFT 28
#define US_HANDLE_MASK (((1ull << 36) - 1) << US_HANDLE_SHIFT)

typedef _Atomic uint64_t us_word;

/* allowed[from] is the bit set of states that may follow: the one transition table */
extern const uint16_t us_transitions[US_STATES];

static inline enum us_state us_state_of(uint64_t word) { return (enum us_state)(word & 15); }
static inline uint64_t us_handle_of(uint64_t word) { return word >> US_HANDLE_SHIFT; }
static inline uint64_t us_with_state(uint64_t word, enum us_state state) { return (word & ~15ull) | (uint64_t)state; }
static inline uint64_t us_with_handle(uint64_t word, uint64_t handle) {
    return (word & ~US_HANDLE_MASK) | (handle << US_HANDLE_SHIFT);
}
static inline uint64_t us_next_generation(uint64_t word) {
    return (word & ~US_GENERATION_MASK) | ((word + (1ull << US_GENERATION_SHIFT)) & US_GENERATION_MASK);
}
static inline bool us_state_is_resident(enum us_state state) {
    return state == US_CLEAN || state == US_DIRTY || state == US_PROTECTED;
}

void us_word_check(uint64_t from, uint64_t to);

/* Swap `seen` for `next`; on failure `seen` is what the word holds now. */
static inline bool us_word_swap(us_word *word, uint64_t *seen, uint64_t next) {
#ifdef US_DEBUG
    us_word_check(*seen, next);
#endif
    return atomic_compare_exchange_strong(word, seen, next);
}

/* Leave a passing state: the state (and handle) change whatever flags others set meanwhile.  Returns the old word. */
uint64_t us_word_leave(us_word *word, enum us_state from, enum us_state to, uint64_t handle, uint64_t clear, uint64_t set);

/* Clear flags in whatever state the word is; returns the old word. */
static inline uint64_t us_word_clear(us_word *word, uint64_t flags) { return atomic_fetch_and(word, ~flags); }
#endif
