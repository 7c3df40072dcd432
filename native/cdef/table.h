#define US_TABLE_SLOTS 4294967296
#define US_LEAF_PAGES 64
#define US_BRANCH_PAGES 8192
#define US_NODE_BYTES 512

struct us_table { int fd; ...; };
struct us_extent { ...; };

int us_table_open(struct us_table *table);
void us_table_close(struct us_table *table);
uint64_t us_table_bytes(const struct us_table *table);
int us_extent_open(struct us_extent *extent, struct us_table *table, uint64_t base, uint64_t pages);
void us_extent_close(struct us_extent *extent);
void us_extent_prepare(struct us_extent *extent);
uint64_t us_extent_made(const struct us_extent *extent);
void *us_extent_make(struct us_extent *extent, uint64_t index);
uint64_t us_extent_from(const struct us_extent *extent, uint64_t index);
