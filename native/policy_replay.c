/* replay: records the pages that a phase of the program faults on first, and when the phase begins again reads them in that order
 * (REAP, ASPLOS 2021; FaaSnap, EuroSys 2022).  The hint US_HINT_PHASE names a phase; what comes before is a phase too, 0.
 *
 * Groups of pages in the order of their first faults, sorted inside, so that neighbours are one read.  A replay is at most two
 * groups ahead of the program, which is known to be where its last fault was recorded; what it has overtaken is not read.  Faults
 * that were never recorded say that the phase is another one by now: then the replay ends and the phase is recorded anew.
 */
#include "policy_replay.h"
#include "readahead.h"
#include <stdlib.h>
#include <string.h>

#define PHASES 16u
#define GROUP 128u         /* pages */
#define LEAD 2u            /* groups */
#define RECORDED (1u << 18) /* pages of a phase: 1 GiB */
#define SEEN (1u << 19)
#define RUNS (1u << 18)    /* of all phases */
#define GROUPS (1u << 12)
#define STRANGE 64u        /* so many unrecorded faults, and more than half as many as pages read, end a replay */

struct group {
    uint32_t run, runs; /* where its runs are */
};

struct phase {
    int64_t name;
    bool known;
    uint32_t group, groups;
};

struct replay {
    struct phase phase[PHASES];
    uint32_t phases;
    struct phase *current;
    bool replaying;
    uint32_t record[RECORDED], recorded;
    struct { uint32_t page, stamp; } seen[SEEN]; /* pages recorded in this phase */
    uint32_t stamp;
    struct us_ahead_run run[RUNS];
    struct group group[GROUPS];
    uint32_t runs, groups;
    uint32_t at, next_group, next_run; /* replaying: the group of the last known fault; what to read next */
    uint32_t strange, read;
    struct us_ahead_run answer[US_AHEAD_RUNS];
};

static void begin_recording(struct replay *replay) {
    replay->replaying = false;
    replay->recorded = 0;
    replay->stamp++;
    replay->current->known = false;
}

static struct phase *phase_of(struct replay *replay, int64_t name) {
    for (uint32_t i = 0; i < replay->phases; i++)
        if (replay->phase[i].name == name)
            return &replay->phase[i];
    struct phase *phase = &replay->phase[replay->phases < PHASES ? replay->phases++ : PHASES - 1];
    *phase = (struct phase){.name = name};
    return phase;
}

static void replay_init(void *state) {
    struct replay *replay = state;
    replay->current = phase_of(replay, 0);
    begin_recording(replay);
}

static void record(struct replay *replay, uint32_t page) {
    uint32_t at = (page * 2654435761u) >> 13;
    for (; replay->seen[at].stamp == replay->stamp; at = (at + 1) % SEEN)
        if (replay->seen[at].page == page)
            return;
    if (replay->recorded == RECORDED)
        return;
    replay->seen[at].page = page;
    replay->seen[at].stamp = replay->stamp;
    replay->record[replay->recorded++] = page;
}

static int compare(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void add_group(struct replay *replay, uint32_t *page, uint32_t count) {
    struct group *group = &replay->group[replay->groups++];
    *group = (struct group){.run = replay->runs};
    qsort(page, count, sizeof *page, compare);
    for (uint32_t i = 0; i < count; i++) {
        struct us_ahead_run *last = group->runs ? &replay->run[replay->runs - 1] : NULL;
        if (last && page[i] == last->first + last->count) {
            last->count++;
        } else {
            replay->run[replay->runs++] = (struct us_ahead_run){page[i], 1};
            group->runs++;
        }
    }
}

/* What was recorded becomes the phase's; with no room left for it, all other phases are forgotten. */
static void end_recording(struct replay *replay) {
    struct phase *phase = replay->current;
    uint32_t groups = (replay->recorded + GROUP - 1) / GROUP;
    if (replay->replaying || !replay->recorded)
        return;
    if (replay->groups + groups > GROUPS || replay->runs + replay->recorded > RUNS) {
        for (uint32_t i = 0; i < replay->phases; i++)
            replay->phase[i].known = false;
        replay->groups = replay->runs = 0;
    }
    phase->group = replay->groups;
    phase->groups = groups;
    phase->known = true;
    for (uint32_t done = 0; done < replay->recorded; done += GROUP)
        add_group(replay, replay->record + done, replay->recorded - done < GROUP ? replay->recorded - done : GROUP);
    replay->recorded = 0;
}

static bool group_has(const struct replay *replay, uint32_t number, int64_t page) {
    const struct group *group = &replay->group[replay->current->group + number];
    uint32_t low = 0, high = group->runs;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct us_ahead_run *run = &replay->run[group->run + middle];
        if (page >= run->first && page < run->first + run->count)
            return true;
        if (page < run->first)
            high = middle;
        else
            low = middle + 1;
    }
    return false;
}

