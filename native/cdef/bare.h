struct us_bare {
    uint8_t *memory;
    uint64_t pages;
    int32_t uffd;
};

struct us_bare_source {
    const uint8_t *stored;
    const uint64_t *offsets;
    int32_t codec;
};

int us_bare_open(struct us_bare *bare, uint64_t pages);
void us_bare_close(struct us_bare *bare);

int us_bare_serve(const struct us_bare *bare, const struct us_bare_source *source, int32_t parent);
