/* successor: what followed a page's last fault will follow this one (temporal prefetching: global history buffer, ISB, MITHRIL).
 * For linked structures and for sweeps in an order that is irregular and comes again.
 *
 * A log of faults, and where in it each page stands last.  A fault at the log's next page bears a context out; only then are
 * its successors read, ever more of them while faults go on to come at the edge of what was read.  Pages that were read do not
 * fault: the edge puts them in the log too, or else the next round would find only the edges.
 */
#include "readahead.h"

#define LOG (1u << 17)  /* a power of two; 4 bytes each */
#define PLACES (1u << 18) /* where pages stand: a power of two, 8 bytes each */
#define CONTEXTS 8u
#define WINDOW_FIRST 2u
#define WINDOW_MAX 32u
#define SLACK 4u       /* pages at the edge that may have been resident */
#define PROVEN_LOW 3u  /* faults in a row that bear a context out, where few contexts are kept */

struct context {
    uint32_t next;   /* in the log: what should fault next */
    uint32_t window; /* pages before `next` that were read */
    uint32_t kept;   /* faults that bore it out */
    uint32_t used;   /* for LRU; 0: none */
};

struct place {
    uint32_t page, at; /* at: position + 1 */
};

struct successor {
    uint32_t log[LOG];
    struct place place[PLACES];
    uint32_t head; /* positions count on; an entry of the log is good while head - position <= LOG */
    struct context context[CONTEXTS];
    uint32_t clock;
    struct us_trust trust;
    struct us_ahead_run run[US_AHEAD_RUNS];
};

static void successor_init(void *state) { ((struct successor *)state)->trust.score = US_TRUST_START; }

static struct place *place_of(struct successor *successor, uint32_t page) {
    return &successor->place[(page * 2654435761u) >> 14];
}

static void append(struct successor *successor, uint32_t page) {
    uint32_t at = successor->head++;
    successor->log[at % LOG] = page;
    *place_of(successor, page) = (struct place){page, at + 1};
}

/* Whether the log still has what stood at a position. */
static bool is_logged(const struct successor *successor, uint32_t at) {
    uint32_t age = successor->head - at;
    return age != 0 && age <= LOG;
}

/* The context that the fault bears out; what it had read goes into the log as if it had faulted. */
static struct context *find_context(struct successor *successor, uint32_t page) {
    for (unsigned i = 0; i < CONTEXTS; i++) {
        struct context *context = &successor->context[i];
        if (!context->used)
            continue;
        uint32_t slack = context->window < SLACK ? context->window : SLACK;
        for (uint32_t step = 0; step <= slack; step++) {
            uint32_t at = context->next + step;
            if (!is_logged(successor, at) || successor->log[at % LOG] != page)
                continue;
            for (uint32_t past = context->window + step; past; past--)
                if (is_logged(successor, at - past))
                    append(successor, successor->log[(at - past) % LOG]);
            context->next = at + 1;
            return context;
        }
    }
    return NULL;
}

static struct context *begin_context(struct successor *successor, uint32_t after) {
    struct context *oldest = &successor->context[0];
    for (unsigned i = 1; i < CONTEXTS; i++)
        if (successor->context[i].used < oldest->used)
            oldest = &successor->context[i];
    us_trust_begun(&successor->trust);
    *oldest = (struct context){.next = after};
    return oldest;
}

/* The successors as runs; how many runs. */
static uint32_t read_on(struct successor *successor, struct context *context, uint32_t want) {
    uint32_t runs = 0;
    context->window = 0;
    while (context->window < want && is_logged(successor, context->next)) {
        int64_t page = successor->log[context->next % LOG];
        struct us_ahead_run *last = runs ? &successor->run[runs - 1] : NULL;
        if (last && page == last->first + last->count)
            last->count++;
        else if (runs < US_AHEAD_RUNS)
            successor->run[runs++] = (struct us_ahead_run){page, 1};
        else
            break;
        context->next++;
        context->window++;
    }
    return runs;
}

static struct us_ahead successor_fault(void *state, int64_t wide) {
    struct successor *successor = state;
    uint32_t page = (uint32_t)wide, window, runs = 0;
    struct context *context = find_context(successor, page);
    if (context) {
        if (!context->kept++)
            us_trust_kept(&successor->trust);
        window = context->window ? context->window * 2 : WINDOW_FIRST;
        bool proven = context->window || !us_trust_is_low(&successor->trust) || context->kept >= PROVEN_LOW;
        runs = proven ? read_on(successor, context, window < WINDOW_MAX ? window : WINDOW_MAX) : 0;
    } else {
        struct place *place = place_of(successor, page);
        if (place->at && place->page == page && is_logged(successor, place->at - 1))
            context = begin_context(successor, place->at);
    }
    if (context)
        context->used = ++successor->clock;
    append(successor, page);
    return (struct us_ahead){0, 0, runs};
}

static const struct us_ahead_run *successor_runs(const void *state) { return ((const struct successor *)state)->run; }

const struct us_prefetch us_prefetch_successor = {
    .name = "successor",
    .state_bytes = sizeof(struct successor),
    .init = successor_init,
    .fault = successor_fault,
    .runs = successor_runs,
};
