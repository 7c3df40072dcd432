struct us_report {
    uint64_t limit, charged, leaving, kept;
    uint64_t zero, load, awaited, rescue, protect, spurious, forgotten, parked;
    uint64_t ahead, dropped, moved, refused, put_back, full, over_budget, lost, vanished;
    int32_t is_full, is_refused, agent_late, cpu;
    uint32_t held;
};

struct us_batch_report {
    struct us_region *region;
    uint64_t moved;
    uint8_t *buffer;
    uint32_t pages;
    uint32_t index[64];
};

void us_region_report(struct us_region *region, struct us_report *out);
struct us_region *us_client_stuck(struct us_client *client);
struct us_region *us_client_parked(struct us_client *client);
struct us_region *us_client_full(struct us_client *client);
struct us_region *us_client_held(struct us_client *client);
void us_region_census(struct us_region *region, uint64_t *pages);
uint64_t us_region_latency(const struct us_region *region, int awaited, double fraction);
uint64_t us_region_latency_count(const struct us_region *region, int awaited);
void us_batch_report(struct us_client *client, uint32_t number, struct us_batch_report *out);
uint32_t us_transitions_from(uint32_t state);
