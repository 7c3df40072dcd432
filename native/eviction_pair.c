/* s3g, bip and auto: two queues, a small one for pages on probation and a main one for those that have earned it.
 *
 * s3g is S3-FIFO (Yang et al., SOSP 2023) for a pager, which sees no touches of resident pages but those in the tail: a page moves to
 * the main queue if it comes back soon after it left (its ghost is still there), or was touched in the tail.
 * bip is bimodal insertion (Qureshi et al., ISCA 2007): few new pages stay and all others leave soon, so that of a sweep larger than
 * the memory a fixed part stays.
 * auto runs each of these, and fifo, on a 128th of the pages, and the rest by the rule of the one that misses least (set duelling,
 * ibid.): what a pager does not see makes each the worst somewhere.
 */
#include "eviction.h"
#include "ghost.h"
#include <stdlib.h>

#define TOUCHES_MAX 3u
#define S3G_SMALL 10u  /* parts of one: what the small queue is of the capacity */
#define BIP_SMALL 256u
#define BIP_STAYS 32u  /* one of so many new pages stays */
#define DUEL_SETS 128u
#define DUEL_MAX 1024u  /* misses of one that count: then all are halved */
#define DUEL_MARGIN 8u  /* misses that another has to be ahead, */
#define DUEL_SHARE 16u  /* and this part of its own */

enum rule { RULE_S3G, RULE_BIP, RULE_FIFO, RULES };

struct pair {
    enum rule rule;
    struct us_ring small, main;
    struct us_ghost ghost;
    uint32_t capacity, small_size, main_size, least;
    bool full; /* it ever was; before, what does not fit on probation need not be */
};

/* What the pairs of one policy have in common. */
struct pairs {
    struct pair pair[1 + RULES]; /* one alone; or auto: everybody, then the samples of each rule */
    uint32_t count;
    uint8_t *touches;
    uint32_t tail, touches_stay; /* touches_stay: as many move a page on probation to the main queue */
    uint64_t draw;
    uint32_t missed[RULES]; /* auto: by the samples of each */
};

static void set_rule(struct pair *pair, enum rule rule) {
    uint32_t small = pair->capacity / (rule == RULE_S3G ? S3G_SMALL : BIP_SMALL);
    if (small < pair->least)
        small = pair->least < pair->capacity / 2 ? pair->least : pair->capacity / 2;
    if (rule == RULE_FIFO)
        small = pair->capacity;
    pair->rule = rule;
    pair->small_size = small;
    pair->main_size = pair->capacity - small;
}

static bool set_capacity(struct pair *pair, uint32_t capacity) {
    pair->capacity = capacity;
    set_rule(pair, pair->rule);
    return us_ghost_size(&pair->ghost, pair->main_size ? pair->main_size : 1);
}

static void pairs_resize(void *state, uint32_t capacity, uint32_t tail) {
    struct pairs *pairs = state;
    uint32_t sample = pairs->count > 1 ? capacity / DUEL_SETS : 0;
    pairs->tail = tail;
    set_capacity(&pairs->pair[0], capacity - (pairs->count - 1) * sample);
    for (uint32_t i = 1; i < pairs->count; i++)
        set_capacity(&pairs->pair[i], sample);
}

static void pairs_close(void *state) {
    struct pairs *pairs = state;
    for (uint32_t i = 0; i < pairs->count; i++) {
        us_ring_free(&pairs->pair[i].small);
        us_ring_free(&pairs->pair[i].main);
        us_ghost_free(&pairs->pair[i].ghost);
    }
    free(pairs->touches);
    free(pairs);
}

static void *pairs_open(const struct us_eviction_setting *setting, uint32_t count, enum rule rule) {
    struct pairs *pairs = calloc(1, sizeof *pairs);
    if (!pairs)
        return NULL;
    pairs->count = count;
    pairs->draw = setting->seed;
    pairs->touches_stay = setting->hits_seen ? 2 : 1; /* where all touches are seen, one soon after the first says little */
    pairs->touches = calloc(setting->pages, 1);
    for (uint32_t i = 0; i < count; i++) {
        pairs->pair[i].rule = i ? (enum rule)(i - 1) : rule;
        pairs->pair[i].least = i ? setting->least / DUEL_SETS : setting->least;
    }
    pairs_resize(pairs, setting->capacity, setting->tail);
    bool whole = pairs->touches != NULL;
    for (uint32_t i = 0; i < count; i++)
        whole = whole && pairs->pair[i].ghost.entry;
    if (whole)
        return pairs;
    pairs_close(pairs);
    return NULL;
}

static void *s3g_open(const struct us_eviction_setting *setting) { return pairs_open(setting, 1, RULE_S3G); }
static void *bip_open(const struct us_eviction_setting *setting) { return pairs_open(setting, 1, RULE_BIP); }
static void *auto_open(const struct us_eviction_setting *setting) { return pairs_open(setting, 1 + RULES, RULE_S3G); }

/* Of each 128 neighbours one is a sample of each rule's: all see the same mix of what a program touches.  Which ones is mixed by
 * block, so that no stride meets one kind alone. */
