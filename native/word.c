#include "word.h"
#include <stdio.h>
#include <stdlib.h>

#define TO(state) (1u << (state))

const uint16_t us_transitions[US_STATES] = {
    [US_ZERO] = TO(US_FILLING),
    [US_FILLING] = TO(US_CLEAN) | TO(US_DIRTY) | TO(US_ZERO) | TO(US_STORED) | TO(US_POISONED),
    [US_CLEAN] = TO(US_UNPROTECTING) | TO(US_MOVING) | TO(US_DROPPING) | TO(US_PROTECTED),
    [US_UNPROTECTING] = TO(US_DIRTY) | TO(US_CLEAN),
    [US_DIRTY] = TO(US_UNPROTECTING) | TO(US_MOVING) | TO(US_DROPPING) | TO(US_PROTECTED),
    [US_MOVING] = TO(US_LEAVING) | TO(US_DIRTY) | TO(US_ZERO),
    [US_LEAVING] = TO(US_FILLING) | TO(US_STORED) | TO(US_ZERO),
    [US_DROPPING] = TO(US_STORED) | TO(US_ZERO) | TO(US_CLEAN) | TO(US_DIRTY),
    [US_STORED] = TO(US_FILLING) | TO(US_ZERO),
    [US_POISONED] = TO(US_DROPPING),
    [US_PROTECTED] = TO(US_UNPROTECTING) | TO(US_DROPPING) | TO(US_DIRTY),
};

void us_word_check(uint64_t from, uint64_t to) {
    enum us_state a = us_state_of(from), b = us_state_of(to);
    bool allowed = a < US_STATES && b < US_STATES && (a == b || (us_transitions[a] >> b & 1));
    /* invariant 5: a page with a store operation in flight is not a victim */
    if (allowed && (from & US_BUSY) && a != b && (b == US_MOVING || b == US_PROTECTED) && us_state_is_resident(a))
        allowed = false;
    /* invariant 1: a waiter is only recorded where the end of the state will wake it */
    if (allowed && (to & US_WAITER) && (us_state_is_resident(b) || b == US_ZERO || b == US_STORED || b == US_POISONED))
        allowed = false;
    if (!allowed) {
        fprintf(stderr, "userswap: page word %#llx may not become %#llx (state %d -> %d)\n", (unsigned long long)from,
                (unsigned long long)to, (int)a, (int)b);
        abort();
    }
}

uint64_t us_word_leave(us_word *word, enum us_state from, enum us_state to, uint64_t handle, uint64_t clear, uint64_t set) {
    uint64_t seen = atomic_load(word);
    for (;;) {
        if (us_state_of(seen) != from)
            return seen;
        uint64_t next = us_with_handle(us_with_state(seen, to), handle);
        next = (next & ~(clear | US_WAITER)) | set;
        if (us_word_swap(word, &seen, next))
            return seen;
    }
}
