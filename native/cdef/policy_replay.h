uint32_t us_replay_recorded(void *state, int64_t phase, uint32_t *page, uint32_t most);
void us_replay_give(void *state, int64_t phase, const uint32_t *page, uint32_t count);
