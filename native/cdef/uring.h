#define US_URING_CHUNK ...

struct us_uring;

int us_uring_open(struct us_uring **out, int fd, uint32_t depth, uint32_t align);
void us_uring_close(struct us_uring *ring);
int us_uring_eventfd(const struct us_uring *ring);
int us_uring_ask(struct us_uring *ring, uint32_t operation, void *buffer, uint64_t length, uint64_t offset);
int us_uring_submit(struct us_uring *ring);
int us_uring_reap(struct us_uring *ring, uint64_t *done);
uint64_t us_uring_moved(const struct us_uring *ring, uint32_t number);
