/* The writers of the loss tests: threads that hammer counters living in paged memory, and know what each must hold.
 *
 * Every page begins with a struct us_exercise_page. What a page should hold is kept outside of the paged memory, one tally
 * per thread and page, so that a lost, doubled or resurrected write is seen: a thread's own counter at every visit, what
 * threads share in us_exercise_check().  A mutex is zeros when it is unlocked, so fresh memory is ready for use.
 */
#ifndef US_EXERCISE_H
#define US_EXERCISE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define US_EXERCISE_THREADS 16u

enum us_exercise_kind {
    US_EXERCISE_OWN = 1,    /* verify the thread's own counter and increment it */
    US_EXERCISE_ATOMIC = 2, /* increment a counter that all threads share */
    US_EXERCISE_LOCKED = 4  /* increment two counters under the page's mutex, which must be equal */
};

struct us_exercise_page {
    union {
        pthread_mutex_t lock;
        uint8_t room[64];
    };
    uint64_t locked, twin;
    _Atomic uint64_t shared;
    uint8_t gap[40];
    struct {
        uint64_t value;
        uint8_t gap[56];
    } own[US_EXERCISE_THREADS]; /* a cache line each */
};
_Static_assert(sizeof(struct us_exercise_page) <= 4096, "a page holds it");

struct us_exercise {
    uint8_t *memory;
    uint64_t pages;
    uint64_t steps; /* of each thread */
    uint64_t seed;
    uint32_t kinds;   /* enum us_exercise_kind, or-ed: a step is one of them */
    uint32_t reads;   /* of 256 steps so many only verify the thread's own counter */
    uint32_t stride;  /* 0: pages at random, else each thread walks by so many pages */
    uint32_t burst;   /* steps on a page before the next one */
    uint32_t hot;     /* every second visit goes to one of so many pages: they are written as they are evicted */
    uint32_t *own;    /* pages * US_EXERCISE_THREADS, zeros at first: what own[] should hold */
    uint32_t *atomic; /* likewise, the increments of shared */
    uint32_t *locked; /* likewise, of locked and twin */
    uint64_t done, lost, stop, first_lost_page; /* atomic: read and written while threads run */
};

/* Run one thread's steps; ends early when `stop` is set. Threads are the caller's: their signals are, too. */
void us_exercise_run(struct us_exercise *exercise, uint32_t thread);

/* Verify every page when no thread runs; adds to `lost`. */
void us_exercise_check(struct us_exercise *exercise);
#endif
