#define US_NVME_COUNT ...
#define US_NVME_LOOK ...
#define US_NVME_EOF ...
#define US_NVME_OUT ...
#define US_NVME_LATE ...

struct us_nvme_queue;

struct us_nvme_form {
    uint32_t capacity, entries, in_capsule, maxh2cdata, r2ts, alignment, next_cid, largest;
    bool header_digest, data_digest;
    uint8_t *scratch;
    uint32_t scratch_size, start, end;
    ...;
};

struct us_nvme_room {
    int32_t cid;
    uint32_t at, length;
    ...;
};

struct us_nvme_command {
    const uint8_t *data;
    uint32_t expected, moved, r2ts;
    bool damaged;
    ...;
};

struct us_nvme_piece {
    const uint8_t *bytes;
    uint64_t offset;
    uint32_t length;
    int32_t cid;
    ...;
};

int us_nvme_open(struct us_nvme_queue **out, const struct us_nvme_form *form);
void us_nvme_close(struct us_nvme_queue *queue);
int us_nvme_submit(struct us_nvme_queue *queue, uint8_t opcode, uint32_t nsid, const uint8_t *cdw, const uint8_t *data,
                   uint8_t *into, uint32_t length);
int us_nvme_abandon(struct us_nvme_queue *queue, uint16_t cid);
void us_nvme_room(struct us_nvme_queue *queue, struct us_nvme_room *room);
int us_nvme_take(struct us_nvme_queue *queue, uint32_t count, uint64_t *done);
int us_nvme_receive(struct us_nvme_queue *queue, int fd, uint64_t *done);
int us_nvme_exchange(struct us_nvme_queue *queue, int fd, uint32_t wait, uint64_t *done);
int us_nvme_send(struct us_nvme_queue *queue, int fd);
bool us_nvme_piece(struct us_nvme_queue *queue, uint32_t number, struct us_nvme_piece *piece);
void us_nvme_sent(struct us_nvme_queue *queue, size_t bytes);
const struct us_nvme_form *us_nvme_form(const struct us_nvme_queue *queue);
const struct us_nvme_command *us_nvme_command(const struct us_nvme_queue *queue, uint16_t cid);
