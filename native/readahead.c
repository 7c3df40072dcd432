/* The prefetch policies by name, and `none`; each of the others has a file, native/policy_NAME.c. */
#include "readahead.h"
#include <stdlib.h>
#include <string.h>

static void none_init(void *state) { (void)state; }

static struct us_ahead none_fault(void *state, int64_t page) {
    (void)state;
    (void)page;
    return (struct us_ahead){0, 0, 0};
}

static const struct us_prefetch us_prefetch_none = {.name = "none", .state_bytes = 1, .init = none_init, .fault = none_fault};

static const struct us_prefetch *const policies[] = {
    &us_prefetch_streams, &us_prefetch_linux, &us_prefetch_leap, &us_prefetch_successor, &us_prefetch_replay, &us_prefetch_none,
};
#define POLICIES (sizeof policies / sizeof *policies)

const struct us_prefetch *us_prefetch_find(const char *name) {
    for (unsigned i = 0; i < POLICIES; i++)
        if (strcmp(policies[i]->name, name) == 0)
            return policies[i];
    return NULL;
}

const char *us_prefetch_name(uint32_t n) { return n < POLICIES ? policies[n]->name : NULL; }

void *us_prefetch_new(const struct us_prefetch *policy) {
    void *state = calloc(1, policy->state_bytes); /* large ones take memory only where they are used */
    if (state)
        policy->init(state);
    return state;
}

struct us_ahead us_prefetch_fault(const struct us_prefetch *policy, void *state, int64_t page) {
    return policy->fault(state, page);
}

const struct us_ahead_run *us_prefetch_runs(const struct us_prefetch *policy, const void *state) {
    return policy->runs ? policy->runs(state) : NULL;
}

void us_prefetch_used(const struct us_prefetch *policy, void *state, int64_t page) {
    if (policy->used)
        policy->used(state, page);
}

struct us_ahead us_prefetch_hint(const struct us_prefetch *policy, void *state, int hint, int64_t first, int64_t count) {
    if (!policy->hint || hint < 0 || hint >= US_HINTS)
        return (struct us_ahead){0, 0, 0};
    return policy->hint(state, (enum us_hint)hint, first, count);
}

void us_prefetch_free(void *state) { free(state); }
