/* The bare loops of `userswap bench nvme`: what NVMe/TCP costs where nobody does more than send, receive and answer.
 *
 * ping and pong send blocks of bytes of given sizes to and fro.  serve is the data path of a target, of which everything but the
 * I/O on a connected queue is done elsewhere, and which trusts its host: a partner for measuring, not for use.  ask is a host that
 * reads blocks at a depth, counting bytes instead of looking at them.  With `spin` they look for bytes again and again instead of
 * sleeping until some come.
 */
#ifndef US_NVME_BARE_H
#define US_NVME_BARE_H
#include <stdbool.h>
#include <stdint.h>

struct us_nvme_bare {
    uint8_t *memory; /* of blocks */
    uint64_t blocks;
    uint32_t block_size;
    bool header_digest, data_digest, spin;
};

/* Each of `count` round trips goes to `took`, in nanoseconds.  0 or -errno, -EPIPE when the other end closed. */
int us_nvme_ping(int fd, uint32_t ask, uint32_t answer, uint32_t count, bool spin, uint64_t *took);
/* Until the other end closes: 0, or -errno. */
int us_nvme_pong(int fd, uint32_t ask, uint32_t answer, bool spin);

/* Serves Read, Write, Write Zeroes, Flush and Dataset Management until the host closes: 0, or -errno. */
int us_nvme_bare_serve(int fd, const struct us_nvme_bare *bare);
/* Reads `count` single blocks in an order that looks random, `depth` at a time; fills `took` in the order of the answers. */
int us_nvme_bare_ask(int fd, const struct us_nvme_bare *bare, uint32_t depth, uint32_t count, uint64_t *took);
#endif
