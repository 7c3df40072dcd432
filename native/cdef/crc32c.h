uint32_t us_crc32c(uint32_t crc, const void *data, size_t length);
uint32_t us_crc32c_tables(uint32_t crc, const void *data, size_t length);
