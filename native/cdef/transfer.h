enum us_operation { US_FILE_READ, US_FILE_WRITE, US_FILE_SYNC, US_FILE_PUNCH, US_FILE_ZERO, US_FILE_ALLOCATE };

int us_transfer_now(uint32_t operation, int fd, void *buffer, uint64_t length, uint64_t offset, uint32_t align,
                    uint64_t *done);
int us_transfer_cached(int fd, void *buffer, uint64_t length, uint64_t offset);