static struct pair *pair_of(struct pairs *pairs, uint32_t page) {
    if (pairs->count == 1)
        return &pairs->pair[0];
    uint32_t mixed = (uint32_t)us_mix(page / DUEL_SETS), half = DUEL_SETS / 2;
    uint32_t distance = (page - mixed) % DUEL_SETS; /* from a place of the block's own */
    if (distance == 0)
        return &pairs->pair[1 + RULE_S3G];
    if (distance == 1 + (mixed >> 8) % (half - 1))
        return &pairs->pair[1 + RULE_BIP];
    return &pairs->pair[distance == half + (mixed >> 16) % half ? 1 + RULE_FIFO : 0];
}

static void count_miss(struct pairs *pairs, const struct pair *pair) {
    if (pair == &pairs->pair[0])
        return;
    if (++pairs->missed[pair->rule] > DUEL_MAX)
        for (unsigned rule = 0; rule < RULES; rule++)
            pairs->missed[rule] /= 2;
    struct pair *others = &pairs->pair[0];
    enum rule best = RULE_S3G;
    for (unsigned rule = 1; rule < RULES; rule++)
        if (pairs->missed[rule] < pairs->missed[best])
            best = (enum rule)rule;
    /* not for little: what the others' queues hold is the work of the rule that they had, and a change costs */
    if (pairs->missed[others->rule] > pairs->missed[best] + pairs->missed[best] / DUEL_SHARE + DUEL_MARGIN)
        set_rule(others, best);
}

static bool pairs_insert(void *state, uint32_t page, bool ahead) {
    struct pairs *pairs = state;
    struct pair *pair = pair_of(pairs, page);
    bool back = !ahead && us_ghost_take(&pair->ghost, page);
    bool stays = back && pair->rule == RULE_S3G;
    if (!pair->full && !ahead)
        stays = us_ring_count(&pair->small) >= pair->small_size;
    if (!us_ring_push(stays ? &pair->main : &pair->small, page))
        return false;
    pairs->touches[page] = 0;
    if (!ahead)
        count_miss(pairs, pair);
    return true;
}

static void pairs_touch(void *state, uint32_t page) {
    struct pairs *pairs = state;
    if (pairs->touches[page] < TOUCHES_MAX)
        pairs->touches[page]++;
}

static bool pairs_stage(void *state, uint32_t *page) {
    struct pairs *pairs = state;
    for (uint32_t i = 0; i < pairs->count; i++)
        if (us_ring_stage(&pairs->pair[i].small, pairs->tail, pairs->touches, page) ||
            us_ring_stage(&pairs->pair[i].main, pairs->tail, pairs->touches, page))
            return true;
    return false;
}

/* Whether the oldest page of a queue goes; else it stays a while, in the main queue. */
static bool step(struct pairs *pairs, struct pair *pair, bool main, uint32_t *page) {
    *page = us_ring_pop(main ? &pair->main : &pair->small);
    uint8_t *touches = &pairs->touches[*page];
    bool stays = main ? *touches != 0 : *touches >= pairs->touches_stay;
    if (!main && pair->rule == RULE_BIP)
        stays = stays || us_ring_count(&pair->main) < pair->main_size || us_random(&pairs->draw) % BIP_STAYS == 0;
    if (stays && us_ring_push(&pair->main, *page)) {
        *touches = main ? *touches - 1 : 0;
        return false;
    }
    if (!main || pairs->touches_stay == 1)
        us_ghost_add(&pair->ghost, *page);
    return true;
}

/* Which queue is too long is asked once: probation ends for some, but one of those on probation goes. */
static void send_out(struct pairs *pairs, struct pair *pair, uint32_t *page) {
    bool main = us_ring_count(&pair->main) > pair->main_size, gone = false;
    pair->full = true;
    while (!gone)
        gone = step(pairs, pair, main || !us_ring_count(&pair->small), page);
}

static bool pairs_victim(void *state, uint32_t *page) {
    struct pairs *pairs = state;
    struct pair *fullest = NULL;
    int64_t most = 0;
    for (uint32_t i = 0; i < pairs->count; i++) {
        struct pair *pair = &pairs->pair[i];
        int64_t count = (int64_t)(us_ring_count(&pair->small) + us_ring_count(&pair->main)), over = count - pair->capacity;
        if (count && (!fullest || over > most)) {
            fullest = pair;
            most = over;
        }
    }
    if (!fullest)
        return false;
    send_out(pairs, fullest, page);
    return true;
}

const struct us_eviction us_eviction_s3g = {
    "s3g", s3g_open, pairs_close, pairs_resize, pairs_insert, pairs_touch, pairs_stage, pairs_victim};
const struct us_eviction us_eviction_bip = {
    "bip", bip_open, pairs_close, pairs_resize, pairs_insert, pairs_touch, pairs_stage, pairs_victim};
const struct us_eviction us_eviction_auto = {
    "auto", auto_open, pairs_close, pairs_resize, pairs_insert, pairs_touch, pairs_stage, pairs_victim};
