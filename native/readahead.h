/* Prefetch policies: pure, told of demand faults, answering with pages to read ahead.
 *
 * A policy does no I/O, keeps no clock and never sees a page's state: the engine clips its answer to the region, leaves out
 * pages that are resident or on their way, and takes room for them as for any other page.
 */
#ifndef US_READAHEAD_H
#define US_READAHEAD_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define US_AHEAD_RUNS 32u  /* of one answer */
#define US_AHEAD_PAGES 256u /* of all its runs together */

/* Returned in registers: for a random fault, which is most often answered with nothing, that is all the cost. */
struct us_ahead {
    int64_t stride; /* pages between the pages to read, counted from the faulting one; 0: none of this kind */
    uint32_t count;
    uint32_t runs; /* more, anywhere: to be had from the state by us_prefetch.runs */
};

struct us_ahead_run {
    int64_t first;
    uint32_t count;
};

enum us_hint {
    US_HINT_PHASE, /* a part of the program begins that has run before or will run again; `first` names it */
    US_HINTS
};

/* What a policy is: a name, the size of its state, which starts zeroed, and functions on it.  Those that may be NULL are for
 * policies that have a use for them. */
struct us_prefetch {
    const char *name;
    size_t state_bytes;
    void (*init)(void *state);
    struct us_ahead (*fault)(void *state, int64_t page);
    const struct us_ahead_run *(*runs)(const void *state);
    void (*used)(void *state, int64_t page); /* a page that was read ahead is seen to be used; most are not seen */
    struct us_ahead (*hint)(void *state, enum us_hint hint, int64_t first, int64_t count);
};

extern const struct us_prefetch us_prefetch_streams, us_prefetch_linux, us_prefetch_leap, us_prefetch_successor, us_prefetch_replay;

/* NULL: no policy of that name. */
const struct us_prefetch *us_prefetch_find(const char *name);
/* The n-th policy's name; NULL after the last. */
const char *us_prefetch_name(uint32_t n);

/* A policy by itself: for the simulator, tests and tools. */
void *us_prefetch_new(const struct us_prefetch *policy);
struct us_ahead us_prefetch_fault(const struct us_prefetch *policy, void *state, int64_t page);
const struct us_ahead_run *us_prefetch_runs(const struct us_prefetch *policy, const void *state);
void us_prefetch_used(const struct us_prefetch *policy, void *state, int64_t page);
struct us_ahead us_prefetch_hint(const struct us_prefetch *policy, void *state, int hint, int64_t first, int64_t count);
void us_prefetch_free(void *state);

/* How much a policy's new guesses are worth: an average over the last tens of guesses, of which each is begun and, if the next fault
 * bears it out, kept.  Where few are, a policy goes on guessing but reads nothing until a guess is kept: accuracy is measured
 * without seeing one hit. */
struct us_trust {
    uint32_t score; /* 0..256 */
};
#define US_TRUST_START 171u /* where it stands if all are kept */
#define US_TRUST_LOW 85u    /* one in four */
static inline void us_trust_begun(struct us_trust *trust) { trust->score -= trust->score / 16; }
static inline void us_trust_kept(struct us_trust *trust) { trust->score += (256 - trust->score) / 8; }
static inline bool us_trust_is_low(const struct us_trust *trust) { return trust->score < US_TRUST_LOW; }
#endif