/* The next pages to read, as far as the lead allows. */
static struct us_ahead read_on(struct replay *replay) {
    uint32_t runs = 0, pages = 0, groups = replay->current->groups;
    while (runs < US_AHEAD_RUNS && replay->next_group < groups && replay->next_group <= replay->at + LEAD) {
        const struct group *group = &replay->group[replay->current->group + replay->next_group];
        if (replay->next_run == group->runs) {
            replay->next_group++;
            replay->next_run = 0;
            continue;
        }
        const struct us_ahead_run *run = &replay->run[group->run + replay->next_run];
        if (pages && pages + run->count > US_AHEAD_PAGES)
            break;
        replay->answer[runs++] = *run; /* at most a group: longer than an answer's share only when alone */
        pages += run->count;
        replay->next_run++;
    }
    replay->read += pages;
    return (struct us_ahead){0, 0, runs};
}

static struct us_ahead replay_fault(void *state, int64_t wide) {
    struct replay *replay = state;
    uint32_t page = (uint32_t)wide, last = replay->next_group + 1;
    if (!replay->replaying) {
        record(replay, page);
        return (struct us_ahead){0, 0, 0};
    }
    if (last >= replay->current->groups)
        last = replay->current->groups - 1;
    for (uint32_t number = replay->at; number <= last; number++) {
        if (!group_has(replay, number, page))
            continue;
        replay->at = number;
        if (number > replay->next_group) { /* the program is faster */
            replay->next_group = number;
            replay->next_run = 0;
        }
        return read_on(replay);
    }
    if (++replay->strange > STRANGE && replay->strange > replay->read / 2) {
        begin_recording(replay);
        record(replay, page);
        return (struct us_ahead){0, 0, 0};
    }
    return read_on(replay);
}

static void replay_begin(struct replay *replay, int64_t name) {
    end_recording(replay);
    replay->current = phase_of(replay, name);
    if (!replay->current->known) {
        begin_recording(replay);
        return;
    }
    replay->replaying = true;
    replay->at = replay->next_group = replay->next_run = replay->strange = replay->read = 0;
}

static struct us_ahead replay_hint(void *state, enum us_hint hint, int64_t first, int64_t count) {
    struct replay *replay = state;
    (void)hint; /* there is one */
    (void)count;
    replay_begin(replay, first);
    return replay->replaying ? read_on(replay) : (struct us_ahead){0, 0, 0};
}

static const struct us_ahead_run *replay_runs(const void *state) { return ((const struct replay *)state)->answer; }

uint32_t us_replay_recorded(void *state, int64_t name, uint32_t *page, uint32_t most) {
    struct replay *replay = state;
    if (replay->current->name == name && !replay->replaying)
        replay_begin(replay, name);
    struct phase *phase = phase_of(replay, name);
    uint32_t found = 0;
    for (uint32_t i = 0; phase->known && i < phase->groups; i++) {
        const struct group *group = &replay->group[phase->group + i];
        for (uint32_t k = group->run; k < group->run + group->runs; k++)
            for (uint32_t n = 0; n < replay->run[k].count; n++, found++)
                if (found < most)
                    page[found] = (uint32_t)(replay->run[k].first + n);
    }
    return found;
}

void us_replay_give(void *state, int64_t name, const uint32_t *page, uint32_t count) {
    struct replay *replay = state;
    int64_t under_way = replay->current->name;
    end_recording(replay);
    replay->current = phase_of(replay, name);
    begin_recording(replay);
    for (uint32_t i = 0; i < count; i++)
        record(replay, page[i]);
    end_recording(replay);
    replay_begin(replay, under_way);
}

const struct us_prefetch us_prefetch_replay = {
    .name = "replay",
    .state_bytes = sizeof(struct replay),
    .init = replay_init,
    .fault = replay_fault,
    .runs = replay_runs,
    .hint = replay_hint,
};
