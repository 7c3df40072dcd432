struct us_simulate_setting {
    const struct us_eviction *eviction;
    const struct us_prefetch *prefetch;
    struct us_eviction_setting evict;
    bool stored;
    bool used_seen;
    uint64_t store_ns, fault_ns, touch_ns;
};
struct us_simulate_phase {
    uint64_t before;
    int64_t name;
};
struct us_simulate_result {
    uint64_t touches;
    uint64_t misses;
    uint64_t zeros;
    uint64_t rescued;
    uint64_t ahead, used, late, wasted;
    uint64_t stall_ns;
};
int us_simulate(const struct us_simulate_setting *setting, const uint32_t *touch, uint64_t touches,
                const struct us_simulate_phase *phase, uint64_t phases, struct us_simulate_result *result);
int us_simulate_best(const uint32_t *touch, uint64_t touches, uint64_t pages, uint32_t capacity, uint64_t *misses);
int64_t us_simulate_next(const uint32_t *touch, uint64_t touches, uint64_t pages, uint64_t *next);
