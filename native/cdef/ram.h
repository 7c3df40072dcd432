struct us_ram;

int us_ram_create(struct us_ram **out, struct us_pool *pool, uint64_t pages);
void us_ram_destroy(struct us_ram *ram);
uint64_t us_ram_read(struct us_ram *ram, uint64_t index, uint64_t count, void *out, int *error);
uint64_t us_ram_write(struct us_ram *ram, uint64_t index, uint64_t count, const void *data, int *error);
void us_ram_discard(struct us_ram *ram, uint64_t index, uint64_t count);
