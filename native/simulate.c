#include "simulate.h"
#include <errno.h>
#include <stdlib.h>

enum { ABSENT = 0, RESIDENT = 1, STAGED = 2, AHEAD = 4, TOUCHED = 8 /* ever */ };

#define AHEAD_SHARE 8u /* pages that nobody has touched yet take at most this part of the memory */

struct simulation {
    const struct us_simulate_setting *setting;
    const struct us_eviction *eviction;
    void *evict_state, *prefetch_state;
    uint8_t *state;
    uint64_t *arrives; /* of AHEAD pages */
    uint64_t clock;
    uint32_t resident, unused;
    struct us_simulate_result *result;
};

static void make_room(struct simulation *simulation) {
    uint32_t page;
    while (simulation->resident >= simulation->setting->evict.capacity &&
           simulation->eviction->victim(simulation->evict_state, &page)) {
        if (simulation->state[page] & AHEAD) {
            simulation->result->wasted++;
            simulation->unused--;
        }
        simulation->state[page] &= TOUCHED;
        simulation->resident--;
    }
}

static int bring_in(struct simulation *simulation, uint32_t page, uint8_t how) {
    make_room(simulation);
    if (!simulation->eviction->insert(simulation->evict_state, page, how == AHEAD))
        return -ENOMEM;
    simulation->resident++;
    simulation->state[page] |= RESIDENT | how;
    uint32_t out;
    while (simulation->eviction->stage(simulation->evict_state, &out))
        simulation->state[out] |= STAGED;
    return 0;
}

/* What the engine does with an answer: clips it, leaves out what is there, and no more than there is room for. */
static int read_page(struct simulation *simulation, int64_t page, bool zeros) {
    const struct us_simulate_setting *setting = simulation->setting;
    if (page < 0 || page >= (int64_t)setting->evict.pages || (simulation->state[page] & RESIDENT))
        return 0;
    bool reads = setting->stored || (simulation->state[page] & TOUCHED);
    if ((!reads && !zeros) || simulation->unused >= setting->evict.capacity / AHEAD_SHARE)
        return 0;
    simulation->result->ahead++;
    simulation->unused++;
    simulation->arrives[page] = simulation->clock + (reads ? setting->store_ns : 0);
    return bring_in(simulation, (uint32_t)page, AHEAD);
}

static int read_ahead(struct simulation *simulation, int64_t page, struct us_ahead ahead) {
    int rc = 0;
    for (uint32_t i = 1; i <= ahead.count && ahead.stride && !rc; i++)
        rc = read_page(simulation, page + ahead.stride * (int64_t)i, ahead.stride == 1);
    if (!ahead.runs)
        return rc;
    const struct us_ahead_run *run = simulation->setting->prefetch->runs(simulation->prefetch_state);
    for (uint32_t i = 0; i < ahead.runs; i++)
        for (uint32_t k = 0; k < run[i].count && !rc; k++)
            rc = read_page(simulation, run[i].first + k, false);
    return rc;
}

static void wait_for(struct simulation *simulation, uint64_t nanoseconds) {
    simulation->clock += nanoseconds;
    simulation->result->stall_ns += nanoseconds;
}

static int miss(struct simulation *simulation, uint32_t page) {
    const struct us_simulate_setting *setting = simulation->setting;
    bool reads = setting->stored || (simulation->state[page] & TOUCHED);
    simulation->result->misses++;
    simulation->result->zeros += !reads;
    int rc = bring_in(simulation, page, TOUCHED);
    if (!rc)
        rc = read_ahead(simulation, page, setting->prefetch->fault(simulation->prefetch_state, page));
    wait_for(simulation, setting->fault_ns + (reads ? setting->store_ns : 0));
    return rc;
}

/* A touch of a page that is in memory, where there is more to it than a touch. */
static void meet(struct simulation *simulation, uint32_t page) {
    const struct us_simulate_setting *setting = simulation->setting;
    uint8_t *state = &simulation->state[page];
    if (*state & AHEAD) {
        simulation->result->used++;
        simulation->unused--;
        if (simulation->arrives[page] > simulation->clock) {
            simulation->result->late++;
            wait_for(simulation, setting->fault_ns + simulation->arrives[page] - simulation->clock);
        }
        if (setting->used_seen)
            us_prefetch_used(setting->prefetch, simulation->prefetch_state, page);
    }
    if (*state & STAGED) {
        simulation->result->rescued++;
        wait_for(simulation, setting->fault_ns);
    }
    if ((*state & STAGED) || setting->evict.hits_seen)
        simulation->eviction->touch(simulation->evict_state, page);
    *state = RESIDENT | TOUCHED;
}

static int play(struct simulation *simulation, const uint32_t *touch, uint64_t touches, const struct us_simulate_phase *phase,
                uint64_t phases) {
    const struct us_simulate_setting *setting = simulation->setting;
    uint8_t plain = setting->evict.hits_seen ? 0 : RESIDENT | TOUCHED;
    int rc = 0;
    for (uint64_t i = 0, next = 0; i < touches && !rc; i++) {
        for (; next < phases && phase[next].before <= i; next++)
            rc = read_ahead(simulation, 0,
                            us_prefetch_hint(setting->prefetch, simulation->prefetch_state, US_HINT_PHASE, phase[next].name, 0));
        uint8_t state = simulation->state[touch[i]];
        simulation->clock += setting->touch_ns;
        if (state == plain && plain)
            continue;
        if (state & RESIDENT)
            meet(simulation, touch[i]);
        else if (!rc)
            rc = miss(simulation, touch[i]);
    }
    return rc;
}

int us_simulate(const struct us_simulate_setting *setting, const uint32_t *touch, uint64_t touches, const struct us_simulate_phase *phase,
                uint64_t phases, struct us_simulate_result *result) {
    *result = (struct us_simulate_result){.touches = touches};
    struct simulation simulation = {.setting = setting, .eviction = setting->eviction, .result = result};
    simulation.evict_state = setting->eviction->open(&setting->evict);
    simulation.prefetch_state = us_prefetch_new(setting->prefetch);
    simulation.state = calloc(setting->evict.pages, sizeof *simulation.state);
    simulation.arrives = calloc(setting->evict.pages, sizeof *simulation.arrives);
    int rc = -ENOMEM;
    if (simulation.evict_state && simulation.prefetch_state && simulation.state && simulation.arrives)
        rc = play(&simulation, touch, touches, phase, phases);
    if (simulation.evict_state)
        setting->eviction->close(simulation.evict_state);
    us_prefetch_free(simulation.prefetch_state);
    free(simulation.state);
    free(simulation.arrives);
    return rc;
}
