struct us_probe_userfault {
    int32_t device;
    int32_t syscall;
    int32_t user_mode;
    int32_t api;
    int32_t move;
    int32_t reserved;
    uint64_t features;
};

void us_probe_userfault(struct us_probe_userfault *out);
int us_probe_vectored_drop(void);
int us_probe_readv(void);
int us_probe_io_uring(void);
int us_probe_merging(void);
