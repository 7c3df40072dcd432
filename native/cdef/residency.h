int us_is_resident(uint64_t address);
