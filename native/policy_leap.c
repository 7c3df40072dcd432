/* leap: the majority trend of the last faults (Al Maruf and Chowdhury, ATC 2020), as a baseline.
 *
 * Hits belong to its history.  Few are seen here, so a fault at the window's edge puts the window's pages there: else the
 * distances between faults would be those between windows.
 */
#include "readahead.h"

#define HISTORY 32u
#define WINDOW_MAX 8

struct leap {
    int64_t delta[HISTORY]; /* distances between touches, the newest at count - 1 */
    uint32_t count;
    int64_t previous, trend;
    int64_t window, hits;
    struct us_ahead_run before;
};

static void leap_init(void *state) { ((struct leap *)state)->previous = INT64_MIN / 2; }

static int64_t delta_at(const struct leap *leap, uint32_t age) { return leap->delta[(leap->count - 1 - age) % HISTORY]; }

static void remember(struct leap *leap, int64_t page) {
    leap->delta[leap->count++ % HISTORY] = page - leap->previous;
    leap->previous = page;
}

/* Boyer and Moore's majority vote over the newest distances; over ever more of them while there is none. */
static int64_t find_trend(const struct leap *leap) {
    uint32_t known = leap->count < HISTORY ? leap->count : HISTORY;
    for (uint32_t width = HISTORY / 4; width <= HISTORY; width *= 2) {
        uint32_t seen = width < known ? width : known, votes = 0, found = 0;
        int64_t candidate = 0;
        for (uint32_t i = 0; i < seen; i++) {
            int64_t delta = delta_at(leap, i);
            if (!votes)
                candidate = delta;
            if (delta == candidate)
                votes++;
            else
                votes--;
        }
        for (uint32_t i = 0; i < seen; i++)
            found += delta_at(leap, i) == candidate;
        if (candidate && found > seen / 2)
            return candidate;
        if (seen == known)
            break;
    }
    return 0;
}

static int64_t next_window(const struct leap *leap, bool follows) {
    int64_t window = 1;
    if (!leap->hits)
        window = follows;
    else
        while (window < leap->hits + 1)
            window *= 2;
    if (window > WINDOW_MAX)
        window = WINDOW_MAX;
    return window > leap->window / 2 ? window : leap->window / 2; /* shrinks slowly */
}

static struct us_ahead leap_fault(void *state, int64_t page) {
    struct leap *leap = state;
    if (!leap->hits && leap->window && leap->trend && page == leap->previous + leap->trend * (leap->window + 1)) {
        leap->hits = leap->window;
        for (int64_t i = 0; i < leap->window; i++)
            remember(leap, leap->previous + leap->trend);
    }
    bool follows = leap->trend && page == leap->previous + leap->trend;
    remember(leap, page);
    int64_t trend = find_trend(leap), window = next_window(leap, follows);
    leap->window = window;
    leap->hits = 0;
    leap->before.count = 0;
    if (trend) {
        leap->trend = trend;
        return (struct us_ahead){window ? trend : 0, (uint32_t)window, 0};
    }
    int64_t before = window / 2; /* no trend: around the page */
    leap->before = (struct us_ahead_run){page - before, (uint32_t)before};
    return (struct us_ahead){window > before ? 1 : 0, (uint32_t)(window - before), before != 0};
}

static const struct us_ahead_run *leap_runs(const void *state) { return &((const struct leap *)state)->before; }

static void leap_used(void *state, int64_t page) {
    struct leap *leap = state;
    remember(leap, page);
    leap->hits++;
}

const struct us_prefetch us_prefetch_leap = {
    .name = "leap",
    .state_bytes = sizeof(struct leap),
    .init = leap_init,
    .fault = leap_fault,
    .runs = leap_runs,
    .used = leap_used,
};
