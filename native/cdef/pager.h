struct us_client;
struct us_region;

struct us_miss {
    struct us_region *region;
    uint64_t ticket;
    uint64_t time_ns;
    uint32_t first, count;
    uint32_t write;
    uint32_t ahead;
};

int us_client_create(struct us_client **out, int uffd, int pid, uint64_t features, int copy_out, uint32_t canary);
enum us_mover { US_MOVER_MOVE, US_MOVER_PROTECT };
enum us_held { US_HELD_NOT, US_HELD_PINNED, US_HELD_MERGED, US_HELD_UNKNOWN };

void us_client_set_mover(struct us_client *client, int mover);
int us_client_descriptors(const struct us_client *client, int which);
void us_client_set_agent(struct us_client *client, uint64_t staging, int tid);
int us_client_start(struct us_client *client, int placement);
int us_client_serve(struct us_client *client);
void us_place_loop(struct us_client *client);
void us_place_freely(void);
int us_client_news(struct us_client *client);
void us_client_stop(struct us_client *client);
void us_client_destroy(struct us_client *client);
void us_client_say(struct us_client *client, const char *text, int waiting);
int us_client_quiet(struct us_client *client);
int us_client_gone(struct us_client *client);
uint64_t us_client_table_bytes(const struct us_client *client);
void us_client_own_pool(struct us_client *client, struct us_pool *pool);

int us_region_open(struct us_client *client, uint64_t start, uint64_t pages, uint64_t base, uint64_t limit,
                   struct us_pool *pool, int grow, const struct us_prefetch *prefetch, struct us_region **out);
int us_region_quiesce(struct us_region *region);
void us_region_resume(struct us_region *region);
void us_region_detach(struct us_region *region, int unmapped);
int us_region_free(struct us_region *region);
void us_region_limit(struct us_region *region, uint64_t limit);

int us_serve_misses(struct us_client *client, int rounds, struct us_miss *out, int most);
int us_take_misses(struct us_client *client, struct us_miss *out, int most);
int us_fill_done(struct us_region *region, const struct us_miss *miss, const uint8_t *data, uint64_t *void_pages);
uint64_t us_fill_failed(struct us_region *region, const struct us_miss *miss, int lost);
uint64_t us_region_oldest_batch(struct us_region *region);
uint64_t us_client_batches(const struct us_client *client);
int us_take_writes(struct us_client *client, uint32_t *batches, int most);
int us_write_done(struct us_client *client, uint32_t batch, uint64_t accepted, int full);
int64_t us_region_discard(struct us_region *region, uint64_t first, uint64_t count, uint32_t *mark);
uint64_t us_region_next(const struct us_region *region, uint64_t first);
uint64_t us_discard_begin(struct us_region *region, uint64_t first, uint32_t count);
void us_discard_end(struct us_region *region, uint64_t first, uint64_t pages);
int64_t us_region_prefetch(struct us_region *region, uint64_t first, uint64_t count);
