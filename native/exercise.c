#include "exercise.h"
#include <stdbool.h>

#define PAGE 4096u
#define REPORT_EVERY 64u

static uint64_t next_random(uint64_t *state) { /* xorshift64*; the state is never 0 */
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 2685821657736338717ull;
}

static struct us_exercise_page *page_at(const struct us_exercise *exercise, uint64_t page) {
    return (struct us_exercise_page *)(exercise->memory + page * PAGE);
}

static void lose(struct us_exercise *exercise, uint64_t page) {
    if (__atomic_fetch_add(&exercise->lost, 1, __ATOMIC_RELAXED) == 0)
        __atomic_store_n(&exercise->first_lost_page, page, __ATOMIC_RELAXED);
}

/* Volatile: every visit is a real access, and the value that is verified is the value that is incremented. */
static void visit_own(struct us_exercise *exercise, uint64_t page, uint32_t thread, bool write) {
    volatile uint64_t *counter = &page_at(exercise, page)->own[thread].value;
    uint32_t *expected = &exercise->own[page * US_EXERCISE_THREADS + thread];
    uint64_t value = *counter;
    if (value != *expected) {
        lose(exercise, page);
        *expected = (uint32_t)value;
    }
    if (write) {
        *counter = value + 1;
        ++*expected;
    }
}

static void visit_locked(struct us_exercise *exercise, uint64_t page, uint32_t thread) {
    struct us_exercise_page *at = page_at(exercise, page);
    pthread_mutex_lock(&at->lock);
    bool equal = at->locked == at->twin;
    at->locked++;
    at->twin++;
    pthread_mutex_unlock(&at->lock);
    exercise->locked[page * US_EXERCISE_THREADS + thread]++;
    if (!equal)
        lose(exercise, page);
}

/* kind 0: only verify */
static void step(struct us_exercise *exercise, uint64_t page, uint32_t thread, uint32_t kind) {
    if (!kind || kind == US_EXERCISE_OWN) {
        visit_own(exercise, page, thread, kind);
    } else if (kind == US_EXERCISE_ATOMIC) {
        atomic_fetch_add(&page_at(exercise, page)->shared, 1);
        exercise->atomic[page * US_EXERCISE_THREADS + thread]++;
    } else {
        visit_locked(exercise, page, thread);
    }
}

static uint64_t next_page(const struct us_exercise *exercise, uint64_t page, uint64_t random) {
    if (exercise->hot && random & 1)
        return (random >> 1) % exercise->hot;
    return (exercise->stride ? page + exercise->stride : random >> 1) % exercise->pages;
}

void us_exercise_run(struct us_exercise *exercise, uint32_t thread) {
    uint64_t state = exercise->seed * 6364136223846793005ull + thread * 1442695040888963407ull + 1, page = 0;
    uint32_t kind[3], kinds = 0;
    if (thread >= US_EXERCISE_THREADS || !exercise->kinds)
        return;
    state = state ? state : 1;
    for (uint32_t bit = 1; bit <= US_EXERCISE_LOCKED; bit <<= 1)
        if (exercise->kinds & bit)
            kind[kinds++] = bit;
    for (uint64_t i = 1; i <= exercise->steps; i++) {
        uint64_t random = next_random(&state);
        if (exercise->burst < 2 || i % exercise->burst == 0)
            page = next_page(exercise, page, random >> 16);
        step(exercise, page, thread, random % 256 < exercise->reads ? 0 : kind[(random >> 32) % kinds]);
        if (i % REPORT_EVERY == 0) {
            __atomic_fetch_add(&exercise->done, REPORT_EVERY, __ATOMIC_RELAXED);
            if (__atomic_load_n(&exercise->stop, __ATOMIC_RELAXED))
                return;
        }
    }
    __atomic_fetch_add(&exercise->done, exercise->steps % REPORT_EVERY, __ATOMIC_RELAXED);
}

void us_exercise_check(struct us_exercise *exercise) {
    for (uint64_t page = 0; page < exercise->pages; page++) {
        const struct us_exercise_page *at = page_at(exercise, page);
        uint64_t atomic = 0, locked = 0;
        bool good = true;
        for (uint32_t thread = 0; thread < US_EXERCISE_THREADS; thread++) {
            uint64_t tally = page * US_EXERCISE_THREADS + thread;
            good = good && at->own[thread].value == exercise->own[tally];
            atomic += exercise->atomic[tally];
            locked += exercise->locked[tally];
        }
        if (!good || at->shared != atomic || at->locked != locked || at->twin != locked)
            lose(exercise, page);
    }
}
