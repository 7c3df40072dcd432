/* What the prefetch policy `replay` recorded, to be kept beyond its state: a restored process then begins with its working set. */
#ifndef US_POLICY_REPLAY_H
#define US_POLICY_REPLAY_H
#include <stdint.h>

/* The pages of a phase in the order of their first faults, by groups; how many there are, of which at most `most` are written.
 * If it is being recorded, that ends, and its replay begins. */
uint32_t us_replay_recorded(void *state, int64_t phase, uint32_t *page, uint32_t most);
/* As if they had been recorded; if the phase is under way, its replay begins. */
void us_replay_give(void *state, int64_t phase, const uint32_t *page, uint32_t count);
#endif
