typedef int us_relocate_fn(void *owner, uint64_t slot, uint64_t from, uint64_t to);

struct us_pool;

struct us_pool_stats {
    uint64_t objects;
    uint64_t same_filled;
    uint64_t whole_pages;
    uint64_t payload_bytes;
    uint64_t object_bytes;
    uint64_t file_bytes;
    uint64_t limit_bytes;
    uint64_t compactions;
    uint64_t moved;
    uint32_t codec;
    uint32_t locked;
};

#define US_HANDLE_SAME ...

int us_pool_create(struct us_pool **out, int codec, int level, int shuffle, uint64_t limit_bytes);
void us_pool_destroy(struct us_pool *pool);
void us_pool_set_owner(struct us_pool *pool, us_relocate_fn *relocate, void *owner);
int us_pool_fd(const struct us_pool *pool);
int us_pool_put(struct us_pool *pool, const void *page, uint64_t slot, uint64_t *handle);
int us_pool_get(struct us_pool *pool, uint64_t handle, void *page);
void us_pool_free(struct us_pool *pool, uint64_t handle);
uint32_t us_pool_cost(struct us_pool *pool, uint64_t handle);
int us_pool_wants_compaction(const struct us_pool *pool);
int us_pool_compact(struct us_pool *pool, unsigned max_moves);
uint64_t us_pool_held(const struct us_pool *pool);
void us_pool_stats(struct us_pool *pool, struct us_pool_stats *stats);
