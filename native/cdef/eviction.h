struct us_eviction_setting {
    uint64_t pages;
    uint32_t capacity;
    uint32_t tail;
    uint32_t least;
    bool hits_seen;
    uint64_t seed;
};
struct us_eviction;
const struct us_eviction *us_eviction_find(const char *name);
const char *us_eviction_name(uint32_t n);
void *us_eviction_open(const struct us_eviction *policy, const struct us_eviction_setting *setting);
void us_eviction_close(const struct us_eviction *policy, void *state);
void us_eviction_resize(const struct us_eviction *policy, void *state, uint32_t capacity, uint32_t tail);
bool us_eviction_insert(const struct us_eviction *policy, void *state, uint32_t page, bool ahead);
void us_eviction_touch(const struct us_eviction *policy, void *state, uint32_t page);
bool us_eviction_stage(const struct us_eviction *policy, void *state, uint32_t *page);
bool us_eviction_victim(const struct us_eviction *policy, void *state, uint32_t *page);
