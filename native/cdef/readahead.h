struct us_ahead {
    int64_t stride;
    uint32_t count;
    uint32_t runs;
};
struct us_ahead_run {
    int64_t first;
    uint32_t count;
};
enum us_hint { US_HINT_PHASE, ... };
struct us_prefetch;
const struct us_prefetch *us_prefetch_find(const char *name);
const char *us_prefetch_name(uint32_t n);
void *us_prefetch_new(const struct us_prefetch *policy);
struct us_ahead us_prefetch_fault(const struct us_prefetch *policy, void *state, int64_t page);
const struct us_ahead_run *us_prefetch_runs(const struct us_prefetch *policy, const void *state);
void us_prefetch_used(const struct us_prefetch *policy, void *state, int64_t page);
struct us_ahead us_prefetch_hint(const struct us_prefetch *policy, void *state, int hint, int64_t first, int64_t count);
void us_prefetch_free(void *state);
