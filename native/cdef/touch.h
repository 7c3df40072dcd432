#define US_TOUCH_BUCKETS 1216
#define US_TOUCH_SUB_BITS 5
#define US_TOUCH_MAX_THREADS 64

enum us_touch_operation {
    US_TOUCH_FILL = 0,
    US_TOUCH_READ = 1,
    US_TOUCH_UPDATE = 2,
    US_TOUCH_WRITE = 3,
    US_TOUCH_ZERO = 4,
    US_TOUCH_CHECK = 5,
};

struct us_touch_plan {
    uint8_t *memory;
    const uint8_t *sample;
    const uint32_t *order;
    uint32_t *versions;
    uint64_t sample_pages;
    uint64_t count;
    uint32_t operation;
    uint32_t threads;
    int32_t cpus[64];
};

struct us_touch_result {
    uint64_t elapsed_ns;
    uint64_t user_ns;
    uint64_t system_ns;
    uint64_t accesses;
    uint64_t bad;
    uint64_t first_bad_page;
    uint64_t major_faults;
    uint64_t minor_faults;
    uint64_t latency_max_ns;
    uint64_t histogram[1216];
};

int us_touch_run(const struct us_touch_plan *plan, struct us_touch_result *result);

void us_touch_page(const uint8_t *sample, uint64_t sample_pages, uint64_t page, uint32_t version, uint8_t *out);

uint64_t us_touch_bucket_floor(uint32_t bucket);

uint64_t us_touch_clock_cost(void);
