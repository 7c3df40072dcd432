struct us_ahead {
    int64_t stride;
    uint32_t count;
};
struct us_prefetch;
const struct us_prefetch *us_prefetch_find(const char *name);
const char *us_prefetch_name(uint32_t n);
void *us_prefetch_new(const struct us_prefetch *policy);
struct us_ahead us_prefetch_fault(const struct us_prefetch *policy, void *state, int64_t page);
void us_prefetch_free(void *state);
