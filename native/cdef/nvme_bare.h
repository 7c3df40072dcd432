struct us_nvme_bare {
    uint8_t *memory;
    uint64_t blocks;
    uint32_t block_size;
    bool header_digest, data_digest, spin;
};

int us_nvme_ping(int fd, uint32_t ask, uint32_t answer, uint32_t count, bool spin, uint64_t *took);
int us_nvme_pong(int fd, uint32_t ask, uint32_t answer, bool spin);
int us_nvme_bare_serve(int fd, const struct us_nvme_bare *bare);
int us_nvme_bare_ask(int fd, const struct us_nvme_bare *bare, uint32_t depth, uint32_t count, uint64_t *took);
